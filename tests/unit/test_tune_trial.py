"""The job of a trial's run, and when a search under a known name is over, goes on, or is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from rayft.errors import JobError, ResourceError
from rayft.report.trials import Fork
from rayft.spec import Job, Tune, dump_job, parse_job
from rayft.spec.load import RESUMABLE_KEYS
from rayft.spec.search import LONGEST_NAME
from rayft.storage import Store, open_store
from rayft.tune import trial
from rayft.tune.run import over, refuse_other_space
from rayft.tune.segment import KEPT_FOR_FORKS, run_name, trial_job
from tests.ledgers import CHANGE, Ledger, search_job

RATE = {"train.learning_rate": {"loguniform": [1e-5, 1e-2]}}
VALUES = {"train.learning_rate": 3e-4, "adapter.lora_r": 8}


def changed(job: Job, **groups: Any) -> Job:
    """The job with some keys of its groups changed, read anew."""
    raw = job.model_dump(mode="json")
    for name, value in groups.items():
        raw[name] = {**raw[name], **value} if isinstance(value, dict) else value
    return parse_job(raw)


def of_trial(job: Job, forked: Fork | None = None, values: dict[str, Any] = VALUES) -> Job:
    return trial_job(job, "sweep-t0003", values, forked)


# -- a trial's run ---------------------------------------------------------------------------------------------------


def test_runs_of_a_trial_are_numbered_from_the_second() -> None:
    assert [run_name("sweep", "t0003", number) for number in (0, 1, 12)] == [
        "sweep-t0003",
        "sweep-t0003-1",
        "sweep-t0003-12",
    ]


def test_a_trials_job_is_the_searchs_with_its_values_in_the_searchs_folder() -> None:
    job = search_job()
    found = of_trial(job)
    assert found.tune is None
    assert (found.train.learning_rate, found.adapter.lora_r) == (3e-4, 8)
    assert (found.name, found.storage) == ("sweep-t0003", "runs/sweep/trials")
    assert (found.train.max_steps, found.eval, found.model, found.seed) == (24, job.eval, job.model, job.seed)
    assert of_trial(changed(job, storage="s3://bucket/runs/")).storage == "s3://bucket/runs/sweep/trials"


def test_all_trials_share_one_data_cache() -> None:
    """The one beside the runs that a run would use by itself, or the job's own."""
    job = search_job()
    assert of_trial(job).data.cache == "runs/cache"
    assert of_trial(changed(job, storage="runs/")).data.cache == "runs/cache"
    assert of_trial(changed(job, data={"cache": "s3://bucket/cache"})).data.cache == "s3://bucket/cache"
    other = trial_job(job, "sweep-t0004", {**VALUES, "adapter.lora_r": 4}, None)
    assert other.data.cache == of_trial(job).data.cache


def test_nodes_are_looked_at_once_and_not_by_every_trial() -> None:
    job = changed(search_job(), cluster={"preflight": True})
    found = of_trial(job).cluster
    assert not found.preflight
    assert found.model_copy(update={"preflight": True}) == job.cluster


def test_trackers_hear_whose_trial_it_is_and_its_values() -> None:
    log = of_trial(changed(search_job(), log={"tensorboard": True})).log
    assert (log.group, log.hparams, log.tensorboard) == ("sweep", VALUES, True)


def test_a_fork_begins_at_another_trials_checkpoint() -> None:
    assert of_trial(search_job()).checkpoint.fork_from is None
    found = of_trial(search_job(), Fork("t0001", "sweep-t0001-2", 8))
    assert found.checkpoint.fork_from == "runs/sweep/trials/sweep-t0001-2@8"


def test_what_a_trial_spends_is_told_between_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget of GPU-hours holds while nothing is reported."""
    monkeypatch.setattr(trial, "SPENT_EVERY_S", -1.0)
    told: list[tuple[Any, ...]] = []
    driven = trial.TrialRun.__new__(trial.TrialRun)
    driven.trial = "t0003"
    monkeypatch.setattr(driven, "_ask", lambda *asked: told.append(asked), raising=False)
    reports = iter([None, (4, {"eval.loss": 1.0}, False)])
    segment = SimpleNamespace(
        listen=lambda _: next(reports), measured=list, attempted=False, spent=lambda: {"gpu_hours": 2.5}
    )
    assert driven._await(segment) == (4, {"eval.loss": 1.0}, False)  # type: ignore[arg-type]
    assert told == [("tell", {"event": "spent", "trial": "t0003", "gpu_hours": 2.5})]


def test_what_a_trial_spent_is_known_when_it_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    driven = trial.TrialRun.__new__(trial.TrialRun)
    driven.trial, driven._token = "t0003", ""
    driven._under_way = SimpleNamespace(spent=lambda: {"gpu_hours": 2.5}, leave=lambda reason: None)  # type: ignore[assignment]

    def leave() -> None:
        raise trial.Leaving("SIGTERM")

    monkeypatch.setattr(driven, "_next_report", leave, raising=False)
    monkeypatch.setattr(driven, "_ask", lambda *call: asked.append(call), raising=False)
    assert driven.step() == {"left": "SIGTERM", "done": True}
    assert asked[0] == ("tell", {"event": "spent", "trial": "t0003", "gpu_hours": 2.5})


@pytest.mark.parametrize(
    ("error", "ran", "failed"),
    [(ResourceError, False, False), (ResourceError, True, True), (trial.NeverFits, False, True)],
)
def test_a_trial_that_lost_its_room_to_others_waits_again(
    monkeypatch: pytest.MonkeyPatch, error: type[ResourceError], ran: bool, failed: bool
) -> None:
    """It was granted a slot, so it can fit; what can never fit has failed."""
    asked: list[tuple[Any, ...]] = []
    driven = trial.TrialRun.__new__(trial.TrialRun)
    driven.trial, driven._token, driven._reported, driven._under_way = "t0003", "", 0, None
    driven.about = SimpleNamespace(turn=None)  # type: ignore[assignment]
    spent, reports = {"gpu_hours": 0.0}, SimpleNamespace(last=lambda: (0, {}))
    first = SimpleNamespace(pending=lambda: None, ran=ran, spent=lambda: spent, run="first", reports=reports)
    again = SimpleNamespace(pending=lambda: (4, {"eval.loss": 1.0}, False), spent=lambda: spent, run="again")
    begun = iter([first, again])

    def lost(segment: Any) -> None:
        raise error("The workers did not get their resources.", "")

    monkeypatch.setattr(driven, "_begin", lambda: next(begun), raising=False)
    monkeypatch.setattr(driven, "_start", lost, raising=False)
    monkeypatch.setattr(driven, "_ask", lambda *call: asked.append(call), raising=False)
    result = driven._next_report()
    waited = (
        "tell",
        {"event": "waiting", "trial": "t0003", "reason": "The workers did not get their resources."},
    )
    assert ("failed_code" in result, waited in asked) == (failed, not failed)
    assert result["run"] == ("first" if failed else "again")
    assert ("release", "t0003", "") in asked


@pytest.mark.parametrize("scheduler", ["none", "asha", "hyperband", "median", "pbt", "pb2"])
def test_more_checkpoints_are_kept_only_where_others_fork_them(scheduler: str) -> None:
    job = search_job(scheduler=scheduler, space=RATE)
    forks = scheduler in ("pbt", "pb2")
    values = {"train.learning_rate": 1e-4}
    assert job.checkpoint.keep < KEPT_FOR_FORKS
    for keep in (1, job.checkpoint.keep, 50):
        found = of_trial(changed(job, checkpoint={"keep": keep}), values=values)
        assert found.checkpoint.keep == (max(keep, KEPT_FOR_FORKS) if forks else keep)


@pytest.mark.parametrize(
    ("perturb", "reports", "saves", "kept"), [(12, 1, 3, 33), (12, 1, None, 25), (4, 2, None, KEPT_FOR_FORKS)]
)
def test_checkpoints_of_two_comparisons_are_kept(
    perturb: int, reports: int, saves: int | None, kept: int
) -> None:
    """A trial forks the donor's of its last comparison, when the donor may be about to come to its next."""
    job = changed(
        search_job(scheduler="pbt", space=RATE, perturb_steps=perturb),
        eval={"every_steps": reports},
        checkpoint={"every_steps": saves},
    )
    checkpoint = of_trial(job, values={"train.learning_rate": 1e-4}).checkpoint
    assert (checkpoint.keep, checkpoint.every_steps) == (kept, saves or reports)


@pytest.mark.parametrize("forked", [None, Fork("t0001", "sweep-t0001", 8)])
def test_a_trials_job_file_can_be_read(forked: Fork | None) -> None:
    """Also by a person who runs it again; the longest name that a search may have leaves room for its runs'."""
    job = changed(search_job(), name="x" * LONGEST_NAME)
    found = trial_job(job, run_name(job.name, "t9999", 99), VALUES, forked)
    assert parse_job(yaml.safe_load(dump_job(found))) == found


# -- a search of that name -------------------------------------------------------------------------------------------


def searched(
    tmp_path: Path, job: Job, *ends: int | None, trials: int = 1, name: str = "search", measured: bool = True
) -> Store:
    """The folder of a search; ends: of each of its drivers the exit code, or None for one that was killed."""
    store, ledger = open_store(tmp_path / name), Ledger()
    for epoch, code in enumerate(ends, start=1):
        ledger.epoch = epoch
        ledger.add("open", began=1.7e9)
        for number in range(trials):
            ledger.begin(f"t{number:04d}", VALUES)
            if measured:
                ledger.report(f"t{number:04d}", 4, 1.0)
        if code is not None:
            ledger.add("end", code=code, terminal=False)
    ledger.write(store)
    store.put("job.yaml", dump_job(job).encode())
    return store


OTHER_TUNE = {
    "space": RATE,
    "metric": "train.loss",
    "mode": "max",
    "searcher": "optuna",
    "scheduler": "asha",
    "grace_steps": 8,
    "reduction_factor": 2.0,
    "perturb_steps": 8,
    "quantile": 0.5,
    "resample_probability": 0.5,
    "objectives": [{"metric": "eval.loss"}, {"metric": "seconds"}],
    "num_trials": 99,
    "max_concurrent": 2,
    "share": 0.5,
    "time_budget_s": 60.0,
    "gpu_hours": 1.5,
    "oom_retries": 0,
    "constraints": {CHANGE: {"max": 0.05}, "train.loss": {"min": 0.0, "max": 9.0}},
}
#: What else must be so for a key to be given at all.
WITH = {
    "grace_steps": {"scheduler": "asha"},
    "reduction_factor": {"scheduler": "asha"},
    "perturb_steps": {"scheduler": "pbt", "space": RATE},
    "quantile": {"scheduler": "pbt", "space": RATE},
    "resample_probability": {"scheduler": "pbt", "space": RATE},
    "objectives": {"metric": None, "searcher": "optuna"},
}


def test_every_key_of_the_group_is_tried() -> None:
    assert set(OTHER_TUNE) == set(Tune.model_fields)
    assert {key.removeprefix("tune.") for key in RESUMABLE_KEYS if key.startswith("tune.")} <= set(OTHER_TUNE)


@pytest.mark.parametrize("key", OTHER_TUNE)
def test_a_search_goes_on_with_another_length_and_not_with_other_trials(tmp_path: Path, key: str) -> None:
    before = search_job(**(WITH.get(key, {}) if key != "objectives" else {}))
    after = search_job(**WITH.get(key, {}), **{key: OTHER_TUNE[key]})
    assert before != after
    store = searched(tmp_path, before, 143)
    if f"tune.{key}" in RESUMABLE_KEYS:
        refuse_other_space(store, after)
        refuse_other_space(searched(tmp_path, after, 143, name="other"), before)
        return
    with pytest.raises(
        JobError, match=rf"'sweep' has trials of another job; these keys differ: .*tune\.{key}"
    ):
        refuse_other_space(store, after)


def test_trials_of_another_job_are_refused_by_its_keys(tmp_path: Path) -> None:
    job = search_job()
    store = searched(tmp_path, job, 143)
    refuse_other_space(store, job)
    refuse_other_space(store, changed(job, cluster={"max_failures": 9}))  # what any run may change
    with pytest.raises(JobError, match=r"train\.max_steps: 24 -> 48") as caught:
        refuse_other_space(store, changed(job, train={"max_steps": 48}, tune={"num_trials": 99}))
    assert "num_trials" not in caught.value.message
    assert caught.value.code == 2


def test_a_mistake_may_be_corrected_until_something_was_measured(tmp_path: Path) -> None:
    """But not what the search looks at: its trials have values of the space."""
    job = search_job()
    store = searched(tmp_path, job, 2, measured=False)
    refuse_other_space(store, changed(job, train={"max_steps": 48}))
    with pytest.raises(JobError, match=r"tune\.space"):
        refuse_other_space(store, search_job(space=RATE))


def test_a_search_that_has_no_trials_yet_may_become_any_other(tmp_path: Path) -> None:
    store = searched(tmp_path, search_job(), 143, trials=0)
    refuse_other_space(store, search_job(space=RATE))
    refuse_other_space(open_store(tmp_path / "new"), search_job())


def test_the_name_of_a_run_is_no_searchs(tmp_path: Path) -> None:
    job = search_job()
    store = searched(tmp_path, job.model_copy(update={"tune": None}), 0, trials=0)
    with pytest.raises(JobError, match="The name 'sweep' is a run's, and no search's"):
        refuse_other_space(store, job)


@pytest.mark.parametrize(
    ("ends", "is_over"),
    [((0,), True), ((143,), False), ((None,), False), ((143, 0), True), ((None, 0), True), ((0, 143), False), ((), False)],
)  # fmt: skip
def test_a_search_is_over_when_its_last_driver_ended_well(
    tmp_path: Path, ends: tuple[int | None, ...], is_over: bool
) -> None:
    job = search_job()
    assert over(searched(tmp_path, job, *ends), job) is is_over


def test_a_search_of_another_length_or_of_no_folder_is_not_over(tmp_path: Path) -> None:
    store = searched(tmp_path, search_job(), 0)
    assert not over(store, search_job(num_trials=99))
    assert not over(store, search_job(constraints=copy.deepcopy(OTHER_TUNE["constraints"])))
    assert not over(open_store(tmp_path / "new"), search_job())


def test_a_search_that_was_made_longer_and_killed_is_not_over(tmp_path: Path) -> None:
    """It ended, was started again with more trials, and its driver died: job.yaml is the longer search's by then."""
    longer = search_job(num_trials=99)
    assert not over(searched(tmp_path, longer, 0, None), longer)
