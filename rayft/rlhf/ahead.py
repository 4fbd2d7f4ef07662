"""Answers that are drawn for the next step while one trains; a checkpoint takes them along."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from rayft.rlhf.finished import as_rollouts, as_values, read_values, write_values
from rayft.rlhf.prompts import PromptSet
from rayft.rlhf.step import Scored, Step
from rayft.storage import Store


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

    @property
    def there(self) -> bool:
        """Whether there is one and it is done, without having failed."""
        return self._step is not None and self._step.done() and self._step.exception() is None

    def begin(self, draw: Callable[[], Step]) -> None:
        """Draw a step."""
        self._step = self._pool.submit(draw)

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
    values = _scored_values(ahead.answers) | {
        "dropped": _scored_values(ahead.dropped),
        "next_position": ahead.next_position,
        "ledger": ahead.ledger,
    }
    return write_values(store, f"rollouts/ahead-{step:06d}.json.gz", values)


def kept_ahead(store: Store, key: str, prompts: PromptSet) -> Step:
    """What `keep_ahead` wrote. Raises StorageError if it is gone."""
    values = read_values(store, key)
    return Step(
        values["next_position"],
        values["ledger"],
        _scored(values, prompts),
        _scored(values["dropped"], prompts) if "dropped" in values else Scored(),
    )


def _scored_values(scored: Scored) -> dict[str, Any]:
    by_source = {name: scores.tolist() for name, scores in scored.by_source.items()}
    return as_values(scored.rollouts) | {"scores": scored.scores_S.tolist(), "by_source": by_source}


def _scored(values: dict[str, Any], prompts: PromptSet) -> Scored:
    by_source = {name: np.array(scores) for name, scores in values["by_source"].items()}
    return Scored(as_rollouts(values, prompts), np.array(values["scores"]), by_source)
