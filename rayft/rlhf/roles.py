"""The roles of a run: which groups of processes there are, and each phase of a step as one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray
from ray.util.placement_group import remove_placement_group

from rayft.learner.learner import StepResult
from rayft.rlhf.actors import CriticActor, PolicyActor, ReferenceActor
from rayft.rlhf.experience import Columns, MiniBatch
from rayft.rlhf.group import Call, Group, place, reserve, wait
from rayft.rlhf.plan import RlPlan
from rayft.rlhf.prompts import Prompt
from rayft.rlhf.rewards import RewardActor, RewardError
from rayft.rlhf.rollout import Rollout, collect, units_of
from rayft.train.group import worker_environment

#: Loading a model, generating and measuring may take long without being stuck.
SLOW_S = 1800.0


class Roles:
    """Policy, critic, reference and rewards of a run, on a cluster."""

    def __init__(self, plan: RlPlan, recorder: Any, say: Callable[[str], None]) -> None:
        self.plan, self.job, self.recorder = plan, plan.job, recorder
        self.timeout_s = max(SLOW_S, self.job.cluster.hang_timeout_s)
        self._reserved = reserve(self.job.cluster, self.job.cluster.start_timeout_s, say)
        self._groups: list[Group] = []
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        roles = 1 + (self.plan.critic is not None) + (self.plan.reference == "group") + len(self.job.rewards)
        share = self.job.cluster.gpus_per_worker / roles
        size = self.job.cluster.max_workers
        environment = worker_environment(self.job, self.plan.stage)

        def models(role: str, actor: Any) -> Group:
            made = [
                place(actor, self._reserved, rank, environment, share, self.plan, rank, size)
                for rank in range(size)
            ]
            self._groups.append(Group(role, made))
            return self._groups[-1]

        self.policy = models("policy", PolicyActor)
        self.critic = models("critic", CriticActor) if self.plan.critic else None
        self.reference = models("reference", ReferenceActor) if self.plan.reference == "group" else None
        self.rewards: dict[str, Group] = {}
        for number, source in enumerate(self.job.rewards):
            bundle = number % size
            actor = place(
                RewardActor, self._reserved, bundle, environment, share, source, self.job.cluster.threads
            )
            self.rewards[source.name] = Group(f"reward {source.name}", [actor])
            self._groups.append(self.rewards[source.name])

    def build(self, epoch: int, resumed_step: int | None) -> None:
        """Have every role load its model, and policy and critic a checkpoint if there is one."""
        for group in self._models():
            [[address]] = wait([group.start_first("address")], self.timeout_s)
            group.call("join", address, timeout_s=self.timeout_s)
        building = [self.policy.start("build", epoch, self.recorder)]
        building += [self.critic.start("build", epoch, self.recorder)] if self.critic else []
        building += [self.reference.start("build")] if self.reference else []
        wait([*building, *(group.start("load") for group in self.rewards.values())], self.timeout_s)
        if resumed_step is not None:
            wait([group.start("load", resumed_step) for group in self._learners()], self.timeout_s)

    def _models(self) -> list[Group]:
        return [group for group in (self.policy, self.critic, self.reference) if group is not None]

    def _learners(self) -> list[Group]:
        return [group for group in (self.policy, self.critic) if group is not None]

    # -- the phases of a step ----------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[Prompt], version: int) -> list[Rollout]:
        """Answers to the prompts, `num_generations` to each, by weights of `version`."""
        num_generations, size = self.job.rl.num_generations or 1, len(self.policy)
        units = units_of(prompts, num_generations, self.job.rollout.unit_prompts, self.job.seed)
        dealt = [units[rank::size] for rank in range(size)]
        [answers] = wait([self.policy.start_each("generate", dealt)], self.timeout_s)
        by_unit = {
            unit.number: drawn
            for own, made in zip(dealt, answers, strict=True)
            for unit, drawn in zip(own, made, strict=True)
        }
        flat = [pair for unit in units for pair in by_unit[unit.number]]
        return collect(prompts, num_generations, [d for d, _ in flat], [text for _, text in flat], version)

    def score(self, rollouts: Sequence[Rollout]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The weighted sum of all sources' scores, float64[S], and each source's."""
        contents = [rollout.prompt.content for rollout in rollouts]
        texts = [rollout.text for rollout in rollouts]
        names = sorted({name for rollout in rollouts for name in rollout.prompt.columns})
        columns = {name: [rollout.prompt.columns.get(name) for rollout in rollouts] for name in names}
        asked = {
            name: group.start_first("score", contents, texts, columns) for name, group in self.rewards.items()
        }
        found = {}
        for source in self.job.rewards:
            late = RewardError(
                f"The reward {source.name} gave no scores for {len(rollouts)} answers within {source.timeout_s:g} s.",
                "Make it faster, or raise its timeout_s.",
            )
            [[scores]] = wait([asked[source.name]], source.timeout_s, late)
            found[source.name] = np.array(scores, np.float64)
        total = sum(
            (source.weight * found[source.name] for source in self.job.rewards), np.zeros(len(rollouts))
        )
        return total, found

    def take(self, rollouts: Sequence[Rollout], mini_batches: Sequence[MiniBatch]) -> None:
        """Give every model the answers of the step."""
        examples = ray.put([rollout.example for rollout in rollouts])
        layout = ray.put(list(mini_batches))
        wait([group.start("take", examples, layout) for group in self._models()], self.timeout_s)

    def old_logprobs(self, count: int) -> list[np.ndarray]:
        """The policy's log-probabilities of the answers' tokens, before the step's updates."""
        return _in_order(self.policy.call("logprobs", timeout_s=self.timeout_s), count)

    def reference_logprobs(self, count: int) -> list[np.ndarray] | None:
        """The reference's, or None without one."""
        if self.plan.reference is None:
            return None
        if self.reference is not None:
            return _in_order(self.reference.call("logprobs", timeout_s=self.timeout_s), count)
        return _in_order(self.policy.call("logprobs", reference=True, timeout_s=self.timeout_s), count)

    def values(self, count: int) -> list[np.ndarray] | None:
        """The critic's values, or None without one."""
        return _in_order(self.critic.call("values", timeout_s=self.timeout_s), count) if self.critic else None

    def update_critic(self, number: int, columns: Columns, learning_rate: float) -> StepResult | None:
        """One update of the critic, if there is one."""
        if self.critic is None:
            return None
        wanted = {name: columns[name] for name in ("old_values", "returns", "weights")}
        result: StepResult = self.critic.call(
            "update", number, ray.put(wanted), learning_rate, timeout_s=self.timeout_s
        )[0]
        return result

    def update_policy(
        self, number: int, columns: Columns, learning_rate: float, kl_coef: float
    ) -> StepResult:
        """One update of the policy."""
        names = ("old_logprobs", "advantages", "weights", "importance", "reference")
        wanted = {name: columns[name] for name in names if name in columns}
        result: StepResult = self.policy.call(
            "update", number, ray.put(wanted), learning_rate, kl_coef, timeout_s=self.timeout_s
        )[0]
        return result

    def suites(self, when: str, step: int) -> None:
        """Measure the job's suites on the policy."""
        if self.job.eval.suites:
            self.policy.call("suites", when, step, timeout_s=self.timeout_s)

    def peak_memory_gb(self) -> list[float]:
        """Of each rank of the policy."""
        return self.policy.call("peak_memory_gb", timeout_s=self.timeout_s)

    def save(self, step: int, state: dict[str, Any]) -> int | None:
        """Start a checkpoint of policy and critic; returns a step that was committed meanwhile."""
        for prefix, group in (("", self.policy), ("critic.", self.critic)):
            if group is not None:
                [[steps]] = wait([group.start_first("optimizer_step")], self.timeout_s)
                state = state | {f"{prefix}optimizer_step": steps}
        return self._newest([group.start("save", step, state) for group in self._learners()])

    def finish_saving(self) -> int | None:
        """Wait until what was saved is committed."""
        return self._newest([group.start("finish_saving") for group in self._learners()])

    def _newest(self, calls: Sequence[Call]) -> int | None:
        newest: int | None = wait(calls, self.timeout_s)[0][0]
        return newest

    def close(self) -> None:
        """End all processes and give their room back."""
        for group in self._groups:
            group.kill()
        remove_placement_group(self._reserved)


def _in_order(found: Sequence[dict[int, np.ndarray]], count: int) -> list[np.ndarray]:
    """What the ranks found, by answer."""
    together = {number: values for own in found for number, values in own.items()}
    assert len(together) == count
    return [together[number] for number in range(count)]
