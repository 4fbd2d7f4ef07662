"""Searches on a real cluster: real trials, each a run of its own, and the answers at the end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import yaml

from rayft.checkpoint import latest
from rayft.cli import main
from rayft.report.log import read_all, read_log
from rayft.report.trials import lineage
from rayft.spec import dump_job, load_job
from rayft.storage import open_store
from rayft.tune import budget
from rayft.tune.history import history_of
from rayft.tune.propose import proposer_of
from rayft.tune.space import Space, sample
from tests.cluster.steps import prepare_folder
from tests.runs import events, losses, read_json, write_job
from tests.searches import RATE, curve_of, rows_of, search_of, trials_in

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    folder = prepare_folder(tmp_path_factory.mktemp("tune"))
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"route {n} merges"}) + "\n" for n in range(8))
    )
    return folder


def search(folder: Path, name: str, tune: dict[str, Any], **groups: Any) -> int:
    return main(["tune", str(write_job(search_of(folder, name, tune, **groups), folder / f"{name}.yaml"))])


def test_a_search_with_asha_from_its_first_trial_to_its_answers(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A grid with a rate that learns, ones that do not, and one that diverges; what all share is made once."""
    suites = [
        {"name": "general", "type": "bits_per_byte", "path": str(folder / "text.jsonl"), "forgetting": True}
    ]
    tune = {
        "space": {RATE: {"grid": [3e-2, 1e-6, 1e-7, 1e30]}},
        "searcher": "grid",
        "scheduler": "asha",
        "reduction_factor": 2,
        "max_concurrent": 1,
        "constraints": {"change.general.bits_per_byte": {"max": 100.0}},
    }
    assert search(folder, "asha", tune, eval={"suites": suites}) == 0
    uri = folder / "runs" / "asha"
    trials = trials_in(uri)
    statuses = [trials[f"t{number:04d}"].status for number in range(4)]
    assert statuses == ["done", "stopped", "stopped", "failed"]
    assert [step for step, _ in curve_of(trials["t0000"])] == [2, 4, 6]
    assert [step for step, _ in curve_of(trials["t0001"])] == [2]
    assert trials["t0001"].reason == "asha: step 2"
    assert (trials["t0003"].code, "diverged" in trials["t0003"].reason) == (6, True)

    # What a trial reports is what its run measured; a trial that was stopped did no step more.
    for name, trial in trials.items():
        log = open_store(uri / "trials" / f"asha-{name}")
        measured = {row["step"]: row["loss"] for row in read_log(log) if row["kind"] == "eval"}
        assert all(measured[step] == value for step, value in curve_of(trial))
    assert max(losses(open_store(uri / "trials" / "asha-t0001"))) == 2

    # Data and the measurement before training are made by one trial, for all of them.
    made = [row for row in read_all(open_store(uri)) if row.get("event") == "data"]
    assert len(made) == 1
    told = [
        (name, "took_s" in row)
        for name in trials
        for row in read_log(open_store(uri / "trials" / f"asha-{name}"))
        if row["kind"] == "suites" and row["when"] == "before"
    ]
    assert told == [("t0000", True), ("t0001", False), ("t0002", False), ("t0003", False)]
    before = {
        name: read_json(uri / "trials" / f"asha-{name}" / "suites-before.json") for name in ("t0000", "t0001")
    }
    assert before["t0000"] == before["t0001"]

    # The best job is a job without a search, its model is there, and the page has every trial.
    best = load_job(uri / "best.yaml", [])
    assert (best.tune, best.train.learning_rate) == (None, 3e-2)
    assert (uri / "model" / "config.json").exists()
    page = (uri / "report.html").read_text()
    assert all(name in page for name in trials)
    said = capsys.readouterr().out
    assert "Best: t0000" in said

    # Again under the same name: nothing is run twice. With more combinations it is another space.
    count = len(read_all(open_store(uri)))
    assert search(folder, "asha", tune, eval={"suites": suites}) == 0
    assert len(read_all(open_store(uri))) == count
    other = {**tune, "space": {RATE: {"grid": [3e-2, 1e-6]}}}
    assert search(folder, "asha", other, eval={"suites": suites}) == 2
    assert "tune.space" in capsys.readouterr().err

    # Constraints may be changed afterwards; where nothing meets them no trial is run, and the closest is named.
    strict = {**tune, "constraints": {"change.general.bits_per_byte": {"max": -100.0}}}
    assert search(folder, "asha", strict, eval={"suites": suites}) == 2
    assert (
        "meets the constraints on change.general.bits_per_byte; the closest is t0000"
        in capsys.readouterr().err
    )
    assert len(rows_of(uri, "proposed")) == 4


@pytest.mark.full
def test_a_metric_that_is_never_reported_ends_the_search_at_its_first_report(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tune = {"space": {RATE: {"grid": [1e-3, 2e-3, 3e-3]}}, "searcher": "grid", "metric": "eval.accuracy"}
    assert search(folder, "unknown", tune) == 2
    said = capsys.readouterr().err
    assert "no report has the metric 'eval.accuracy'" in said
    assert "eval.loss" in said


@pytest.mark.full
def test_a_process_that_the_memory_monitor_killed_does_not_end_the_search(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Tune gives up for any end of a process but two kinds. Here its own loop meets one, with a trial under way."""
    from ray.tune.execution.tune_controller import TuneController

    step, met = TuneController.step, []

    def killed(self: TuneController) -> None:
        step(self)
        if not met and rows_of(folder / "runs" / "evicted", "report"):
            met.append(True)
            raise RuntimeError("Caught unexpected exception") from ray.exceptions.OutOfMemoryError("evicted")

    monkeypatch.setattr(TuneController, "step", killed)
    tune = {"space": {RATE: {"grid": [1e-3, 2e-3]}}, "searcher": "grid", "max_concurrent": 1}
    assert search(folder, "evicted", tune) == 0
    assert "OutOfMemoryError: evicted" in capsys.readouterr().out
    trials = trials_in(folder / "runs" / "evicted")
    assert [trial.status for trial in trials.values()] == ["done", "done"]
    assert [len(trial.segments) for trial in trials.values()] == [1, 1]
    assert [step for step, _ in curve_of(trials["t0000"])] == [2, 4, 6]


def test_a_search_whose_budget_is_spent_answers_and_goes_on_with_more(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Optuna, over every kind of dimension. Time is up when the second trial has reported once: the first one is the best so far;
    with more time the second one and the others come to their end, none is run twice, and the best job file runs."""
    uri = folder / "runs" / "budget"
    tune = {
        "space": {
            RATE: {"loguniform": [1e-4, 3e-2]},
            "train.weight_decay": {"quniform": [0.0, 0.02, 0.01]},
            "train.lr_scheduler": {"choice": ["cosine", "wsd"]},
            "train.decay_ratio": {"uniform": [0.1, 0.5], "when": {"train.lr_scheduler": "wsd"}},
        },
        "searcher": "optuna",
        "scheduler": "asha",
        "num_trials": 5,
        "max_concurrent": 1,
    }
    # of the first four trials, whose values are random, two are without a decay_ratio
    groups = {"train": {"max_steps": 4, "warmup_steps": 0}, "seed": 1}

    def clock() -> float:
        return 1e6 if any(row["trial"] == "t0001" for row in rows_of(uri, "report")) else 0.0

    with monkeypatch.context() as patched:
        patched.setattr(budget, "time", SimpleNamespace(monotonic=clock))
        assert search(folder, "budget", {**tune, "time_budget_s": 1e5}, **groups) == 0
    first = trials_in(uri)
    assert (first["t0000"].status, len(first)) == ("done", 2)
    assert (first["t0001"].status, first["t0001"].reason) == ("waiting", "budget of 100000 s is spent")
    said = capsys.readouterr().out
    assert "Best: t0000" in said

    assert search(folder, "budget", {**tune, "time_budget_s": 1e7}, **groups) == 0
    trials = trials_in(uri)
    assert len(trials) == 5
    assert {trial.status for trial in trials.values()} <= {"done", "stopped"}
    assert curve_of(trials["t0000"]) == curve_of(first["t0000"])
    assert curve_of(trials["t0001"])[0] == curve_of(first["t0001"])[0]
    for event in ("proposed", "segment", "ended"):
        assert [row["trial"] for row in rows_of(uri, event)] == sorted(trials)
    for trial in trials.values():  # of one worker with one CPU
        assert trial.seconds > 0
        assert trial.cpu_hours * 3600 == pytest.approx(trial.seconds)

    job = load_job(uri / "job.yaml", [])
    before = [state for name, state in trials.items() if name != "t0004"]
    assert trials["t0004"].values == proposer_of(job).propose(4, history_of(job, before))
    assert trials["t0004"].values != sample(Space(job), job.seed, 4), "it learnt nothing from the others"

    best = load_job(uri / "best.yaml", [])
    assert main(["run", str(uri / "best.yaml")]) == 0
    again = open_store(folder / "runs" / best.name)
    measured = [
        (row["step"], row["loss"]) for row in read_log(again) if row["kind"] == "eval" and row["step"]
    ]
    assert measured == curve_of(
        next(one for one in trials.values() if one.values[RATE] == best.train.learning_rate)
    )


@pytest.mark.full
@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_a_search_over_a_method_that_learns_from_comparisons(folder: Path, kind: str) -> None:
    """Its own loss decides: a rate that learns nothing is stopped at its first report."""
    pairs = {"path": str(folder / "pairs.jsonl")}
    tune = {
        "space": {RATE: {"grid": [1e-2, 1e-9]}},
        "searcher": "grid",
        "scheduler": "asha",
        "reduction_factor": 2,
        "max_concurrent": 1,
    }
    data = {"train": [{**pairs, "limit": 40}], "eval": [{**pairs, "limit": 8}]}
    assert search(folder, kind, tune, data=data, method=kind, train={"warmup_steps": 0}) == 0
    trials = trials_in(folder / "runs" / kind)
    assert [trial.status for trial in trials.values()] == ["done", "stopped"]
    assert [step for step, _ in curve_of(trials["t0000"])] == [2, 4, 6]
    assert load_job(folder / "runs" / kind / "best.yaml", []).method == kind


@pytest.mark.full
def test_more_trials_under_the_same_name_are_added(folder: Path) -> None:
    space = {"space": {RATE: {"loguniform": [1e-4, 1e-2]}}}
    assert search(folder, "more", {**space, "num_trials": 1}) == 0
    first = trials_in(folder / "runs" / "more")["t0000"]
    assert search(folder, "more", {**space, "num_trials": 2}) == 0
    trials = trials_in(folder / "runs" / "more")
    assert [trial.status for trial in trials.values()] == ["done", "done"]
    assert curve_of(trials["t0000"]) == curve_of(first)
    assert len(rows_of(folder / "runs" / "more", "proposed")) == 2


def test_a_population_exploits_and_a_fork_goes_on_as_by_hand(folder: Path) -> None:
    """The worse of two goes on from the best one's checkpoint, and its steps are those of a person who does the same."""
    tune = {
        "space": {
            RATE: {"choice": [1e-7, 3e-2, 1e-6]}
        },  # the best in the middle, so that every move is to another
        "scheduler": "pbt",
        "quantile": 0.5,
        "num_trials": 2,
        "resample_probability": 0.0,
        "max_concurrent": 1,  # they take turns, so neither is over before the other has begun
    }
    assert search(folder, "pbt", tune, seed=SEED_WITH_A_GOOD_ONE) == 0
    uri = folder / "runs" / "pbt"
    trials = trials_in(uri)
    assert {trial.status for trial in trials.values()} == {"done"}
    forks = [(segment.start, trial, segment) for trial in trials.values() for segment in trial.forks]
    assert forks, "no trial has exploited another"
    _, trial, segment = min(forks, key=lambda one: one[0])
    assert segment.reason == "exploit"
    fork = segment.forked_from
    assert fork is not None
    assert fork.trial != trial.trial
    donor = next(one for one in trials[fork.trial].segments if one.run == fork.run)
    assert donor.values == {RATE: 3e-2}
    assert segment.values[RATE] in (1e-7, 1e-6), "it goes on with the donor's own value"
    own = uri / "trials" / segment.run
    assert read_json(own / "lineage.json")["forked_from"]["step"] == fork.step
    assert [part.run for part, _ in lineage(trials, trial.trial)][-1] == trial.run

    # By hand: the donor's folder as it was at that step, under the fork's own values.
    job = load_job(own / "job.yaml", [])
    hand = job.model_copy(
        update={
            "name": "hand",
            "storage": str(folder / "hand"),
            "checkpoint": job.checkpoint.model_copy(update={"fork_from": None}),
        }
    )
    target = folder / "hand" / "hand"
    shutil.copytree(uri / "trials" / fork.run, target)
    for later in (target / "checkpoints").iterdir():
        if int(later.name.partition("-")[2]) > fork.step:
            shutil.rmtree(later)
    for name in ("log.jsonl", "report.html", "lease"):
        path = target / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (target / "job.yaml").write_text(dump_job(hand))
    (folder / "hand.yaml").write_text(yaml.safe_dump(hand.model_dump(mode="json")))
    assert main(["run", str(folder / "hand.yaml")]) == 0
    forked, by_hand = losses(open_store(own)), losses(open_store(target))
    assert fork.step + 1 in forked
    assert forked == {step: by_hand[step] for step in forked}
    assert latest(open_store(target)) == 6
    assert events(open_store(own), "fork")


#: The seed of a search whose two random trials have different rates, one of them good.
SEED_WITH_A_GOOD_ONE = 0
