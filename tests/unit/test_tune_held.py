"""What a trial is charged for: its workers while they are its own, and nothing it waits for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rayft.report.log import Row
from rayft.tune.held import Held
from rayft.tune.segment import Segment, trial_job
from tests.ledgers import search_job

GPUS = {"CPU": 4.0, "GPU": 2.0}


def event(time: float, event: str, **fields: Any) -> Row:
    return {"time": time, "kind": "event", "event": event, "message": "", **fields}


def after(*rows: Row) -> Held:
    held = Held()
    held.feed(rows)
    return held


def test_preparing_and_waiting_for_the_first_room_cost_nothing() -> None:
    """The driver starts at 0, its workers are asked for at 600, have their room at 3600 and say so at 3630."""
    held = after(event(0, "open", devices=GPUS), event(590, "plan"))
    assert held.spent(3600)["gpu_hours"] == 0
    held.feed(
        [event(3630, "start", devices=GPUS, waited=[600, 3600]), {"time": 3700, "kind": "step", "step": 1}]
    )
    assert held.spent(7200) == {"gpu_hours": 2.0, "cpu_hours": 4.0, "seconds": 3600}


def test_what_ended_costs_nothing_more() -> None:
    held = after(event(100, "start", devices=GPUS), event(1900, "end", code=0))
    assert held.spent(9000) == {"gpu_hours": 1.0, "cpu_hours": 2.0, "seconds": 1800}
    killed = after(event(100, "start", devices=GPUS))
    killed.close(1900)
    assert killed.spent(9000) == held.spent(9000)


def test_an_elastic_run_is_charged_for_the_workers_that_it_had() -> None:
    """Two, then a wait for room, then one."""
    held = after(
        event(0, "start", devices={"CPU": 2.0}, waited=[0, 0]),
        event(5400, "resume", devices={"CPU": 1.0}, waited=[1800, 3600]),
        event(7200, "end", code=0),
    )
    assert held.spent(8000) == {"gpu_hours": 0, "cpu_hours": pytest.approx(2 * 0.5 + 1.0), "seconds": 5400}


def test_roles_that_wait_for_room() -> None:
    """Before the first attempt, and after a node was lost in the middle of one."""
    held = after(
        event(1800, "placed", waited=[0, 1800]),
        event(2000, "start", devices=GPUS),
        event(9000, "placed", waited=[5400, 9000]),
        event(10800, "end", code=0),
    )
    assert held.spent(20000)["seconds"] == 3600 + 1800


def test_a_trial_is_charged_for_all_its_runs(tmp_path: Path) -> None:
    """What earlier ones held, and of this one nothing before it has workers and nothing after its end."""
    search = search_job().model_copy(update={"storage": str(tmp_path)})
    before = {"gpu_hours": 0.5, "cpu_hours": 1.5, "seconds": 60.0}
    job = trial_job(search, "sweep-t0003", {"train.learning_rate": 1e-4, "adapter.lora_r": 4}, None)
    segment = Segment(job, "sweep-t0003", 0, before, gated=False)
    rows = [[event(0, "open")], [event(100, "start", devices=GPUS), event(1900, "end", code=0)]]
    alive = True
    segment._link = SimpleNamespace(rows=lambda seconds: rows.pop(0))  # type: ignore[assignment]
    segment._thread = SimpleNamespace(is_alive=lambda: alive)  # type: ignore[assignment]
    assert segment.listen(0) is None
    assert segment.spent() == before
    alive = False
    segment.listen(0)
    assert segment.spent() == {"gpu_hours": 1.5, "cpu_hours": 3.5, "seconds": 1860}
