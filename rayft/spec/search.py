"""A search against its job: every value of the space makes a valid job, every metric is one that the runs report, and what the
scheduler changes may be changed. And the jobs of its trials, `with_values`.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from rayft.errors import JobError
from rayft.spec.rl import METHODS
from rayft.spec.tune import FORKING, Dimension, Tune, alike

if TYPE_CHECKING:
    from rayft.spec.job import Job

#: What a trial's run is called after the search's name; the longest: trial 9999, its hundredth run.
LONGEST_SUFFIX = "-t0000-99"
LONGEST_NAME = 63 - len(LONGEST_SUFFIX)
#: Metrics that every trial has, by what it used.
USED = ("gpu_hours", "cpu_hours", "seconds")
#: Keys that no search may change, and why.
FIXED = {
    "name": "the search names its runs",
    "storage": "the search places its runs",
    "tune": "a search has no search inside",
    "checkpoint": "the search keeps what it needs",
    "eval": "trials measured differently cannot be compared",
    "data.eval": "trials measured differently cannot be compared",
}
#: Combinations of values for which `jobs_over` makes a job at most.
MOST_COMBINATIONS = 500
#: Keys that stay as they are in a run that goes on from another's state: they make that state, its data or its length.
OF_THE_STATE = re.compile(
    r"(method|seed|model|data|cluster|zero|deepspeed|placement|log|reward\.heads"
    r"|adapter\.(type|lora_r|lora_alpha|target_modules|modules_to_save|use_rslora|use_dora)"
    r"|train\.(precision|max_steps|num_train_epochs)"
    r"|rl\.(advantage_estimator|critic|critic_warmup_steps)"
    r"|rollout\.(engine|engines|vllm|lag)"
    r"|rewards\.\d+\.(name|type|path))(\.|$)"
    r"|(adapter|train|reward|rl|rollout|rewards(\.\d+)?)$"
)
#: Further ones where answers are drawn ahead (rollout.lag): those for the step after a checkpoint are there already, and scored.
SAME_WITH_LAG = (
    "train.global_batch_size",
    "rl.num_generations",
    "rl.truncated",
    "rl.truncated_penalty",
    "rl.overlong_buffer",
    "rl.drop_uniform_groups",
    "rl.max_refills",
    "rollout.max_new_tokens",
    "rollout.temperature",
    "rollout.top_p",
    "rollout.top_k",
    "rollout.stop",
)
#: Parts of each dimension's probability at which its values are tried: the ends, and points that no rule is made for.
ENDS_AND_BETWEEN = (0.0, 1.0, 0.381966, 0.618034)


def with_values(job: Job, values: Mapping[str, Any]) -> Job:
    """The job without its search and with these values, by dotted key, in the place of its own.

    What the job leaves at its default counts as not given, so that a default which another key decides follows that key, and
    the result is the same for a job as written and as resolved. Raises JobError naming the key.
    """
    from rayft.spec.explain import explain

    raw = given(job)
    if values.get("train.tokens_per_step") and raw.get("train", {}).get("global_batch_size") == 16:
        del raw["train"]["global_batch_size"]  # the default of jobs that give no unit
    for key, value in values.items():
        _set(raw, key, value)
    try:
        return type(job).model_validate(raw)
    except ValidationError as error:
        raise JobError(
            f"tune.space: {'; '.join(explain(error.errors()))}.", "`rayft schema` lists every key."
        ) from None


def _set(raw: dict[str, Any], key: str, value: Any) -> None:
    from rayft.spec.load import set_key

    set_key(raw, key, value, said=f"tune.space: {key}")


def given(job: Job) -> dict[str, Any]:
    """The job as a mapping, without its search and without what equals the default, the method's own choices included."""
    raw = job.model_dump(mode="json", exclude={"tune"}, exclude_defaults=True)
    if job.reinforced:
        filled = job.rl
        for name in list(raw.get("rl", {})):
            bare = filled.model_copy(update={name: None})
            if type(filled).model_fields[name].default is None and _fills_alike(
                bare, filled, name, job.method
            ):
                del raw["rl"][name]
    return raw


def _fills_alike(bare: Any, filled: Any, name: str, method: str) -> bool:
    """Whether the method would choose what stands there."""
    try:
        return bool(getattr(bare.filled(method), name) == getattr(filled, name))
    except ValueError:
        return False


def check_search(job: Job) -> None:
    """Raise ValueError, in one sentence, for a search that contradicts its job."""
    tune = job.tune
    assert tune is not None
    if len(job.name) > LONGEST_NAME:
        raise ValueError(
            f"name: a search's name has at most {LONGEST_NAME} characters, as its runs are called NAME{LONGEST_SUFFIX}; "
            f"{job.name!r} has {len(job.name)}"
        )
    _keys_may_change(tune)
    conditions = Conditions(job)
    for key in tune.space:
        conditions.required(key)
    try:
        _values_are_accepted(job, conditions)
    except JobError as error:
        raise ValueError(error.message.removesuffix(".")) from None
    for objective in tune.aims:
        _is_reported(job, objective.metric)
    for metric in tune.constraints:
        _is_reported(job, metric)
    _scheduler_agrees(job, tune)


def jobs_of_lists(job: Job) -> Iterator[tuple[str, Job]]:
    """Key and a trial's job for every listed value of a search's space: what trials may read that the job itself does not name."""
    conditions = Conditions(job)
    for key in conditions.order:
        dimension = conditions.space[key]
        for value in _tried(dimension) if dimension.is_list else ():
            for part in ENDS_AND_BETWEEN:
                with contextlib.suppress(JobError):
                    yield (
                        key,
                        with_values(job, conditions.complete({**conditions.required(key), key: value}, part)),
                    )
                    break


def jobs_over(job: Job, keys: re.Pattern[str]) -> list[Job]:
    """Trials' jobs with every combination of the tried values of the searched keys that match, as far as some values of the
    others go with it; one job where no such key is searched."""
    conditions = Conditions(job)
    searched = [key for key in conditions.order if keys.match(key)]
    found = []
    every = itertools.product(*(_tried(conditions.space[key]) for key in searched))
    for values in itertools.islice(every, MOST_COMBINATIONS):
        chosen = dict(zip(searched, values, strict=True))
        for part in ENDS_AND_BETWEEN:
            with contextlib.suppress(JobError):
                found.append(with_values(job, conditions.complete(chosen, part)))
                break
    return found or [job]


def _keys_may_change(tune: Tune) -> None:
    for key in tune.space:
        for fixed, why in FIXED.items():
            if key == fixed or key.startswith(f"{fixed}."):
                raise ValueError(f"tune.space: {key} cannot be searched: {why}")
        inside = [other for other in tune.space if other.startswith(f"{key}.")]
        if inside:
            raise ValueError(f"tune.space: {inside[0]} is a part of {key}; give one of them")
        if tune.scheduler in FORKING and OF_THE_STATE.match(key):
            raise ValueError(
                f"tune.space: {key} cannot be changed by the scheduler {tune.scheduler}: a trial goes on from another's "
                "state, which this key is part of"
            )


class Conditions:
    """The `when` of a space's dimensions: which depend on which, and whether each can be met."""

    def __init__(self, job: Job) -> None:
        assert job.tune is not None
        self.space = job.tune.space
        self.crossed = job.tune.searcher == "grid"
        self.own = job.model_dump(mode="json", exclude={"tune"})
        self.order = list(self._ordered())

    def required(self, key: str) -> dict[str, Any]:
        """Values of other dimensions under which this one is active; raises ValueError where there are none."""
        allowed = self._allowed(key)
        return {other: values[0] for other, values in allowed.items() if other in self.space}

    def active(self, key: str, values: Mapping[str, Any]) -> bool:
        """Whether the dimension has a value in a trial, given those of the dimensions before it in `order`."""
        for other, wanted in (self.space[key].when or {}).items():
            if other in self.space and other not in values:
                return False
            value = values[other] if other in self.space else self._own(other, key)
            if not _meets(value, wanted):
                return False
        return True

    def complete(self, values: Mapping[str, Any], part: float) -> dict[str, Any]:
        """These values and, for the other active dimensions, those at a part of their probability."""
        found: dict[str, Any] = {}
        for key in self.order:
            if self.active(key, found):
                found[key] = values[key] if key in values else self.space[key].at(part)
        return found

    def _allowed(self, key: str) -> dict[str, list[Any]]:
        """Values under which a dimension is active, of each key that it depends on, directly or not."""
        allowed: dict[str, list[Any]] = {}
        for other, wanted in (self.space[key].when or {}).items():
            sources = [{other: self._values(other, key)}]
            sources += [self._allowed(other)] if other in self.space else []
            for source in sources:
                for name, values in source.items():
                    allowed[name] = [v for v in allowed.get(name, values) if any(alike(v, w) for w in values)]
            allowed[other] = [value for value in allowed[other] if _meets(value, wanted)]
        for other, values in allowed.items():
            if not values:
                raise ValueError(f"tune.space.{key}: its `when` asks of {other} what it never is")
        return allowed

    def _values(self, other: str, key: str) -> list[Any]:
        if other not in self.space:
            return [self._own(other, key)]
        dimension = self.space[other]
        if dimension.continuous:
            raise ValueError(
                f"tune.space.{key}: its `when` names {other}, which is drawn from a range; only a listed value can be met"
            )
        if self.space[key].grid is not None and dimension.grid is None and not self.crossed:
            raise ValueError(
                f"tune.space.{key}: a grid can only depend on another grid, and {other} is {dimension.kind}"
            )
        return [dimension.value(index) for index in range(dimension.count)]

    def _own(self, other: str, key: str) -> Any:
        """The job's value of a key outside the space."""
        node: Any = self.own
        for part in other.split("."):
            if isinstance(node, list) and part.isdigit() and int(part) < len(node):
                node = node[int(part)]
            elif isinstance(node, dict) and part in node:
                node = node[part]
            else:
                known = [*self.space, *_keys(self.own)]
                near = difflib.get_close_matches(other, known, n=1, cutoff=0.5)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise ValueError(
                    f"tune.space.{key}: its `when` names {other!r}, which is neither in the space nor in the job{hint}"
                )
        return node

    def _ordered(self) -> Iterator[str]:
        """The dimensions, each after those it depends on, else as they stand in the file."""
        done: list[str] = []

        def visit(key: str, path: tuple[str, ...]) -> None:
            if key in path:
                circle = " -> ".join([*path[path.index(key) :], key])
                raise ValueError(f"tune.space.{key}: `when` goes in a circle: {circle}")
            if key not in done:
                for other in self.space[key].when or {}:
                    if other in self.space:
                        visit(other, (*path, key))
                done.append(key)

        for key in self.space:
            visit(key, ())
        yield from done


def _meets(value: Any, wanted: Any) -> bool:
    return alike(value, wanted) or (isinstance(wanted, list) and any(alike(value, one) for one in wanted))


def _keys(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")


def _values_are_accepted(job: Job, conditions: Conditions) -> None:
    """Every listed value and both ends of every range make a valid job with some values of the other dimensions."""
    good: list[dict[str, Any]] = []
    for key in conditions.order:
        for value in _tried(conditions.space[key]):
            chosen = {**conditions.required(key), key: value}
            reasons = []
            for part in ENDS_AND_BETWEEN:
                found = conditions.complete(chosen, part)
                if found in good:
                    break
                try:
                    with_values(job, found)
                    good.append(found)
                    break
                except JobError as error:
                    reasons.append(error)
            else:
                raise _refusal(job, key, value, chosen, reasons[0], conditions.space[key])


def _tried(dimension: Dimension) -> list[Any]:
    if dimension.continuous:
        return [dimension.at(part) for part in ENDS_AND_BETWEEN]
    if dimension.is_list:
        return [dimension.value(index) for index in range(dimension.count)]
    return [dimension.value(index) for index in sorted({0, 1, dimension.count - 1})]


def _refusal(
    job: Job, key: str, value: Any, chosen: dict[str, Any], joint: JobError, dimension: Dimension
) -> JobError:
    """Why a value is refused: alone if it is refused alone, else with the others of the space."""
    try:
        with_values(job, chosen)
    except JobError as error:
        reason = error.message.removeprefix("tune.space: ").removesuffix(".")
        if reason.startswith(("unknown key", key)) and dimension.is_list:
            return JobError(f"tune.space: {reason}.")
        if dimension.continuous and "integer" in reason:
            return JobError(f"tune.space.{key}: {reason}; use quniform or choice for whole numbers.")
        return JobError(f"tune.space.{key}: {value!r} is refused: {reason}.")
    reason = joint.message.removeprefix("tune.space: ").removesuffix(".")
    return JobError(f"tune.space.{key}: {value!r} goes with no tried value of the others: {reason}.")


def _is_reported(job: Job, metric: str) -> None:
    """Raise ValueError where no run of the job would report the metric."""
    head, _, rest = metric.partition(".")
    if metric in USED:
        return
    if head == "eval" and rest:
        if not job.data.eval:
            raise ValueError(f"tune: {metric} needs data.eval, the rows that it is measured on")
        if not job.eval.every_steps:
            raise ValueError(f"tune: {metric} is measured every eval.every_steps, which is not set")
        if rest == "loss" and job.method in METHODS:
            raise ValueError(
                f"tune: method {job.method} measures rewards on data.eval and no {metric}; use eval.score"
            )
        return
    if head == "train" and rest:
        return
    if head in ("suite", "change") and rest:
        names = [suite.name for suite in job.eval.suites]
        if not any(rest.startswith(f"{name}.") for name in names):
            meant = difflib.get_close_matches(rest.rpartition(".")[0] or rest, names, n=1)
            hint = (
                f"did you mean {head}.{meant[0]}.METRIC?"
                if meant
                else f"eval.suites has {', '.join(names) or 'none'}"
            )
            raise ValueError(f"tune: {metric} names no suite of eval.suites ({hint})")
        if head == "change" and not job.eval.before:
            raise ValueError(f"tune: {metric} is a change against before training, and eval.before is false")
        return
    known = ("eval.loss", "eval.score", "train.loss", *USED)
    near = difflib.get_close_matches(metric, known, n=1) or [
        name for name in known if name.endswith(f".{metric}")
    ]
    hint = (
        f"did you mean {near[0]!r}?"
        if near
        else "there are eval.*, train.*, suite.*, change.*, " + ", ".join(USED)
    )
    raise ValueError(f"tune: no run reports a metric {metric!r} ({hint})")


def _scheduler_agrees(job: Job, tune: Tune) -> None:
    if tune.scheduler == "none":
        return
    every = job.eval.every_steps
    if not every:
        raise ValueError(
            f"tune.scheduler {tune.scheduler} judges trials at their evaluations; set eval.every_steps"
        )
    head = (tune.metric or "").partition(".")[0]
    if head in ("suite", "change"):
        raise ValueError(
            f"tune.metric {tune.metric} is measured after training only, so tune.scheduler {tune.scheduler} cannot judge "
            "running trials by it; use a metric of eval or train"
        )
    if tune.scheduler == "hyperband" and not job.train.max_steps:
        raise ValueError("tune.scheduler hyperband divides the length of a run; set train.max_steps")
    if tune.scheduler in FORKING:
        _forks_agree(job, tune)
    for name in ("grace_steps", "perturb_steps"):
        steps = getattr(tune, name)
        if steps and steps < every:
            raise ValueError(
                f"tune.{name} {steps} is less than eval.every_steps {every}, when trials are judged"
            )
        if (
            steps
            and job.train.max_steps
            and steps >= job.train.max_steps
            and "train.max_steps" not in tune.space
        ):
            raise ValueError(
                f"tune.{name} {steps} leaves nothing of the run's train.max_steps {job.train.max_steps}"
            )


def _forks_agree(job: Job, tune: Tune) -> None:
    """Raise ValueError where a trial that goes on from another's state could not do so, or would not report what is asked for."""
    drawn = [key for key in tune.space if key in SAME_WITH_LAG or key.startswith("rewards.")]
    if ahead := [key for key in drawn if job.rollout.lag]:
        raise ValueError(
            f"tune.space: {ahead[0]} cannot be changed by the scheduler {tune.scheduler} under rollout.lag {job.rollout.lag}: a "
            "trial goes on with answers that were drawn ahead under the other's value; set rollout.lag to 0"
        )
    asking = [key for key in tune.space if key.split(".")[0] in ("rewards", "rollout")]
    rates = [name for name in (tune.metric or "", *tune.constraints) if name.startswith("eval.win_rate/")]
    if asking and rates:
        raise ValueError(
            f"tune: {rates[0]} is against the answers before training, which a trial that goes on from another's state has only "
            f"where it asks and scores alike; leave {asking[0]} out of tune.space, or use eval.score"
        )
