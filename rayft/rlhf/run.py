"""One run from the driver's side: prepare, start the roles, train, and start them again when one dies."""

from __future__ import annotations

from typing import Any

import ray
from rich.console import Console

from rayft.checkpoint import CheckpointReader, Lease
from rayft.errors import PreemptedError, WorkerError
from rayft.objectives.kl import KlController
from rayft.report.lineage import write_lineage
from rayft.report.progress import Progress
from rayft.rlhf.group import RoleDied
from rayft.rlhf.held_out import HeldOut
from rayft.rlhf.loop import Loop, State
from rayft.rlhf.plan import RlPrepared, prepare
from rayft.rlhf.roles import Roles
from rayft.spec import Job
from rayft.storage import Store, node_cache_dir
from rayft.train.finish import finish
from rayft.train.fit import refuse_lost
from rayft.train.history import End, refuse_other_origin
from rayft.train.run import run_with
from rayft.train.signals import StopSignals

ASK_TIMEOUT_S = 60.0


def run(job: Job, *, console: Console | None = None, takeover: bool = False) -> int:
    """Start or resume the run `job.name`; returns 0, or raises the RayftError that carries the exit code."""
    return run_with(_run_under_lease, job, console=console, takeover=takeover)


def _run_under_lease(
    job: Job,
    store: Store,
    run_uri: str,
    lease: Lease,
    recorder: Any,
    console: Console,
    signals: StopSignals,
    end_before: End | None,
) -> None:
    prepared = prepare(job, run_uri, lease.owner, console.print)
    refuse_other_origin(store, job.name, prepared.origin(), end_before)
    write_lineage(store, prepared.origin())
    ray.get(recorder.event.remote("plan", **prepared.memory), timeout=ASK_TIMEOUT_S)
    console.print(f"data: {prepared.prompts.rows} prompts")
    driver = Driver(prepared, store, lease, recorder, console)
    with signals.asking(driver.ask_to_stop):
        driver.train()
    finish(prepared.plan.job, prepared.files, store, recorder)
    driver.show()


class Driver:
    """Attempts at a run, one after another, until it is done or has failed too often."""

    def __init__(
        self, prepared: RlPrepared, store: Store, lease: Lease, recorder: Any, console: Console
    ) -> None:
        self.prepared, self.plan, self.job = prepared, prepared.plan, prepared.plan.job
        self.store, self.lease, self.recorder, self.console = store, lease, recorder, console
        self._progress = Progress(console, self.plan.total_steps, every=self.job.log.every_steps)
        self._shown = 0
        self._stop_reason = ""
        self._held_out: HeldOut | None = None
        if self.job.data.eval:
            chat = prepared.prompts.chat
            self._held_out = HeldOut(self.plan, chat, store, node_cache_dir())

    def ask_to_stop(self, reason: str) -> None:
        """Save and end after the step under way."""
        self._stop_reason = reason

    def train(self) -> None:
        """To the end of the run. Raises WorkerError once processes died more than `max_failures` times."""
        failures, lost = 0, ""
        roles = Roles(self.plan, self.recorder, self.console.print)
        try:
            while True:
                try:
                    return self._attempt(roles, lost)
                except RoleDied as error:
                    lost = error.role
                    if self._stop_reason:
                        raise PreemptedError(
                            f"The run was asked to stop ({self._stop_reason}), and {error.message}",
                            "Start it again under the same name to go on from its last checkpoint.",
                        ) from error
                    failures += 1
                    if failures > self.job.cluster.max_failures:
                        raise WorkerError(
                            f"The roles failed more than {self.job.cluster.max_failures} times; the last failure was: {error.message}",
                            "Run again to resume from the last checkpoint; --debug shows the traceback.",
                        ) from error
                    self.recorder.event.remote(
                        "failure", f"{error.message} The run goes back to its last checkpoint."
                    )
                    self.show()
        finally:
            roles.close()

    def show(self) -> None:
        """Print rows of the log that are new."""
        rows = ray.get(self.recorder.since.remote(self._shown), timeout=ASK_TIMEOUT_S)
        self._shown += len(rows)
        for row in rows:
            self._progress.row(row)

    def _attempt(self, roles: Roles, lost: str) -> None:
        skipped: list[str] = []
        lease = Lease(self.store, self.lease.owner)
        epoch, step = lease.resume(on_skip=lambda at, why: skipped.append(f"step {at}: {why}"))
        message = "from the base model" if step is None else f"from the checkpoint of step {step}"
        workers = self.job.cluster.max_workers
        message += f" on {workers} worker{'s' if workers > 1 else ''}"
        ray.get(
            self.recorder.begin_attempt.remote(epoch, step, message, workers=workers, skipped=skipped),
            timeout=ASK_TIMEOUT_S,
        )
        self.show()
        rl = self.job.rl
        state = State(KlController(rl.kl_coef or 0.0, rl.kl_target, rl.kl_horizon))
        if step is not None:
            state.restore(step, CheckpointReader(self.store, step).state)
        roles.begin(epoch, step, lost)
        Loop(
            self.plan,
            self.prepared.prompts,
            roles,
            state,
            self.recorder,
            self.store,
            self._between,
            self._held_out,
        ).train()

    def _between(self) -> str:
        self.show()
        refuse_lost(self.lease)
        return self._stop_reason
