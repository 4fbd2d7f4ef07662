"""The algorithm: ask, answer, score, look back, learn; again. `train` is the loop; read it first."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NoReturn

import numpy as np
import ray

from rayft.errors import PreemptedError, RayftError, WorkerError
from rayft.learner.learner import StepResult
from rayft.learner.schedule import learning_rate
from rayft.objectives.kl import KlController
from rayft.rlhf.ahead import Ahead, keep_ahead, kept_ahead
from rayft.rlhf.experience import (
    Columns,
    experience,
    looked_back,
    score_with_rules,
    uniform_groups,
    weights_of,
)
from rayft.rlhf.finished import Interrupted, keep_finished, kept_finished
from rayft.rlhf.held_out import HeldOut
from rayft.rlhf.kept import keep_rollouts
from rayft.rlhf.layout import MiniBatch, layout_of, padding_of
from rayft.rlhf.plan import RlPlan
from rayft.rlhf.prompts import Prompt, PromptSet
from rayft.rlhf.roles import Roles
from rayft.rlhf.rollout import Rollout
from rayft.rlhf.step import Step
from rayft.storage import Store
from rayft.train.failures import Moving, diverged
from rayft.train.group import Notice


@dataclass
class State:
    """What a run knows between two steps, beside models and optimizers; part of every checkpoint.

    epoch: of the attempt; saved_epoch: of the attempt that wrote the checkpoint of `step` (0: the run begins).
    ahead: where the answers lie that were drawn for the next step already.
    """

    kl: KlController
    epoch: int = 0
    saved_epoch: int = 0
    step: int = 0
    position: int = 0
    tokens: int = 0
    ahead: str = ""

    def dump(self) -> dict[str, Any]:
        """JSON state for a checkpoint."""
        return {"position": self.position, "tokens": self.tokens, "kl_coef": self.kl.coef}

    def restore(self, step: int, saved_epoch: int, state: dict[str, Any]) -> None:
        """Take in what `dump` gave."""
        self.step, self.position, self.tokens = step, state["position"], state["tokens"]
        self.saved_epoch = saved_epoch
        self.kl.coef = state["kl_coef"]
        self.ahead = state.get("ahead", "")


class Loop:
    """One attempt at a run: from where it stands to its end, or to the first process that dies."""

    def __init__(
        self,
        plan: RlPlan,
        prompts: PromptSet,
        roles: Roles,
        state: State,
        recorder: Any,
        store: Store,
        heed: Callable[[], Notice | None],
        held_out: HeldOut | None = None,
        gate: Callable[[int], None] | None = None,
    ) -> None:
        """heed: says why to leave, if so; asked wherever the run can be left. held_out: measured as group `eval` says. gate: returns
        once the report of a step is released, or the run should be left."""
        self.plan, self.job, self.rl = plan, plan.job, plan.job.rl
        self.prompts, self.roles, self.state = prompts, roles, state
        self.recorder, self.store, self._heed = recorder, store, heed
        self.held_out, self._gate = held_out, gate
        self._saved_step, self._saving_s = state.step, 0.0
        self._told_uniform = False
        self._finished = kept_finished(store, state.step, state.saved_epoch, prompts)
        self._ahead = Ahead() if self.job.rollout.lag else None
        if self._ahead and state.ahead:
            step = kept_ahead(store, state.ahead, prompts)
            for what in ("issued", "generated"):  # what the log has of a step after the checkpoint is void
                self._tell(what, state.step + 1, step.prompts)
            self._ahead.have(step)

    def train(self) -> None:
        """The run."""
        with self._ahead or contextlib.nullcontext():
            self._train()

    def _train(self) -> None:
        job, rl, roles, state = self.job, self.rl, self.roles, self.state
        if state.step == 0 and job.eval.before:
            roles.suites("before", 0)
            self._measure_held_out()
        while self._more(state.step, state.position):
            if state.step and self.job.eval.every_steps and state.step % self.job.eval.every_steps == 0:
                self._measure_held_out()
                self._wait_at_gate()
            began = time.perf_counter()
            with self._may_be_left():
                step = self._next()
            if not step.answers.rollouts:  # what is left of the epoch was dropped
                self._keep_dropped(step, state.step + 1)
                self.recorder.row.remote({"kind": "ledger", "step": state.step + 1, **step.ledger})
                break
            if self._heed() and not self._ahead:  # one that runs ahead has taken the answers already
                self._leave()
            rollouts, count = step.answers.rollouts, len(step.answers.rollouts)
            lengths = [rollout.length for rollout in rollouts]
            layout = layout_of(rollouts, self.plan, ranks=len(roles.policy), step=state.step)
            step.padding = padding_of(layout, lengths, packed=self.plan.packed)
            with self._may_be_left(), step.timed("scoring"):
                roles.take(rollouts, layout)
                old = None if self.plan.one_pass else roles.old_logprobs(count)
                reference = roles.reference_logprobs(count)
                values = roles.values(count)
            columns, metrics = experience(
                rollouts, step.answers.scores_S, old, reference, values, job, state.kl.coef
            )
            columns["weights"] = weights_of(rollouts, layout, job)
            self._tell_uniform(metrics)
            rate = learning_rate(job.train, self._progress(), self.plan.total_steps)
            critic_rate = (
                rate * (rl.critic_learning_rate or job.train.learning_rate) / job.train.learning_rate
            )
            results: list[StepResult] = []
            critic_results: list[StepResult] = []
            with step.timed("update"):
                for number in [n for _ in range(rl.num_epochs or 1) for n in range(len(layout))]:
                    if result := roles.update_critic(number, columns, critic_rate):
                        critic_results.append(self._checked(result, columns, layout[number]))
                    if state.step >= rl.critic_warmup_steps:
                        result = roles.update_policy(number, columns, rate, state.kl.coef)
                        results.append(self._checked(result, columns, layout[number]))
            if old is None:
                looked = looked_back(rollouts, roles.seen_logprobs(count), reference, job, state.kl.coef)
                columns, metrics = columns | looked[0], metrics | looked[1]
            if "kl" in metrics and results:
                state.kl.update(metrics["kl"], count)
            state.step, state.position = state.step + 1, step.next_position
            state.tokens += sum(lengths)
            with step.timed("dump"):
                keep_rollouts(self.store, "step", state.step, step.answers, columns)
                self._keep_dropped(step, state.step)
            self._record(step, lengths, metrics, results, critic_results, rate, time.perf_counter() - began)
            self._finished.clear()
            leave = self._heed()
            if state.step % self.plan.checkpoint_every == 0 or not self._more(state.step, state.position):
                self._save()
            if leave:
                self._leave()
        if state.step > self._saved_step:  # the epoch ended before the step that was planned as the last
            self._save()
        self._finish_saving()
        roles.suites("after", state.step)
        self._measure_held_out()

    # -- the parts of the loop ---------------------------------------------------------------------------------

    def _more(self, step: int, position: int) -> bool:
        """Whether there are steps to take after so many: up to a number of steps, or up to a position, to which a run that began as
        another one's fork may come in fewer or more steps."""
        return step < self.plan.total_steps if self.plan.end is None else position < self.plan.end

    @contextlib.contextmanager
    def _may_be_left(self) -> Iterator[None]:
        """Around what lies between the last update of a step and the first of the next, where the state is that of a whole step: it is
        saved where the run should leave, or where something cannot be had. One step behind, what has been drawn is not given up."""
        try:
            with contextlib.nullcontext() if self._ahead else self.roles.heeding(self._leaving):
                yield
        except Interrupted:
            self._leave()
        except RayftError as error:
            if not isinstance(error, WorkerError):  # of a process that died nothing can be saved
                self._keep_what_is_there()
            raise

    def _wait_at_gate(self) -> None:
        """Until whoever decides on the run has seen what was measured; leaves where the run should stop."""
        if self._gate is None:
            return
        if self.state.step > self._saved_step:
            self._save()
        self._finish_saving()
        self._gate(self.state.step)
        if self._heed():
            self._leave()

    def _next(self) -> Step:
        """The answers of the step, by the newest weights; or, one behind, those drawn while the last step trained, and the next
        step's are begun."""
        began = time.perf_counter()
        if self._ahead and self._ahead.begun:
            self._ahead.look()
            # Here, with these answers, and not after a whole step and what is drawn beside it.
            if self._heed():
                raise Interrupted
        drawn = self._ahead.take() if self._ahead and self._ahead.begun else None
        waited = time.perf_counter() - began
        sync = self._sync()
        number = self.state.step + 1
        step = drawn or self._answers(number, self.state.position)
        if self._ahead and self._more(number, step.next_position):
            self._ahead.begin(partial(self._last_answers, number + 1, step.next_position))
        elif not drawn:
            self.roles.answered()
        if drawn:
            step.ahead, step.seconds = step.seconds, {"waiting": waited}
        step.sync |= sync
        # A fork of a run's last checkpoint begins without answers, which it has not drawn.
        wanted = max(0, self.state.step - self.job.rollout.lag) if drawn else self.state.step
        assert all(rollout.version == wanted for rollout in step.answers.rollouts), (
            f"answers are not of version {wanted}"
        )
        return step

    def _measure_held_out(self) -> None:
        if self.held_out is None:
            return
        given = self.held_out.given() if self.state.step == 0 else None
        with self._may_be_left():  # the next start measures it first
            if self._ahead and self._ahead.begun:
                self._ahead.look()  # the engines are not free before
            began = time.perf_counter()
            with self.roles.heeding(self._leaving):
                metrics = given or self.held_out.measure(self.roles, self.state.step, self._leaving)
        row = {
            "kind": "eval",
            "step": self.state.step,
            "rows": len(self.held_out.prompts),
            "too_long": self.held_out.too_long,
            "metrics": metrics,
        }
        took = {} if given else {"took_s": round(time.perf_counter() - began, 3)}
        self.recorder.row.remote(row | took)

    def _sync(self) -> dict[str, float]:
        began = time.perf_counter()
        took = self.roles.sync(self.state.step)
        return took | {"seconds": time.perf_counter() - began} if took else {}

    def _answers(self, number: int, position: int) -> Step:
        """Prompts from a position on, answers and scores of a step; with others in the place of prompts that teach nothing, if so
        asked."""
        wanted = self.job.train.global_batch_size or 1
        step, issued = Step(position), []
        for refill in range(1 + self.rl.max_refills):
            missing = wanted - len(step.ledger["trained"])
            taken = self.prompts.take(step.next_position, missing, self.plan.end)
            step.next_position = taken.next_position
            step.ledger["too_long"] += taken.too_long
            if not taken.prompts:
                break
            issued += [prompt.row for prompt in taken.prompts]
            self._tell("issued", number, issued)
            with step.timed("generation"):
                rollouts = self._drawn(taken.prompts)
            with step.timed("reward"):
                scores_S, by_source = self.roles.score(rollouts)
            scores_S = score_with_rules(rollouts, scores_S, self.job)
            kept_P = np.ones(len(taken.prompts), np.bool_)
            if self.rl.drop_uniform_groups and refill < self.rl.max_refills:
                kept_P = ~uniform_groups(scores_S, self.job)
            for prompt, kept in zip(taken.prompts, kept_P, strict=True):
                step.ledger["trained" if kept else "uniform"].append(prompt.row)
            kept_S = np.repeat(kept_P, self.rl.num_generations or 1)
            step.answers.add(rollouts, scores_S, by_source, kept_S)
            step.dropped.add(rollouts, scores_S, by_source, ~kept_S)
            if kept_P.all():
                break
        self._tell("generated", number, issued)
        return step

    def _last_answers(self, number: int, position: int) -> Step:
        """`_answers`, the last by these weights."""
        step = self._answers(number, position)
        self.roles.answered()
        return step

    def _tell(self, what: Literal["issued", "generated"], number: int, rows: Sequence[int]) -> None:
        """How far the prompts of a step have come, for the log; what became of them stands in its ledger."""
        if rows:  # else the epoch has ended before it
            self.recorder.row.remote({"kind": what, "step": number, "prompts": list(rows)})

    def _keep_dropped(self, step: Step, number: int) -> None:
        if step.dropped.rollouts:
            keep_rollouts(self.store, "dropped", number, step.dropped, {})

    def _drawn(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """Answers to the prompts. One step behind they are drawn to the end, since the weights that draw them are not kept."""
        if self._ahead:
            return self.roles.generate(prompts)
        return self.roles.generate(prompts, finished=self._finished, leave=self._leaving)

    def _leaving(self) -> bool:
        return self._heed() is not None

    def _progress(self) -> float:
        """Steps that are done. In epochs it follows the position, since how many prompts are dropped is not known yet."""
        rows = self.job.train.global_batch_size
        return self.state.position / rows if rows and self.plan.end is not None else self.state.step

    def _checked(self, result: StepResult, columns: Columns, mini_batch: MiniBatch) -> StepResult:
        """The result with metrics that are means: of the loss's weights, which need not add up to 1."""
        total = float(sum(columns["weights"][i].sum() for i in mini_batch.answers))
        means = {name: value / total if total else 0.0 for name, value in result.metrics.items()}
        limit = self.job.train.max_loss
        if limit and result.loss > limit:
            raise diverged(self.state.step, f"the loss {result.loss:.4g} exceeds train.max_loss {limit:g}")
        if not result.applied or result.loss != result.loss:
            what = f"the loss is {result.loss:.4g} and the gradient norm {result.grad_norm:.4g}"
            raise diverged(self.state.step, what)
        return replace(result, metrics=means)

    def _tell_uniform(self, metrics: dict[str, float]) -> None:
        """Once an attempt: a reward that never tells answers apart would go unnoticed."""
        if metrics.get("uniform_groups") == 1.0 and not self._told_uniform:
            self._told_uniform = True
            message = (
                f"step {self.state.step + 1}: the answers to each prompt all have the same reward, so the step learns nothing from "
                "rewards. Look at `rayft rollouts`; more rl.num_generations, a higher rollout.temperature or a reward in degrees help."
            )
            self.recorder.event.remote("warning", message)

    def _record(
        self,
        step: Step,
        lengths: Sequence[int],
        metrics: dict[str, float],
        results: Sequence[StepResult],
        critic_results: Sequence[StepResult],
        rate: float,
        seconds: float,
    ) -> None:
        for result in (results[0] if results else None, critic_results[0] if critic_results else None):
            metrics = metrics | (result.metrics if result else {})
        if len(results) > 1:
            metrics["moved"] = results[-1].metrics["moved"]
            metrics["clip_fraction"] = float(np.mean([result.metrics["clip_fraction"] for result in results]))
        metrics |= {f"score/{name}": float(scores.mean()) for name, scores in step.answers.by_source.items()}
        shown = [*results, *critic_results]
        seconds_by_phase = step.seconds | {"checkpoint": self._saving_s}
        self._saving_s = 0.0
        answered = sum(len(rollout.ids) for rollout in step.answers.rollouts)
        row = {
            "kind": "step",
            "step": self.state.step,
            "position": self.state.position,
            "loss": float(np.mean([result.loss for result in (results or shown)])),
            "grad_norm": float(np.max([result.grad_norm for result in (results or shown)])),
            "learning_rate": rate,
            "rows": len(step.ledger["trained"]),
            "answers": len(step.answers.rollouts),
            "tokens": sum(lengths),
            "trained_tokens": answered,
            "tokens_per_s": sum(lengths) / seconds,
            "trained_tokens_per_s": answered / seconds,
            "padding": round(step.padding, 4),
            "seconds": {name: round(value, 4) for name, value in seconds_by_phase.items()},
            "ahead_seconds": {name: round(value, 4) for name, value in step.ahead.items()},
            "sync": {name: round(value, 6) for name, value in step.sync.items()},
            "peak_memory_gb": self.roles.peak_memory_gb(),
            "metrics": metrics,
        }
        self.recorder.row.remote(row)
        self.recorder.row.remote({"kind": "ledger", "step": self.state.step, **step.ledger})

    def _save(self) -> None:
        """The rows up to this step are made durable first: whoever resumes from the checkpoint has the log before it."""
        began = time.perf_counter()
        ray.get(self.recorder.flush.remote(), timeout=self.roles.timeout_s)
        state = self.state.dump()
        if self._ahead and self._ahead.begun:
            state["ahead"] = keep_ahead(self.store, self.state.step, self._ahead.look())
        self._tell_commit(self.roles.save(self.state.step, state))
        self._saved_step, self.state.saved_epoch = self.state.step, self.state.epoch
        self._saving_s = time.perf_counter() - began

    def _finish_saving(self) -> None:
        self._tell_commit(self.roles.finish_saving())

    def _tell_commit(self, step: int | None) -> None:
        if step is not None:
            self.recorder.event.remote("checkpoint", f"step {step} is committed", step=step)

    def _keep_what_is_there(self) -> None:
        """Save the last whole step where what comes after it cannot be had, such as a reward; that it cannot be is what is told."""
        with contextlib.suppress(RayftError, ray.exceptions.RayError):
            # One step behind, a checkpoint without the answers that could not be had would go on otherwise.
            if (self._ahead is None or self._ahead.there) and self.state.step > self._saved_step:
                self._save()
            self._finish_saving()
            if self._finished and self.state.saved_epoch:
                keep_finished(self.store, self.state.step, self.state.saved_epoch, self._finished)

    def _leave(self) -> NoReturn:
        """Save what is not saved, with the answers that are there for the next step, and say why."""
        notice = self._heed()
        assert notice is not None
        if self.state.step > self._saved_step:
            self._save()
        self._finish_saving()
        if not self.state.saved_epoch:
            self._finished.clear()  # before the first checkpoint the job may still be corrected, and would draw others
        if self._finished:
            keep_finished(self.store, self.state.step, self.state.saved_epoch, self._finished)
        where = f"step {self.state.step}"
        if self._finished:
            where += f", with {len(self._finished)} answers of the next"
        if notice.moving:
            self.recorder.event.remote("moving", f"saved at {where}")
            raise Moving(f"Saved at {where}, since {notice.reason}.")
        raise PreemptedError(
            f"The run was asked to stop ({notice.reason}) and is saved at {where}.",
            "Start it again under the same name to go on.",
        )
