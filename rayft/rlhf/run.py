"""One run from the driver's side: prepare, start the roles, train, and start them again when one dies."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Iterator
from typing import Any

import ray
from rich.console import Console

from rayft.checkpoint import CheckpointReader, Lease
from rayft.errors import PreemptedError, ResourceError, WorkerError
from rayft.objectives.kl import KlController
from rayft.report.progress import Progress
from rayft.rlhf.group import RoleDied
from rayft.rlhf.held_out import HeldOut
from rayft.rlhf.loop import Loop, State
from rayft.rlhf.plan import RlPrepared, prepare
from rayft.rlhf.roles import Roles, table_for
from rayft.spec import Job
from rayft.storage import Store, node_cache_dir
from rayft.train import fork
from rayft.train.draining import Drains
from rayft.train.failures import Moving
from rayft.train.finish import finish
from rayft.train.fit import refuse_lost
from rayft.train.group import Notice
from rayft.train.history import End, refuse_other_origin
from rayft.train.link import Link, Pauses
from rayft.train.run import LookFirst, run_with
from rayft.train.signals import StopSignals

ASK_TIMEOUT_S = 60.0
DRAINS_EVERY_S = 1.0
#: The recorder may wait for an object store as long as its retries take.
FLUSH_TIMEOUT_S = 600.0
#: Seconds between looks at the lease while the run waits at a gate.
HELD_EVERY_S = 2.0


def run(
    job: Job,
    *,
    console: Console | None = None,
    takeover: bool = False,
    look_first: LookFirst | None = None,
    link: Link | None = None,
) -> int:
    """Start or resume the run `job.name`; returns 0, or raises the RayftError that carries the exit code.

    link: through which somebody follows the run, and decides at its reports where it is gated. Outside of the main thread no signals are taken.
    """
    body = functools.partial(_run_under_lease, gated=link is not None and link.gated)
    return run_with(body, job, console=console, takeover=takeover, look_first=look_first, link=link)


def _run_under_lease(
    job: Job,
    store: Store,
    run_uri: str,
    lease: Lease,
    recorder: Any,
    console: Console,
    signals: StopSignals,
    end_before: End | None,
    *,
    gated: bool,
) -> None:
    prepared = prepare(job, run_uri, lease.owner, console.print)
    refuse_other_origin(store, job.name, prepared.origin(), end_before)
    plan = prepared.plan
    fork.begin(job, store, lease, prepared.origin(), recorder, total=plan.total_steps, end=plan.end)
    devices = table_for(prepared.plan).devices
    ray.get(recorder.event.remote("plan", devices=devices, **prepared.memory), timeout=ASK_TIMEOUT_S)
    console.print(f"data: {prepared.prompts.rows} prompts")
    driver = Driver(prepared, store, lease, recorder, console, gated=gated)
    with signals.asking(driver.ask_to_stop):
        driver.train()
    finish(prepared.plan.job, prepared.files, store, recorder)
    driver.show()


class Driver:
    """Attempts at a run, one after another, until it is done or has failed too often."""

    def __init__(
        self,
        prepared: RlPrepared,
        store: Store,
        lease: Lease,
        recorder: Any,
        console: Console,
        *,
        gated: bool = False,
    ) -> None:
        self.prepared, self.plan, self.job = prepared, prepared.plan, prepared.plan.job
        self.store, self.lease, self.recorder, self.console = store, lease, recorder, console
        self.gated = gated
        self._progress = Progress(console, self.plan.total_steps, every=self.job.log.every_steps)
        self._shown = 0
        self._notice: Notice | None = None
        #: Signals come in the main thread at any time, and nodes are looked after in another.
        self._noticing = threading.RLock()
        self._held_out: HeldOut | None = None
        if self.job.data.eval:
            self._held_out = HeldOut(prepared, store, node_cache_dir())

    def ask_to_stop(self, reason: str) -> None:
        """Save and end at the next border between phases."""
        with self._noticing:
            self._notice = Notice(reason)
            self.recorder.request_stop.remote(reason)

    def ask_to_move(self, reason: str) -> None:
        """Save at the next border between phases, and go on elsewhere."""
        with self._noticing:
            if self._notice is None:
                self._notice = Notice(reason, moving=True)
                self.recorder.request_move.remote(reason)

    def train(self) -> None:
        """To the end of the run. Raises WorkerError once processes died more than `max_failures` times, and PreemptedError where
        the run was asked to stop or nodes that were lost have not come back in time."""
        failures, lost, charged = 0, "", False
        roles = Roles(self.plan, self.recorder, self.console.print, heed=self._heed_early)
        try:
            while True:
                try:
                    with self._watching(roles):
                        return self._attempt(roles, lost)
                except (RoleDied, Moving) as error:
                    notice, lost = self._notice, getattr(error, "role", "")
                    if (
                        notice is not None and notice.moving
                    ):  # what dies with a node that is taken away is no failure either
                        with self._noticing:
                            if self._notice is notice:  # and not a wish to end that came meanwhile
                                self._notice = None
                        roles.close()
                        roles = self._elsewhere()
                        continue
                    if notice is not None:
                        raise PreemptedError(
                            f"The run was asked to stop ({notice.reason}), and {error.message}",
                            "Start it again under the same name to go on from its last checkpoint.",
                        ) from error
                    if charged and roles.began_on_a_lost_node():
                        # The cluster learns of a node's loss after the processes on it have died: still the same failure.
                        charged = False
                        message = f"{error.message} Its node was gone, which was not known yet: begun again."
                        self.recorder.event.remote("recovery", message)
                        self.show()
                        continue
                    failures, charged = failures + 1, True
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

    def _elsewhere(self) -> Roles:
        """Roles on nodes that stay. Raises PreemptedError where there is no room in time."""
        self.show()
        with self._waiting_for_others():
            return Roles(
                self.plan,
                self.recorder,
                self.console.print,
                room_s=self.job.cluster.wait_s,
                heed=self._heed_early,
            )

    @contextlib.contextmanager
    def _waiting_for_others(self) -> Iterator[None]:
        """Once a run has begun, want of room is no mistake of the job: it is resumable."""
        try:
            yield
        except ResourceError as error:
            raise PreemptedError(
                f"No nodes came in the place of those that are gone: {error.message}",
                "Start it again under the same name to go on from its last checkpoint.",
            ) from error

    @contextlib.contextmanager
    def _watching(self, roles: Roles) -> Iterator[None]:
        """Look for nodes that are taken away, in a thread: phases last longer than the notice may."""
        drains = Drains(end=self.ask_to_stop, move=self.ask_to_move)
        over = threading.Event()

        def watch() -> None:
            while not over.wait(DRAINS_EVERY_S):
                with contextlib.suppress(ray.exceptions.RayError):
                    drains.look(roles.nodes())

        thread = threading.Thread(target=watch, name="rayft-drains", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(timeout=ASK_TIMEOUT_S)

    def show(self) -> None:
        """Print rows of the log that are new."""
        try:
            rows = ray.get(self.recorder.since.remote(self._shown), timeout=ASK_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError:
            return  # a storage that stalls keeps the recorder; what is not shown now is shown later
        self._shown += len(rows)
        for row in rows:
            self._progress.row(row)

    def _attempt(self, roles: Roles, lost: str) -> None:
        skipped: list[str] = []
        lease = Lease(self.store, self.lease.owner)
        epoch, step = lease.resume(on_skip=lambda at, why: skipped.append(f"step {at}: {why}"))
        fork.refuse_lost_beginning(self.job, step)
        message = "from the base model" if step is None else f"from the checkpoint of step {step}"
        workers = self.job.cluster.max_workers
        message += f" on {workers} worker{'s' if workers > 1 else ''}"
        ray.get(
            self.recorder.begin_attempt.remote(
                epoch, step, message, workers=workers, skipped=skipped, devices=roles.devices
            ),
            timeout=ASK_TIMEOUT_S,
        )
        self.show()
        rl = self.job.rl
        state = State(KlController(rl.kl_coef or 0.0, rl.kl_target, rl.kl_horizon), epoch)
        if step is not None:
            reader = CheckpointReader(self.store, step)
            state.restore(step, reader.manifest.epoch, reader.state)
        with self._waiting_for_others() if lost else contextlib.nullcontext():
            roles.begin(epoch, step, lost)
        loop = Loop(
            self.plan,
            self.prepared.prompts,
            roles,
            state,
            self.recorder,
            self.store,
            self._heed,
            self._held_out,
            self._wait_at_gate if self.gated else None,
        )
        with self._waiting_for_others():  # roles that died in the middle of a step wait for room there
            loop.train()

    def _wait_at_gate(self, step: int) -> None:
        """Return once the report of a step is released, or the run should be left."""
        pauses, first, looked = Pauses(), True, time.monotonic()
        while self._notice is None:
            asked = self.recorder.at_gate.remote(step, first=first)
            opened, _ = ray.get(asked, timeout=FLUSH_TIMEOUT_S)
            if opened:
                return
            first = False
            if time.monotonic() - looked > HELD_EVERY_S:
                looked = time.monotonic()
                self.show()
                refuse_lost(self.lease)
            pauses.rest()

    def _heed(self) -> Notice | None:
        """Why to leave, if so; shows what is new on the way."""
        self.show()
        refuse_lost(self.lease)
        return self._notice

    def _heed_early(self) -> None:
        """Leave where that is asked for while what trains is not there yet: all there is, is in the last checkpoint. Raises Moving
        and PreemptedError."""
        drains = Drains(end=self.ask_to_stop, move=lambda _: None)
        drains.look(())  # nobody else looks while room is waited for
        if self._notice is None:
            return
        if self._notice.moving:
            self.recorder.event.remote("moving", "left before its processes were there")
            raise Moving(f"Not begun, since {self._notice.reason}.")
        raise PreemptedError(
            f"The run was asked to stop ({self._notice.reason}) before its processes were there.",
            "Start it again under the same name to go on.",
        )
