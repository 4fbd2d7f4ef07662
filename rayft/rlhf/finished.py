"""Answers of a step that was given up before it trained: they lie beside the checkpoint whose weights drew them."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Sequence
from typing import Any

from rayft.errors import StorageError
from rayft.rlhf.prompts import PromptSet
from rayft.rlhf.rollout import Asked, Rollout
from rayft.storage import ObjectNotFound, Store

#: Answers by position of their prompt and number of the sample.
Finished = dict[tuple[int, int], Rollout]


def key_of(asked: Asked) -> tuple[int, int]:
    """Where an answer that is wanted lies in `Finished`."""
    return asked[0].position, asked[1]


class Interrupted(Exception):
    """The run should leave, and no more answers were drawn; those there are lie in the `Finished` that was handed in."""


def as_values(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """Rollouts as JSON; of their prompts the positions."""
    return {
        "positions": [r.prompt.position for r in rollouts],
        "answers": [[r.sample, r.ids, r.logprobs, r.ended, r.version, r.text] for r in rollouts],
    }


def as_rollouts(values: dict[str, Any], prompts: PromptSet) -> list[Rollout]:
    """What `as_values` was made of."""
    found = {position: prompts.at(position) for position in set(values["positions"])}
    rollouts = []
    for position, answer in zip(values["positions"], values["answers"], strict=True):
        prompt = found[position]
        assert prompt is not None
        rollouts.append(Rollout(prompt, *answer))
    return rollouts


def write_values(store: Store, key: str, values: dict[str, Any]) -> str:
    """Write JSON, compressed; returns the key."""
    store.put(key, gzip.compress(json.dumps(values).encode(), mtime=0))
    return key


def read_values(store: Store, key: str) -> dict[str, Any]:
    """What `write_values` wrote. Raises StorageError if it is gone or damaged."""
    try:
        values: dict[str, Any] = json.loads(gzip.decompress(store.get(key)))
    except (EOFError, gzip.BadGzipFile, zlib.error, ValueError) as error:
        raise StorageError(
            f"{store.where(key)} is damaged ({error}); it holds answers that were drawn for the next step.",
            "Put back a whole copy, or delete the checkpoint it lies beside to resume from the one before.",
        ) from error
    except ObjectNotFound:
        raise StorageError(
            f"{key} is gone, which the checkpoint needs: answers that were drawn for the next step.",
            "Put it back, or delete that checkpoint to resume from the one before.",
        ) from None
    return values


def keep_finished(store: Store, step: int, epoch: int, finished: Finished) -> None:
    """Write the answers drawn by the weights of a checkpoint, which is known by its step and the epoch that wrote it."""
    rollouts = [finished[key] for key in sorted(finished)]
    write_values(store, _key(step), as_values(rollouts) | {"epoch": epoch})


def kept_finished(store: Store, step: int, epoch: int, prompts: PromptSet) -> Finished:
    """What `keep_finished` wrote for this very checkpoint, if anything."""
    if not epoch or store.stat(_key(step)) is None:
        return {}
    try:
        values = read_values(store, _key(step))
    except StorageError:
        return {}  # they are drawn again
    if values["epoch"] != epoch:
        return {}
    return {(r.prompt.position, r.sample): r for r in as_rollouts(values, prompts)}


def _key(step: int) -> str:
    return f"rollouts/finished-{step:06d}.json.gz"
