"""What runs on every rank: set up, resume, train, evaluate, checkpoint. `train` is the loop; read it first."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import ray
import torch
import torch.distributed as dist

from rayft.checkpoint import CheckpointReader, CheckpointWriter, Lease
from rayft.data.corpus import NoMoreShards
from rayft.data.step import MicroBatch, StepPlan, plan_step
from rayft.errors import PreemptedError, RayftError, StorageError
from rayft.learner.learner import StepResult
from rayft.learner.schedule import learning_rate
from rayft.model.files import job_files, load_tokenizer
from rayft.storage import node_cache_dir, open_store
from rayft.train import setup
from rayft.train.account import placing_s
from rayft.train.evaluate import EarlyStopping, evaluation_loss, evaluation_steps, measure_suites
from rayft.train.failures import Moving, diverged
from rayft.train.fork import refuse_lost_beginning
from rayft.train.group import NO_MORE_SHARDS, Notice, RunPlan
from rayft.train.link import Pauses
from rayft.train.reference import compute_references
from rayft.train.retention import Retention

ASK_TIMEOUT_S = 60.0
BEAT_EVERY_S = 5.0
#: Rows wait for an object store as long as its own retries take.
FLUSH_TIMEOUT_S = 600.0


class Abandoned(Exception):
    """What is under way is given up, since the ranks should leave: a step whose gradients are half summed, or an evaluation."""


class Worker:
    """One rank of a run."""

    def __init__(self, plan: RunPlan, recorder: Any) -> None:
        self.plan, self.job, self.recorder = plan, plan.job, recorder
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        #: For what ranks agree on beside the GPUs; None where the usual group is on the CPU itself.
        self.control = dist.new_group(backend="gloo") if dist.get_backend() != "gloo" else None
        self.attempt = 0
        self.step, self.position = 0, 0
        self.tokens = self.trained_tokens = 0
        self.saving_s, self.saved_step = 0.0, 0
        #: Whether the loss on held-out rows is still to be measured at this step.
        self.unmeasured = False
        self.notice: Notice | None = None
        self._pending_beat: Any = None
        setup.use_threads(self.job)
        self.store = open_store(plan.run_uri)
        self._begin_attempt()
        files = job_files(self.job, node_cache_dir())
        self.tokenizer = load_tokenizer(files, self.job.model)
        self.learner = setup.build_learner(plan, files, setup.pad_id_of(self.tokenizer))
        self.corpus = setup.open_corpus(plan, plan.train_spec, self._waiting_for_data)
        self.order = setup.order_of(plan)
        self.stopping = EarlyStopping(self.job.train)
        if self.job.method == "dpo" and self.job.dpo.needs_reference:
            self._look_at_the_reference()
        if self.resumed_step is not None:
            self._resume()
        self.writer = CheckpointWriter(
            self.store,
            self.epoch,
            self.rank,
            self.world_size,
            backlog=self.job.checkpoint.backlog,
            # Touching fresh memory is what makes a first save slow, so its buffer is made before training.
            reserve_bytes=sum(fragment.data.nbytes for fragment in self.learner.fragments()),
            timeout_s=self.job.checkpoint.commit_timeout_s,
        )
        self.retention = Retention(
            self.store, self.writer, self.job.checkpoint.keep, self.epoch, self._cleanup_failed
        )

    def train(self) -> None:
        """The run, from where it stands to its end."""
        if self.step == 0 and self.job.eval.before:
            self._suites("before")
        if self.unmeasured:  # the start before left in the middle of it
            self._evaluate()
            if self._agree_to_leave():
                self._leave()
        while self._more() and not self.stopping.stop:
            if self._at_report():
                self._wait_at_gate()
            started = time.perf_counter()
            try:
                step_plan = self._plan_step()
            except NoMoreShards:
                self._leave()
            if step_plan.rows == 0:
                break  # what is left of the epoch was dropped
            rate = self._learning_rate()
            setup.seed_step(self.job.seed, self.step, self.rank)
            planned = time.perf_counter()
            objective = self.learner.objective
            objective.begin_step(self.learner.infer, self.corpus, step_plan, self.rank)
            try:
                result = self.learner.step(
                    self._batches(step_plan.micro_batches[self.rank]), objective.denominator(step_plan), rate
                )
            except Abandoned:
                self._leave()
            self.step, self.position = self.step + 1, step_plan.next_position
            self.tokens += step_plan.tokens
            self.trained_tokens += step_plan.trained_tokens
            self._refuse_divergence(result)
            self.unmeasured = self._due(self.job.eval.every_steps)
            if self.unmeasured:
                self._evaluate()
            leave = self._agree_to_leave()
            result.seconds |= {"data": planned - started, "checkpoint": self.saving_s}
            self._record(step_plan, result, rate, time.perf_counter() - started)
            if (
                self.stopping.stop
                or self._due(self.plan.checkpoint_every)
                or self._at_report()
                or not self._more()
            ):
                self._save()
            if leave:
                self._leave()
        if self.step > self.saved_step:
            self._save()
        self._finish_saving()
        self._suites("after")
        self.learner.close()

    # -- the parts of the loop ---------------------------------------------------------------------------------

    def _more(self) -> bool:
        """Whether there are steps to take: up to a number of steps, or up to a position, to which a run that began as another one's
        fork may come in fewer or more steps."""
        end = self.plan.end
        return self.step < self.plan.total_steps if end is None else self.position < end

    def _at_report(self) -> bool:
        """Whether the run must not go on beyond this step before whoever decides on it has seen what was measured."""
        return self.plan.gated and self.step > 0 and self._due(self.job.eval.every_steps)

    def _wait_at_gate(self) -> None:
        """Until the report of this step is released; leaves where the run should stop. It may take long, as others may have to report
        first. It ends with the driver, whose death ends the recorder and the ranks."""
        self._finish_saving(last=False)
        pauses, first, beaten = Pauses(), True, -math.inf
        while True:
            if time.monotonic() - beaten > BEAT_EVERY_S:
                beaten = time.monotonic()
                self._beat("gate")
            opened = False
            if self.rank == 0:
                asked = self.recorder.at_gate.remote(self.step, first=first)
                opened, notice = ray.get(asked, timeout=FLUSH_TIMEOUT_S)
                self.notice, first = notice or self.notice, False
            if self._agree_to_leave():
                self._leave()
            if setup.agree(opened, torch.device("cpu"), self.control):
                return
            pauses.rest()

    def _agree_to_leave(self, *, at_once: bool = False) -> bool:
        """Whether any rank has heard that they should; at_once: before the step is done, which a shard that cannot be made does
        not ask for. On the CPU, so that no GPU waits for the answer; a collective."""
        wanted = self.notice is not None and not (at_once and self.notice.reason == NO_MORE_SHARDS)
        return setup.agree(wanted, torch.device("cpu"), self.control)

    def _refuse_to_go_on(self) -> None:
        """Raise Abandoned where the ranks should leave at once; a collective."""
        if self._agree_to_leave(at_once=True):
            raise Abandoned

    def _leave(self) -> NoReturn:
        """Save what is not saved, and leave together: rank 0 commits last, and Ray ends the group with its first rank."""
        heard = [notice for notice in setup.gather(self.notice) if notice is not None]
        notice = min(heard, key=lambda one: one.moving, default=Notice("no more data"))
        if self.step > self.saved_step:
            self._save()
        self._finish_saving()
        dist.barrier()
        if notice.moving:
            self._tell("forget_ranks")
            raise Moving(f"Saved at step {self.step}, since {notice.reason}.")
        raise PreemptedError(
            f"The run was asked to stop ({notice.reason}) and is saved at step {self.step}.",
            "Start it again under the same name to go on.",
        )

    def _waiting_for_data(self) -> bool:
        """Whether to give up. All ranks plan the same step, so all wait for the same shard, and all hear this."""
        self._beat("data")
        return self.notice is not None and self.notice.reason == NO_MORE_SHARDS

    def _plan_step(self) -> StepPlan:
        return plan_step(
            self.corpus,
            self.order,
            self.position,
            data=self.job.data,
            train=self.job.train,
            packed=self.plan.packed,
            world_size=self.world_size,
            end=self.plan.end,
            together=self.learner.objective.together,
        )

    def _batches(self, micro_batches: list[MicroBatch]) -> Iterator[dict[str, Any]]:
        """Tensors of this rank's micro-batches, with a sign of life at each. Raises Abandoned between two where the ranks should
        leave: the state of the last step is whole, and nodes that are taken away do not wait for this one."""
        for number, micro_batch in enumerate(micro_batches):
            self._beat("train")
            if number:
                self._refuse_to_go_on()
            yield self.learner.objective.collate(self.corpus, micro_batch)
        self._beat("train")

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _refuse_divergence(self, result: StepResult) -> None:
        limit = self.job.train.max_loss
        if not result.applied or result.loss != result.loss:
            raise diverged(
                self.step, f"the loss is {result.loss:.4g} and the gradient norm {result.grad_norm:.4g}"
            )
        if limit and result.loss > limit:
            raise diverged(self.step, f"the loss {result.loss:.4g} exceeds train.max_loss {limit:g}")

    def _evaluate(self) -> None:
        """Measure the loss on held-out rows; it is left for the next start where the ranks should leave meanwhile, since the step
        before it is whole and nodes that are taken away do not wait."""
        assert self.plan.eval_spec is not None
        self._beat("evaluate")
        began = time.perf_counter()
        try:
            with self._beating("evaluate"):
                loss, count, metrics = evaluation_loss(
                    self.plan, self.learner, self.rank, self.world_size, self._between_evaluations
                )
        except Abandoned:
            why = f"the evaluation at step {self.step} is given up; the next start begins with it"
            self._tell("event", "unmeasured", why, step=self.step)
            return
        self.unmeasured = False
        self.stopping.seen(loss)
        unit = "tokens" if self.job.method == "sft" else "rows"
        row = {"kind": "eval", "step": self.step, "loss": loss, unit: count, "metrics": metrics}
        self._tell("row", row | {"took_s": round(time.perf_counter() - began, 3)})
        if self.stopping.stop:
            self._tell(
                "event",
                "early_stop",
                f"no better evaluation loss than {self.stopping.best:.4f} for {self.stopping.bad} evaluations",
                step=self.step,
            )

    def _between_evaluations(self) -> None:
        self._beat("evaluate")
        self._refuse_to_go_on()

    def _suites(self, when: str) -> None:
        self._beat("evaluate")
        with self._beating("evaluate"):
            measure_suites(self, when)

    def _save(self) -> None:
        """Hand the state to the writer; a checkpoint that failed before surfaces here.

        The rows up to this step are made durable first: whoever resumes from the checkpoint has the log before it.
        """
        self._beat("checkpoint")
        began = time.perf_counter()
        state = {
            "position": self.position,
            "optimizer_step": self.learner.optimizer_step(),
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "stopping": self.stopping.state(),
            "unmeasured": self.unmeasured,
        }
        try:
            if self.rank == 0:
                ray.get(self.recorder.flush.remote(), timeout=FLUSH_TIMEOUT_S)
            self.writer.save(self.step, self.learner.fragments(), state)
            self.saved_step = self.step
        except StorageError as error:
            self._checkpoint_failed(error)
        self._look_at_commits()
        self.saving_s = time.perf_counter() - began

    def _finish_saving(self, *, last: bool = True) -> None:
        self._beat("checkpoint")
        try:
            self.writer.wait()
        except StorageError as error:
            self._checkpoint_failed(error, last=last)
        self._look_at_commits()
        self.retention.wait()

    def _look_at_commits(self) -> None:
        if self.rank == 0 and (committed := self.retention.look()) is not None:
            took_s = round(self.writer.last_took_s, 3)
            self._tell("event", "checkpoint", f"step {committed} is committed", step=committed, took_s=took_s)

    def _checkpoint_failed(self, error: StorageError, *, last: bool = False) -> None:
        if self.job.checkpoint.on_failure == "stop" or last:
            raise error
        self.recorder.event.remote(
            "failure", f"a checkpoint failed, training goes on: {error.message}", step=self.step
        )

    def _cleanup_failed(self, error: Exception) -> None:
        self.recorder.event.remote("failure", f"old checkpoints could not be deleted: {error}")

    def _learning_rate(self) -> float:
        """The next step's. In epochs of rows it follows the position, since how many are dropped is not known yet."""
        rows = self.job.train.global_batch_size
        step = self.position / rows if rows and self.plan.end is not None else self.step
        return learning_rate(self.job.train, step, self.plan.total_steps)

    def _record(self, step_plan: StepPlan, result: StepResult, rate: float, seconds: float) -> None:
        peaks = setup.gather(self.learner.peak_memory_gb())
        row = {
            "kind": "step",
            "step": self.step,
            "position": self.position,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": rate,
            "rows": step_plan.rows,
            "tokens": step_plan.tokens,
            "trained_tokens": step_plan.trained_tokens,
            "tokens_per_s": step_plan.tokens / seconds,
            "trained_tokens_per_s": step_plan.trained_tokens / seconds,
            "padding": step_plan.padding,
            "seconds": {name: round(value, 4) for name, value in result.seconds.items()},
            "peak_memory_gb": peaks,
            "metrics": result.metrics,
        }
        self.saving_s = 0.0
        self._tell("row", row)
        self._look_at_commits()

    # -- start and resume --------------------------------------------------------------------------------------

    def _begin_attempt(self) -> None:
        """Rank 0 opens an epoch of the lease and picks the checkpoint; all ranks learn both."""
        skipped: list[str] = []
        chosen: Any = None
        if self.rank == 0:
            try:
                lease = Lease(self.store, self.plan.owner)
                epoch, step = lease.resume(on_skip=lambda at, why: skipped.append(f"step {at}: {why}"))
                refuse_lost_beginning(self.job, step)
                message = "from the base model" if step is None else f"from the checkpoint of step {step}"
                message += f" on {self.world_size} worker{'s' if self.world_size > 1 else ''}"
                attempt = ray.get(
                    self.recorder.begin_attempt.remote(
                        epoch,
                        step,
                        message,
                        workers=self.world_size,
                        skipped=skipped,
                        placing_s=placing_s(),
                    ),
                    timeout=ASK_TIMEOUT_S,
                )
                chosen = (epoch, step, attempt)
            except RayftError as error:
                chosen = error
        chosen = setup.share(chosen)
        if isinstance(chosen, RayftError):
            raise chosen
        self.epoch, self.resumed_step, self.attempt = chosen
        self._beat("load")

    def _look_at_the_reference(self) -> None:
        """Now, while the model is what the run starts from, whatever checkpoint it may take in afterwards."""
        position = 0
        if self.resumed_step is not None:
            position = CheckpointReader(self.store, self.resumed_step).state["position"]
        began = time.perf_counter()
        with self._beating("reference"):
            computed = compute_references(
                self.learner, self.corpus, self._steps_from(position), self.rank, setup.gather
            )
            if self.plan.eval_spec is not None:
                corpus = setup.open_corpus(self.plan, self.plan.eval_spec)
                steps = evaluation_steps(self.plan, corpus, self.world_size, self.learner.objective.together)
                computed += compute_references(self.learner, corpus, steps, self.rank, setup.gather)
        if computed:
            seconds = time.perf_counter() - began
            self._tell("event", "reference", f"{computed} log-probabilities computed in {seconds:.0f} s")

    def _steps_from(self, position: int) -> Iterator[StepPlan]:
        """The steps that are left, as training will plan them."""
        done, self.position = self.position, position
        steps = (
            range(self.resumed_step or 0, self.plan.total_steps)
            if self.plan.end is None
            else itertools.count()
        )
        try:
            for _ in steps:
                step = self._plan_step()
                if step.rows == 0:
                    return
                yield step
                self.position = step.next_position
        finally:
            self.position = done

    def _resume(self) -> None:
        # The node's copy of a remote checkpoint, for all its ranks and only until they have loaded it.
        reader = CheckpointReader(self.store, self.resumed_step, cache_dir=node_cache_dir())
        state = reader.state
        self.learner.load(reader, state["optimizer_step"])
        dist.barrier()
        reader.discard_copies()
        self.step, self.position = reader.manifest.step, state["position"]
        self.saved_step = self.step
        self.tokens, self.trained_tokens = state["tokens"], state["trained_tokens"]
        self.stopping.restore(state["stopping"])
        self.unmeasured = state.get("unmeasured", False) and self._due(self.job.eval.every_steps)

    # -- talking to the recorder -------------------------------------------------------------------------------

    def _tell(self, method: str, *args: Any, **kwargs: Any) -> None:
        if self.rank == 0:
            getattr(self.recorder, method).remote(*args, **kwargs)

    @contextlib.contextmanager
    def _beating(self, phase: str) -> Iterator[None]:
        """A sign of life every few seconds in which the model computes something, whoever calls it."""
        last = time.monotonic()

        def beat(*_: Any) -> None:
            nonlocal last
            if time.monotonic() - last > BEAT_EVERY_S:
                last = time.monotonic()
                self._beat(phase)

        hook = self.learner.module.register_forward_pre_hook(beat)
        try:
            yield
        finally:
            hook.remove()

    def _beat(self, phase: str) -> None:
        """A sign of life; picks up the answer to an earlier one without waiting for it."""
        if self._pending_beat is not None and ray.wait([self._pending_beat], timeout=0)[0]:
            self.notice = ray.get(self._pending_beat) or self.notice
            self._pending_beat = None
        state = {
            "phase": phase,
            "step": self.step,
            "pid": os.getpid(),
            "node": ray.get_runtime_context().get_node_id(),
        }
        answer = self.recorder.beat.remote(self.rank, self.attempt, state)
        self._pending_beat = self._pending_beat or answer
