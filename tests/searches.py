"""Small real searches: jobs, and what their ledgers say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rayft.report.log import read_all
from rayft.report.trials import TrialState, trials_of
from rayft.spec import Job
from rayft.storage import open_store
from tests.cluster.steps import small_job

RATE = "train.learning_rate"


def search_of(folder: Path, name: str, tune: dict[str, Any], **groups: Any) -> Job:
    """A search over `prepare_folder`'s tiny model: trials of six steps of one worker, measured every second one."""
    values: dict[str, Any] = {
        "train": {"max_steps": 6, **groups.pop("train", {})},
        "data": {
            "train": [{"path": str(folder / "rows.jsonl"), "limit": 40}],
            "eval": [{"path": str(folder / "rows.jsonl"), "limit": 8}],
        },
        "eval": {"every_steps": 2, **groups.pop("eval", {})},
        "checkpoint": {"every_steps": 2, "keep": 9},
        "tune": {"metric": "eval.loss", **tune},
    }
    return small_job(folder, name=name, **{**values, **groups})


def trials_in(uri: str | Path) -> dict[str, TrialState]:
    """The trials of a search folder, as its ledger says."""
    return trials_of(read_all(open_store(uri)))


def rows_of(uri: str | Path, event: str) -> list[dict[str, Any]]:
    """The ledger's rows of one event, in the order of writing."""
    return [row for row in read_all(open_store(uri)) if row["kind"] == "trial" and row.get("event") == event]


def curve_of(trial: TrialState, metric: str = "eval.loss") -> list[tuple[int, float]]:
    """What a trial reported, without what depends on the machine's speed."""
    return trial.points(metric)
