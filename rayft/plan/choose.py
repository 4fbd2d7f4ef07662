"""Which ZeRO stage to train with, and what to change where nothing fits."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayft.errors import JobError
from rayft.plan.architecture import Architecture, read_architecture
from rayft.plan.gpus import find_gpu
from rayft.plan.headers import weight_shapes
from rayft.plan.memory import STAGES, MemoryPlan, plan_memory
from rayft.plan.roles import plan_with_roles
from rayft.spec import Job, parse_job

#: Share of the memory a plan may fill; the rest is for fragmentation and what the plan does not know.
FILL = 0.92

NONE: Mapping[str, Architecture] = {}


@dataclass(frozen=True)
class Choice:
    """The stage and why, with the plans of every stage. `limit`: bytes a rank has; None: unknown."""

    stage: int
    reason: str
    plans: dict[int, MemoryPlan]
    limit: int | None

    @property
    def plan(self) -> MemoryPlan:
        """The plan of the chosen stage."""
        return self.plans[self.stage]

    @property
    def fits(self) -> bool:
        """Whether the chosen stage fits; True where the limit is unknown."""
        return self.limit is None or fits(self.plan, self.limit)


def choose_stage(
    job: Job, folder: Path, *, gpu: str | None = None, scorers: Mapping[str, Architecture] = NONE
) -> Choice:
    """The stage for the model in `folder` (its config.json, and headers of its weights if they are there).

    gpu: what the nodes report, used where the job names none. scorers: as for `plan_with_roles`. Raises JobError for `zero.stage: auto` on a GPU that
    nobody named, and for a model whose family is not known.
    """
    return choose(job, architecture_of(folder), memory_limit(job, gpu), scorers)


def choose(
    job: Job, architecture: Architecture, limit: int | None, scorers: Mapping[str, Architecture] = NONE
) -> Choice:
    """The stage of the job, or for `auto` the lowest one that fits into `limit` bytes a rank.

    Lowest, since every stage costs speed: measured on small models and adapters, stage 0 is up to three times as fast
    as 2, and gathering frozen weights every step makes 3 the slowest.
    """
    plans = {
        stage: plan_with_roles(job, architecture, stage, scorers)
        if job.reinforced
        else plan_memory(job, architecture, stage)
        for stage in STAGES
    }
    if job.zero.stage != "auto":
        return Choice(job.zero.stage, "zero.stage says so", plans, limit)
    possible = _possible_stages(job)
    if limit is None:
        if len(possible) == 1:
            return Choice(possible[0], "there is nobody to split with", plans, limit)
        raise JobError(
            "zero.stage auto needs to know the GPU.", "Set cluster.gpu, such as H100-80GB, or zero.stage."
        )
    for stage in possible:
        if fits(plans[stage], limit):
            return Choice(stage, _reason(stage, possible, plans, limit), plans, limit)
    least = min(possible, key=lambda stage: plans[stage].device)
    needed = f"{_gib(plans[least].device)} of {_gib(limit)}"
    return Choice(least, f"no stage fits; this one needs least ({needed})", plans, limit)


def fits(plan: MemoryPlan, limit: int) -> bool:
    """Whether a plan leaves enough of `limit` bytes free."""
    return plan.device <= FILL * limit


def suggest(
    job: Job, architecture: Architecture, limit: int, scorers: Mapping[str, Architecture] = NONE
) -> list[tuple[str, Choice]]:
    """Overrides that make a job fit, with the choice they lead to; empty where it fits already or nothing helps.

    The first is the least change to one machine (each measure is added to the ones before), then more workers, then
    an adapter instead of full fine-tuning.
    """
    if choose(_with(job, {"zero.stage": "auto"}), architecture, limit, scorers).fits:
        return []
    found: list[tuple[str, Choice]] = []
    for measures in (_on_one_machine(job), _more_workers(job), _adapter(job)):
        for overrides in measures:
            choice = choose(_with(job, {"zero.stage": "auto", **overrides}), architecture, limit, scorers)
            if choice.fits:
                found.append((" ".join(f"{key}={_plain(value)}" for key, value in overrides.items()), choice))
                break
    return found


def memory_limit(job: Job, gpu: str | None = None) -> int | None:
    """Bytes a rank has: the GPU's memory or its part of it, or without GPUs an equal share of this machine's; None for an unnamed GPU."""
    name = job.cluster.gpu or gpu
    if job.cluster.gpus_per_worker > 0:
        return int(find_gpu(name).memory * job.cluster.gpus_per_worker) if name else None
    import psutil

    return int(psutil.virtual_memory().total / job.cluster.max_workers)


def architecture_of(folder: Path) -> Architecture:
    """The architecture of the model in a folder. Raises JobError where its config.json cannot be used."""
    path = folder / "config.json"
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise JobError(
            f"The model's {path} cannot be read: {error}.", "Give the folder of a model."
        ) from None
    return read_architecture(config, weight_shapes(folder))


def scorer_architectures(folders: Sequence[tuple[str, Path | None]]) -> dict[str, Architecture]:
    """The architectures of reward models whose folder (path in the job, folder) is at hand and understood."""
    found = {}
    for path, folder in folders:
        with contextlib.suppress(JobError):
            if folder is not None:
                found[path] = architecture_of(folder)
    return found


def _possible_stages(job: Job) -> list[int]:
    """Stages that the job's other choices leave open, and that split anything."""
    stages = list(STAGES)
    if job.adapter.type == "qlora" or job.adapter.use_dora:
        stages.remove(3)
    if job.zero.offload_optimizer:
        stages.remove(0)
    elif job.cluster.max_workers == 1:
        stages = [0]
    return stages


def _reason(stage: int, possible: list[int], plans: dict[int, MemoryPlan], limit: int) -> str:
    needed = f"{_gib(plans[stage].device)} of {_gib(limit)}"
    if stage == possible[0]:
        return f"it fits ({needed}), and splitting more costs speed"
    below = possible[possible.index(stage) - 1]
    return f"the lowest that fits ({needed}); stage {below} would need {_gib(plans[below].device)}"


def _on_one_machine(job: Job) -> Iterator[dict[str, Any]]:
    overrides: dict[str, Any] = {}
    if job.train.micro_batch_size > 1:
        overrides["train.micro_batch_size"] = 1
        yield dict(overrides)
    if not job.train.gradient_checkpointing:
        overrides["train.gradient_checkpointing"] = True
        yield dict(overrides)
    if job.cluster.gpus_per_worker and not job.zero.offload_optimizer and job.train.precision != "pure_bf16":
        overrides["zero.offload_optimizer"] = True
        yield dict(overrides)


def _more_workers(job: Job) -> Iterator[dict[str, Any]]:
    workers = job.cluster.min_workers
    while workers < 1024:
        workers *= 2
        yield {"cluster.num_workers": workers}


def _adapter(job: Job) -> Iterator[dict[str, Any]]:
    if job.adapter.type == "none":
        yield {"adapter.type": "lora"}
        yield {"adapter.type": "lora", "train.gradient_checkpointing": True}


def _with(job: Job, overrides: dict[str, Any]) -> Job:
    values = job.model_dump(exclude={"tune"})
    for key, value in overrides.items():
        group, _, name = key.partition(".")
        values[group][name] = value
    return parse_job(values)


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _gib(number: float) -> str:
    return f"{number / 2**30:.1f} GiB"
