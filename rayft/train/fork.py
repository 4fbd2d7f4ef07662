"""A run that begins where another one stood: the other's checkpoint becomes its own, under its own settings.

What a checkpoint means must be the same for both: model, method, adapter, rows and their order. How it goes on from there is the
new job's: learning rates, weight decay, betas, clipping, batch size and schedule are never part of the state that is loaded.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import ray

from rayft.checkpoint import Lease, Manifest, copy_checkpoint, latest
from rayft.checkpoint.survey import survey
from rayft.errors import JobError, StorageError
from rayft.report.lineage import read_lineage, write_lineage
from rayft.spec import Job
from rayft.spec.search import SAME_WITH_LAG
from rayft.storage import ObjectNotFound, Store, open_store
from rayft.train.finish import job_of_run
from rayft.train.history import identities

ASK_TIMEOUT_S = 60.0

#: What was measured before the first step is the same for both runs if the keys below are; file -> keys.
MEASURED_BEFORE = {
    "suites-before.json": ("eval.suites",),
    "samples-before.json": ("eval.suites",),
    "details-before.json": ("eval.suites",),
    "rollouts/held-out-000000.parquet": ("data.eval", "rewards", "rollout"),
}

#: Keys that say what the numbers in a checkpoint are, and what a position in the data is.
SAME_KEYS = (
    "method",
    "seed",
    "adapter.type",
    "adapter.lora_r",
    "adapter.lora_alpha",
    "adapter.target_modules",
    "adapter.modules_to_save",
    "adapter.use_rslora",
    "adapter.use_dora",
    "model.random_weights",
    "reward.heads",
    "rl.critic",
    "rollout.lag",
)


@dataclass(frozen=True)
class Fork:
    """The checkpoint that a run begins from. job: of the run that wrote it."""

    source: Store
    manifest: Manifest
    job: Job

    def take(self, job: Job, store: Store, epoch: int) -> None:
        """Make it a checkpoint of the run `store`, committed last, with what was measured before the first step."""
        for key, keys in MEASURED_BEFORE.items():
            if all(_value(job, name) == _value(self.job, name) for name in keys):
                with contextlib.suppress(ObjectNotFound):
                    store.copy_from(self.source, key, key)
        state = self.manifest.state
        if ahead := state.get("ahead"):
            store.copy_from(self.source, ahead, ahead)
        copy_checkpoint(self.source, self.manifest, store, epoch, forked_state(state, self.job, job))


def begin(
    job: Job,
    store: Store,
    lease: Lease,
    origin: dict[str, Any],
    recorder: Any,
    *,
    total: int,
    end: int | None,
) -> None:
    """Write `lineage.json`, and give a run that is to begin as a fork and has no checkpoint yet its first one.

    origin: of this start. total, end: steps of the run, or the position where it ends. Raises JobError where the checkpoint is not
    there or is of something else, StorageError where it is damaged.
    """
    if job.checkpoint.fork is None:
        write_lineage(store, origin)
        return
    run, step = job.checkpoint.fork
    source = open_store(run)
    fork = None
    if latest(store) is None:
        fork = find_fork(job, store, source, step, origin)
        _refuse_nothing_left(job, fork.manifest, total, end)
    write_lineage(store, origin | {"forked_from": {"run": source.uri, "step": step}})
    if fork is not None:
        fork.take(job, store, lease.epoch)
        message = f"from step {step} of {source.uri}"
        ray.get(recorder.event.remote("fork", message, source=source.uri, step=step), timeout=ASK_TIMEOUT_S)


def find_fork(job: Job, store: Store, source: Store, step: int, origin: dict[str, Any]) -> Fork:
    """The committed checkpoint of `step` in the run folder `source`. Raises JobError where `job` cannot go on from it."""
    if _place(source) == _place(store):
        raise JobError(
            f"The run {job.name!r} cannot begin as a fork of itself (checkpoint.fork_from).",
            "Name another run's folder, or leave it out to resume.",
        )
    theirs, lineage = job_of_run(source), read_lineage(source)
    known = survey(source)
    if lineage is None or step not in known.good:
        for (at, _), reason in known.bad.items():
            if at == step:
                raise StorageError(reason, "Fork from an earlier checkpoint.")
        steps = ", ".join(map(str, sorted(known.good))) or "none"
        raise JobError(
            f"checkpoint.fork_from: {source.uri} has no committed checkpoint of step {step} (there are: {steps}).",
            "Choose one of these; checkpoint.keep says how many a run keeps.",
        )
    different = differences(theirs, job)
    before = identities(lineage)
    different += [words for words, value in identities(origin).items() if before[words] != value]
    if different:
        raise JobError(
            f"The run {job.name!r} cannot go on from step {step} of {source.uri}, where these differ: {'; '.join(different)}.",
            "Give them the same values there and here; how it is trained (group train, coefficients) may differ.",
        )
    return Fork(source, known.good[step], theirs)


def differences(theirs: Job, own: Job) -> list[str]:
    """Keys for which a checkpoint of one job means something else to the other, as `key: theirs -> own`."""
    keys = SAME_KEYS + (SAME_WITH_LAG if own.rollout.lag else ())
    found = [
        f"{key}: {_value(theirs, key)!r} -> {_value(own, key)!r}"
        for key in keys
        if _value(theirs, key) != _value(own, key)
    ]
    shares = [[(source.weight, source.replay) for source in job.data.train] for job in (theirs, own)]
    if shares[0] != shares[1]:
        found.append("the weights of data.train")
    scoring = [[(source.name, source.type, source.weight) for source in job.rewards] for job in (theirs, own)]
    if own.rollout.lag and scoring[0] != scoring[1]:
        found.append("rewards, by which answers drawn ahead are scored")
    return found


def forked_state(state: dict[str, Any], theirs: Job, own: Job) -> dict[str, Any]:
    """The state of a checkpoint as the fork goes on with it: a controller of kl_coef keeps what it has come to, unless the new job
    gives another coefficient or has none that moves."""
    if "kl_coef" in state and (own.rl.kl_coef != theirs.rl.kl_coef or own.rl.kl_target is None):
        return state | {"kl_coef": own.rl.kl_coef or 0.0}
    return state


def refuse_lost_beginning(job: Job, step: int | None) -> None:
    """Raise StorageError where an attempt at a run that began as a fork would begin from the base model."""
    if step is None and job.checkpoint.fork_from is not None:
        raise StorageError(
            f"The run {job.name!r} began as a fork, and none of its checkpoints can be read any more.",
            "Start it again to fork once more.",
        )


def _refuse_nothing_left(job: Job, manifest: Manifest, total: int, end: int | None) -> None:
    if manifest.step >= total if end is None else manifest.state["position"] >= end:
        raise JobError(
            f"The run {job.name!r} would be over where it begins, at step {manifest.step} (checkpoint.fork_from).",
            "Raise train.max_steps or train.num_train_epochs, which count from the source's beginning.",
        )


def _place(store: Store) -> str:
    path = store.local_path("job.yaml")
    return str(path.resolve()) if path else store.where("job.yaml")


def _value(job: Job, key: str) -> Any:
    value: Any = job
    for part in key.split("."):
        value = getattr(value, part)
    return value
