"""The memory plan as tables: every stage by term, what fits, what to change; and predicted against measured."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from rayft.plan.architecture import Architecture
from rayft.plan.choose import NONE, Choice, fits, suggest
from rayft.plan.gpus import Gpu
from rayft.plan.memory import MemoryPlan
from rayft.plan.trainable import trainable_parameters
from rayft.spec import Job

#: Share of the peak matrix rate that well-made training reaches; the estimate of tokens/s goes by it.
EFFICIENCY = 0.4


def render(
    job: Job,
    architecture: Architecture,
    choice: Choice,
    console: Console,
    gpu: Gpu | None = None,
    scorers: Mapping[str, Architecture] = NONE,
) -> None:
    """Print the whole plan."""
    trained = trainable_parameters(job.adapter, architecture)
    console.print(
        f"{job.model.path}: {architecture.total:,} parameters, {trained:,} trained; memory per rank of"
        f" {choice.plan.world_size}, micro-batch {job.train.micro_batch_size} x {job.data.max_length} tokens"
    )
    console.print(plan_table(choice))
    console.print(f"Stage {choice.stage}: {choice.reason}.")
    if gpu:
        console.print(speed_line(job, architecture, gpu))
    if choice.limit is not None:
        for overrides, other in suggest(job, architecture, choice.limit, scorers):
            console.print(
                f"It would fit with {overrides}: stage {other.stage}, {_gib(other.plan.device)} GiB."
            )


def plan_table(choice: Choice) -> Table:
    """Terms down, stages across; GiB."""
    plans = choice.plans
    table = Table(title="GiB per rank" + (f", {_gib(choice.limit)} there" if choice.limit else ""))
    table.add_column("term")
    for stage in plans:
        table.add_column(f"stage {stage}", justify="right", style="bold" if stage == choice.stage else "")
    for term in choice.plan.terms():
        table.add_row(term, *(_gib(plan.terms()[term]) for plan in plans.values()))
    table.add_section()
    table.add_row("total", *(_gib(plan.device) for plan in plans.values()))
    if any(plan.host for plan in plans.values()):
        table.add_row("host memory", *(_gib(plan.host) for plan in plans.values()))
    if choice.limit is not None:
        marks = ("yes" if fits(plan, choice.limit) else "[red]no[/red]" for plan in plans.values())
        table.add_row("fits", *marks)
    return table


def speed_line(job: Job, architecture: Architecture, gpu: Gpu) -> str:
    """An estimate of tokens/s per GPU and its assumptions."""
    flops = flops_per_token(job, architecture)
    most = gpu.tflops * 1e12 / flops
    return (
        f"{flops / 1e9:.1f} GFLOP per token: about {most * EFFICIENCY:,.0f} tokens/s on each {gpu.name}"
        f" at {EFFICIENCY:.0%} of its {gpu.tflops:,.0f} TFLOP/s, never more than {most:,.0f}."
    )


def flops_per_token(job: Job, architecture: Architecture) -> float:
    """Model FLOPs of one trained-through token: 6 per active parameter, 4 where the weights are frozen, and causal
    attention over rows of `max_length` (arXiv:2204.02311, appendix B); 2 more per parameter with checkpointing."""
    frozen = job.adapter.type != "none"
    per_parameter = (4 if frozen else 6) + (2 if job.train.gradient_checkpointing else 0)
    attention = 6 * architecture.layers * architecture.heads * architecture.head_dim * job.data.max_length
    return float(per_parameter * architecture.active + attention)


def compare(plan: MemoryPlan, measured: list[float], on_gpu: bool) -> Table:
    """Predicted against measured peak memory.

    measured: GB (1e9 bytes) per rank, as in the run log: the process's on CPU, on a GPU what its allocator held, which
    does not count the overhead.
    """
    predicted = (plan.own - (plan.overhead if on_gpu else 0)) / 1e9
    table = Table(title="Peak memory, GB")
    for heading in ("rank", "predicted", "measured", "difference"):
        table.add_column(heading, justify="right")
    for rank, peak in enumerate(measured):
        table.add_row(str(rank), f"{predicted:.2f}", f"{peak:.2f}", f"{(peak - predicted) / predicted:+.0%}")
    return table


def _gib(number: float) -> str:
    return f"{number / 2**30:.2f}"
