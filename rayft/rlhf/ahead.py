"""Answers that are drawn for the next step while one trains; a checkpoint takes them along."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from rayft.errors import StorageError
from rayft.rlhf.prompts import PromptSet
from rayft.rlhf.rollout import Rollout
from rayft.rlhf.step import Step
from rayft.storage import ObjectNotFound, Store


class Ahead:
    """One step that is under way beside the one that trains; leaving it waits for the work under way.

    It waits without a time-out of its own: every wait inside has one.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rayft-ahead")
        self._step: Future[Step] | None = None

    @property
    def begun(self) -> bool:
        """Whether there is one."""
        return self._step is not None

    def begin(self, draw: Callable[[int], Step], position: int) -> None:
        """Draw the step at a position of the prompts."""
        self._step = self._pool.submit(draw, position)

    def have(self, step: Step) -> None:
        """Take a step that was drawn before."""
        self._step = Future()
        self._step.set_result(step)

    def look(self) -> Step:
        """The step, once it is done; it stays. Raises what drawing it raised."""
        assert self._step is not None
        return self._step.result()

    def take(self) -> Step:
        """The step, once it is done. Raises what drawing it raised."""
        step = self.look()
        self._step = None
        return step

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def keep_ahead(store: Store, step: int, ahead: Step) -> str:
    """Write the answers drawn for what comes after `step`; returns under which key."""
    key = f"rollouts/ahead-{step:06d}.json.gz"
    answers = [[r.sample, r.ids, r.logprobs, r.ended, r.version, r.text] for r in ahead.rollouts]
    values = {
        "positions": [r.prompt.position for r in ahead.rollouts],
        "answers": answers,
        "scores": ahead.scores_S.tolist(),
        "by_source": {name: scores.tolist() for name, scores in ahead.by_source.items()},
        "next_position": ahead.next_position,
        "ledger": ahead.ledger,
    }
    store.put(key, gzip.compress(json.dumps(values).encode(), mtime=0))
    return key


def kept_ahead(store: Store, key: str, prompts: PromptSet) -> Step:
    """What `keep_ahead` wrote. Raises StorageError if it is gone."""
    try:
        values: dict[str, Any] = json.loads(gzip.decompress(store.get(key)))
    except ObjectNotFound:
        raise StorageError(
            f"{key} is gone, which the checkpoint needs: answers that were drawn for the next step.",
            "Put it back, or delete that checkpoint to resume from the one before.",
        ) from None
    found = {position: prompts.at(position) for position in set(values["positions"])}
    rollouts = []
    for position, answer in zip(values["positions"], values["answers"], strict=True):
        prompt = found[position]
        assert prompt is not None
        rollouts.append(Rollout(prompt, *answer))
    by_source = {name: np.array(scores) for name, scores in values["by_source"].items()}
    return Step(rollouts, np.array(values["scores"]), by_source, values["next_position"], values["ledger"])
