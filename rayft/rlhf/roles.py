"""The roles of a run: which groups of processes there are, and each phase of a step as one call."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import ray
from ray.util.placement_group import placement_group_table, remove_placement_group

from rayft.learner.learner import StepResult
from rayft.rlhf.actors import CriticActor, PolicyActor, ReferenceActor
from rayft.rlhf.engines import Answers, EngineActor
from rayft.rlhf.experience import Columns
from rayft.rlhf.finished import Finished, Interrupted, key_of
from rayft.rlhf.group import Call, Group, wait
from rayft.rlhf.layout import MiniBatch
from rayft.rlhf.placement import (
    Table,
    await_room,
    in_physical_order,
    place,
    refuse_what_never_fits,
    reserve,
    table_of,
)
from rayft.rlhf.plan import RlPlan
from rayft.rlhf.pool import EnginePool
from rayft.rlhf.prompts import Prompt
from rayft.rlhf.rewards import RewardActor, RewardError, longest_wait
from rayft.rlhf.rollout import Rollout, Unit, asked_of, rollout_of, units_of
from rayft.train.group import worker_environment

#: Loading a model, generating and measuring may take long without being stuck.
SLOW_S = 1800.0
#: Shorter waits for room on the cluster are not told.
WORTH_TELLING_S = 1.0


def table_for(plan: RlPlan) -> Table:
    """What a run needs of the cluster."""
    return table_of(plan.job, critic=plan.critic is not None, reference=plan.reference == "group")


class Roles:
    """Policy, critic, reference, rewards and engines of a run, on a cluster.

    What trains is built anew from a checkpoint whenever one of its processes dies; the others hold nothing of their own, and
    are started again one by one, in the middle of a step.
    """

    def __init__(
        self,
        plan: RlPlan,
        recorder: Any,
        say: Callable[[str], None],
        *,
        room_s: float | None = None,
        heed: Callable[[], None] = lambda: None,
    ) -> None:
        """room_s: how long to wait for room even where the nodes there are could never hold all; others may come in the place of
        those that are gone. heed: called every few seconds while what trains is not there yet; it may raise to give that up."""
        self.plan, self.job, self.recorder = plan, plan.job, recorder
        self.hang_s = self.job.cluster.hang_timeout_s
        self.timeout_s = max(SLOW_S, self.hang_s)
        self._say, self._version = say, 0
        #: Called in every wait for room; None where a step that is given up would be lost.
        self._heed: Callable[[], None] = heed
        self._heed_now: Callable[[], None] | None = heed
        self._environment = worker_environment(self.job, plan.stage)
        self._table = table_for(plan)
        self._spots = self._table.spots
        if room_s is None:
            refuse_what_never_fits(self._table)
        #: What all roles hold together, as Ray resources.
        self.devices = self._table.devices
        began = time.time()
        self._reserved = reserve(
            self._table, self.job.cluster.start_timeout_s if room_s is None else room_s, say, heed
        )
        self._tell_placed(began)
        self._started_on: set[str] = set()
        self._learners: list[Group] = []
        self._others: list[Group] = []
        #: How often processes may be started again, by their role, where that is not `max_failures` any more.
        self._restarts: dict[str, int] = {}
        self._starting: list[tuple[Group, Call]] = []
        self._put: tuple[Columns, dict[str, Any]] = ({}, {})
        self.reference: Group | None = None
        self.critic: Group | None = None
        self.engines: EnginePool | None = None
        self.rewards: dict[str, Group] = {}

    def nodes(self) -> set[str]:
        """Ids of the nodes that the run has room on."""
        return {node for node in placement_group_table(self._reserved)["bundles_to_node_id"].values() if node}

    def began_on_a_lost_node(self) -> bool:
        """Whether what trains was being started on a node that is gone, which the cluster did not know yet."""
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        return not self._started_on <= alive

    def begin(self, epoch: int, resumed_step: int | None, lost: str = "") -> None:
        """Start and build what trains, and have it take in a checkpoint if there is one; the others, too, where they are not there
        or the role was `lost`."""
        for group in [*self._learners, *(group for group in self._others if group.role == lost)]:
            group.kill()
            self._restarts[group.role] = group.restarts
        self._others = [group for group in self._others if group.role != lost]
        began, self._heed_now = time.time(), self._heed
        self._await_room()
        self._tell_placed(began)
        self._started_on = self.nodes()
        self._learners = []
        self.policy = self._learner("policy", PolicyActor)
        self.critic = self._learner("critic", CriticActor) if self.plan.critic else None
        building = [group.start("build", epoch, self.recorder) for group in self._learners]
        self._start_others()
        # Those that were starting when another role died are waited for here as well: if one failed, this is where it is told.
        starting = [call for group, call in self._starting if group in self._others]
        self._begun([*building, *starting])
        self._starting = []
        if resumed_step is not None:
            self._begun([group.start("load", resumed_step) for group in self._learners])
        if self.engines is not None:
            self.engines.forget()
        self._started_on, self._heed_now = set(), None

    def _begun(self, calls: list[Call]) -> list[list[Any]]:
        return wait(calls, self.timeout_s, heed=self._heed)

    def _await_room(self) -> None:
        heed = self._heed_now or (lambda: None)
        await_room(self._reserved, self._table, self.job.cluster.wait_s, self._say, heed)

    @contextlib.contextmanager
    def heeding(self, leave: Callable[[], bool]) -> Iterator[None]:
        """For work that is given up where `leave` says so: every long wait in it raises Interrupted then, also that for room in which
        a process that died can be started again."""

        def heed() -> None:
            if leave():
                raise Interrupted

        self._heed_now = heed
        try:
            yield
        finally:
            self._heed_now = None

    def _learner(self, role: str, actor: Any) -> Group:
        group = Group(role, self._maker(role, actor, self.plan), len(self._spots[role]))
        self._learners.append(group)
        [where] = self._begun([group.start("where")])
        order = in_physical_order(where)
        group.actors = [group.actors[index] for index in order]
        [[address]] = self._begun([group.start_one(0, "address")])
        self._begun([group.start_one(rank, "join", rank, len(group), address) for rank in range(len(group))])
        return group

    def _start_others(self) -> None:
        """Start those roles that hold nothing of their own and are not there."""
        there = {group.role for group in self._others}

        def stateless(role: str, actor: Any, method: str, *args: Any) -> Group:
            restarts = self._restarts.get(role, self.job.cluster.max_failures)
            group = Group(
                role,
                self._maker(role, actor, *args),
                len(self._spots[role]),
                restarts=restarts,
                restart_s=self.timeout_s,
                tell=self._tell_recovery,
            )
            self._others.append(group)
            self._starting.append((group, group.set_up(method)))
            return group

        if self.plan.reference == "group" and "reference" not in there:
            self.reference = stateless("reference", ReferenceActor, "build", self.plan)
        for source in self.job.rewards:
            if (role := f"reward {source.name}") not in there:
                precision = self.job.train.precision
                self.rewards[source.name] = stateless(role, RewardActor, "load", source, precision)
        if self.job.rollout.engines and "rollout" not in there:
            self.engines = EnginePool(stateless("rollout", EngineActor, "build", self.plan), self.timeout_s)

    def _maker(self, role: str, actor: Any, *args: Any) -> Callable[[int], Any]:
        spots = self._spots[role]

        def make(rank: int) -> Any:
            # After a node was lost there may be no room for a while, which is said.
            self._await_room()
            return place(actor, self._reserved, spots[rank], self._environment, *args, rank, len(spots))

        return make

    def _tell_placed(self, since: float) -> None:
        """For the account of where the time went; looking takes milliseconds where nothing is waited for."""
        if time.time() - since > WORTH_TELLING_S:
            waited = [round(since, 3), round(time.time(), 3)]
            message = f"waited {waited[1] - waited[0]:.0f} s for room on the cluster"
            self.recorder.event.remote("placed", message, waited=waited)

    def _tell_recovery(self, message: str) -> None:
        self.recorder.event.remote("recovery", message)

    def _models(self) -> list[Group]:
        return [group for group in (self.policy, self.critic, self.reference) if group is not None]

    # -- the phases of a step ----------------------------------------------------------------------------------

    def sync(self, version: int) -> dict[str, float]:
        """Have engines apart hold the policy's weights under this version; returns what it took, or nothing if there was nothing
        to do."""
        self._version = version
        if self.engines is None or self.engines.version == version:
            return {}
        return self.engines.send(version, self.policy)

    def answered(self) -> None:
        """No more answers are drawn by the weights of the last sync: nothing keeps them for an engine that might die."""
        if self.engines is not None:
            self.engines.forget()

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        num_generations: int | None = None,
        seed: int | None = None,
        finished: Finished | None = None,
        leave: Callable[[], bool] | None = None,
    ) -> list[Rollout]:
        """Answers to the prompts, `num_generations` (default: the job's) to each, by the weights of the last sync.

        finished: answers that are there already, to which new ones are added. leave: whether to begin no more units; raises
        Interrupted then.
        """
        num_generations = num_generations or self.job.rl.num_generations or 1
        seed = self.job.seed if seed is None else seed
        # A unit has as many answers whoever asks, so that single answers to held-out prompts do not leave engines half idle.
        asked = asked_of(prompts, num_generations)
        units = units_of(asked, max(1, self.job.unit_answers // num_generations) * num_generations, seed)
        finished = {} if finished is None else finished
        wanted = [unit for unit in units if any(key_of(asked[i]) not in finished for i in unit.answers)]
        done = (
            self.engines.generate(wanted, leave)
            if self.engines is not None
            else self._generate_inside(wanted, leave)
        )
        for unit in wanted:
            if unit.number in done:
                version, drawn = done[unit.number]
                for i, (answer, text) in zip(unit.answers, drawn, strict=True):
                    finished[key_of(asked[i])] = rollout_of(asked[i], version, answer, text)
        if len(done) < len(wanted):
            raise Interrupted
        return [finished[key_of(one)] for one in asked]

    def _generate_inside(
        self, units: Sequence[Unit], leave: Callable[[], bool] | None
    ) -> dict[int, tuple[int, Answers]]:
        """Of the units that each rank is dealt, those that it does before the recorder tells it to leave, if it may."""
        size, version = len(self.policy), self._version
        dealt = [units[rank::size] for rank in range(size)]
        [answers] = wait([self.policy.start_each("generate", dealt, leave is not None)], self.timeout_s)
        return {
            unit.number: (version, drawn)
            for own, made in zip(dealt, answers, strict=True)
            for unit, drawn in zip(own, made, strict=False)
        }

    def score(self, rollouts: Sequence[Rollout]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The weighted sum of all sources' scores, float64[S], and each source's."""
        contents = [rollout.prompt.content for rollout in rollouts]
        texts = [rollout.text for rollout in rollouts]
        names = sorted({name for rollout in rollouts for name in rollout.prompt.columns})
        columns = {name: [rollout.prompt.columns.get(name) for rollout in rollouts] for name in names}

        def part(own: slice) -> tuple[Any, ...]:
            return contents[own], texts[own], {name: values[own] for name, values in columns.items()}

        asked = {
            name: group.start_with("score", [part(own) for own in parts_of(len(rollouts), len(group))])
            for name, group in self.rewards.items()
        }
        found = {}
        for source in self.job.rewards:
            allowed = longest_wait(source, len(rollouts))
            late = RewardError(
                f"The reward {source.name} gave no scores for {len(rollouts)} answers within {allowed:g} s.",
                "Make it faster, or raise its timeout_s.",
            )
            [scores] = wait([asked[source.name]], allowed, late, self._heed_now)
            found[source.name] = np.array([score for own in scores for score in own], np.float64)
        total = sum(
            (source.weight * found[source.name] for source in self.job.rewards), np.zeros(len(rollouts))
        )
        return total, found

    def take(
        self, rollouts: Sequence[Rollout], mini_batches: Sequence[MiniBatch], *, packed: bool | None = None
    ) -> None:
        """Give every model the answers of the step. packed: where it is not as planned."""
        packed = self.plan.packed if packed is None else packed
        examples = ray.put([rollout.example for rollout in rollouts])
        layout = ray.put(list(mini_batches))
        wait([group.set_up("take", examples, layout, packed) for group in self._models()], self.hang_s)

    def old_logprobs(self, count: int) -> list[np.ndarray]:
        """The policy's log-probabilities of the answers' tokens, before the step's updates."""
        return _in_order(self.policy.call("logprobs", timeout_s=self.hang_s), count)

    def seen_logprobs(self, count: int) -> list[np.ndarray]:
        """The same, as the step's only update has just seen them."""
        return _in_order(self.policy.call("seen_logprobs", timeout_s=self.hang_s), count)

    def reference_logprobs(self, count: int) -> list[np.ndarray] | None:
        """The reference's, or None without one."""
        if self.plan.reference is None:
            return None
        if self.reference is not None:
            return _in_order(self.reference.call("logprobs", timeout_s=self.hang_s), count)
        return _in_order(self.policy.call("logprobs", reference=True, timeout_s=self.hang_s), count)

    def values(self, count: int) -> list[np.ndarray] | None:
        """The critic's values, or None without one."""
        return _in_order(self.critic.call("values", timeout_s=self.hang_s), count) if self.critic else None

    def update_critic(self, number: int, columns: Columns, learning_rate: float) -> StepResult | None:
        """One update of the critic, if there is one."""
        if self.critic is None:
            return None
        wanted = self._shared("critic", columns, ("old_values", "returns", "weights"))
        result: StepResult = self.critic.call("update", number, wanted, learning_rate, timeout_s=self.hang_s)[
            0
        ]
        return result

    def update_policy(
        self, number: int, columns: Columns, learning_rate: float, kl_coef: float
    ) -> StepResult:
        """One update of the policy."""
        names = ("old_logprobs", "advantages", "weights", "importance", "reference", "engine_logprobs")
        wanted = self._shared("policy", columns, names)
        result: StepResult = self.policy.call(
            "update", number, wanted, learning_rate, kl_coef, timeout_s=self.hang_s
        )[0]
        return result

    def _shared(self, role: str, columns: Columns, names: Sequence[str]) -> Any:
        """These columns in the object store, where they are put once a step."""
        if self._put[0] is not columns:
            self._put = (columns, {})
        refs = self._put[1]
        if role not in refs:
            refs[role] = ray.put({name: columns[name] for name in names if name in columns})
        return refs[role]

    def suites(self, when: str, step: int) -> None:
        """Measure the job's suites on the policy."""
        if self.job.eval.suites:
            self.policy.call("suites", when, step, timeout_s=self.timeout_s)

    def peak_memory_gb(self) -> list[float]:
        """Of each rank of the policy."""
        return self.policy.call("peak_memory_gb", timeout_s=self.hang_s)

    def save(self, step: int, state: dict[str, Any]) -> int | None:
        """Start a checkpoint of policy and critic; returns a step that was committed meanwhile."""
        for prefix, group in (("", self.policy), ("critic.", self.critic)):
            if group is not None:
                [[steps]] = wait([group.start_one(0, "optimizer_step")], self.timeout_s)
                state = state | {f"{prefix}optimizer_step": steps}
        return self._newest([group.start("save", step, state) for group in self._learners])

    def finish_saving(self) -> int | None:
        """Wait until what was saved is committed."""
        return self._newest([group.start("finish_saving") for group in self._learners])

    def _newest(self, calls: Sequence[Call]) -> int | None:
        newest: int | None = wait(calls, self.timeout_s)[0][0]
        return newest

    def close(self) -> None:
        """End all processes and give their room back."""
        for group in [*self._learners, *self._others]:
            group.kill()
        remove_placement_group(self._reserved)


def parts_of(count: int, workers: int) -> list[slice]:
    """The part of `count` answers of each worker, none empty; which they are never depends on who is fast."""
    ends = np.linspace(0, count, min(count, workers) + 1).astype(int).tolist()
    return [slice(first, end) for first, end in pairwise(ends)]


def _in_order(found: Sequence[dict[int, np.ndarray]], count: int) -> list[np.ndarray]:
    """What the ranks found, by answer."""
    together = {number: values for own in found for number, values in own.items()}
    assert len(together) == count
    return [together[number] for number in range(count)]
