"""Metrics of a run, and the dashboard over them; `tests/cluster/test_fleet_metrics.py` shows that Ray exports these names."""

from __future__ import annotations

import json
import re

import pytest

from rayft.train.metrics import METRICS, RunMetrics
from tests.shared import ROOT

DASHBOARD = ROOT / "cluster" / "grafana" / "rayft.json"


def test_the_dashboard() -> None:
    board = json.loads(DASHBOARD.read_text())
    assert set(re.findall(r"ray_\w+", DASHBOARD.read_text())) == {f"ray_{name}" for name in METRICS}
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    variables = {variable["name"] for variable in board["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(board["panels"]))) <= variables


def test_metrics_never_hurt_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever Ray says to a metric, the recorder goes on."""
    from ray.util import metrics

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no metrics here")

    monkeypatch.setattr(metrics, "Gauge", broken)
    silent = RunMetrics("run", {"user": "ann", "team": ""}, [])
    silent.row({"kind": "step", "step": 1, "loss": 1.0, "tokens_per_s": 3.0})
    silent.row({"kind": "step"})
    silent.row({"kind": "event"})
    silent.close()
