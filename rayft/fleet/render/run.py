"""The verb `rayft k8s render`: what a run would be on a fleet, said in a few lines, and its manifest."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from rayft.errors import JobError, RayftError
from rayft.fleet.render.apply import apply
from rayft.fleet.render.cache import refuse_large_model
from rayft.fleet.render.files import Packed, pack, travelling
from rayft.fleet.render.manifest import Wishes, as_yaml, manifest
from rayft.fleet.render.model import architecture_of_model, scorers_of
from rayft.fleet.render.pods import Object
from rayft.fleet.render.size import Size, size
from rayft.fleet.saving import measured_saving, saving_line
from rayft.plan.architecture import Architecture
from rayft.spec import Job
from rayft.spec.profile import Profile


@dataclass(frozen=True)
class Rendered:
    """text: the manifest. objects: the same. lines: what people should know."""

    text: str
    objects: list[Object]
    packed: Packed
    size: Size
    lines: list[str] = field(default_factory=list)


def render(
    job: Job,
    profile: Profile,
    wishes: Wishes = Wishes(),  # noqa: B008 - frozen
    *,
    architecture: Architecture | None = None,
    scorers: dict[str, Architecture] | None = None,
    history: bool = False,
) -> Rendered:
    """The manifest of a job on a profile's fleet.

    architecture, scorers: of the models; looked for by default. history: whether the run's log on storage is asked how long its
    checkpoints took. Raises the RayftError that says why there can be none.
    """
    packed = pack(job, profile)
    lines = list(packed.notes)
    if architecture is None:
        try:
            architecture, scorers = _architectures(job, packed.job)
        except RayftError as error:
            lines.append(f"No memory plan: {error.message}")
    found = size(packed.job, profile, architecture, scorers)
    if architecture is not None:
        refuse_large_model(packed.job, profile, architecture)
    if history:
        found = _as_measured(found, profile)
    lines += [*found.notes, *summary(found, profile)]
    files = travelling(packed, profile)
    if files is not None:
        lines.append(_files_line(packed, files.working_dir, inline=files.inline is not None))
    objects = manifest(found, profile, wishes, files)
    return Rendered(as_yaml(objects, found, profile), objects, packed, found, lines)


def summary(found: Size, profile: Profile) -> list[str]:
    """Pods, stage and the time of a checkpoint, in words. Raises ResourceError for one that does not fit, where the profile says so."""
    lines = [
        f"{group.pods.count} x {group.name}: {group.pods.room.gpus} GPU, {group.pods.room.cpus} CPU, "
        f"{group.pods.room.memory_mib / 1024:.0f} GiB"
        for group in found.groups
    ]
    if found.choice:
        lines.append(f"ZeRO stage {found.choice.stage}: {found.choice.reason}.")
    return [*lines, saving_line(found.saving, profile)]


def render_job(job: Job, profile: Profile, wishes: Wishes, *, out: str | None, submit: bool) -> int:
    """Write the manifest to `out` or standard output; with `submit` to the cluster instead. What people should know goes to
    standard error."""
    made = render(job, profile, wishes, history=True)
    for line in made.lines:
        print(line, file=sys.stderr)
    if out:
        try:
            Path(out).write_text(made.text, encoding="utf-8")
        except OSError as error:
            raise JobError(f"{out} cannot be written: {error.strerror}.", "Give another --out.") from None
    if submit:
        for line in apply(made.text, made.objects[-1], made.packed, profile):
            print(line, file=sys.stderr)
    elif not out:
        print(made.text, end="")
    return 0


def plan_on(job: Job, profile: Profile) -> int:
    """Show what a run would be on the fleet: the memory plan of a rank, the pods, the time of a checkpoint."""
    from rich.console import Console

    from rayft.plan.gpus import find_gpu
    from rayft.plan.render import render as render_plan

    packed = pack(job, profile)
    architecture, scorers = _architectures(job, packed.job)
    found = size(packed.job, profile, architecture, scorers)
    refuse_large_model(packed.job, profile, architecture)
    found = _as_measured(found, profile)
    assert found.choice is not None
    gpu = find_gpu(found.job.cluster.gpu) if found.job.cluster.gpu else None
    console = Console()
    render_plan(found.job, architecture, found.choice, console, gpu, scorers)
    for line in [*packed.notes, *found.notes, *summary(found, profile)]:
        console.print(line)
    return 0


def _as_measured(found: Size, profile: Profile) -> Size:
    """With the time that the run's checkpoints have taken, where it has a log."""
    return replace(found, saving=measured_saving(found.job, profile) or found.saving)


def _architectures(job: Job, there: Job) -> tuple[Architecture, dict[str, Architecture]]:
    """Of the models where the job names them here, else where the run will find them."""
    try:
        return architecture_of_model(job.model), scorers_of(job)
    except RayftError:
        if there.model == job.model:
            raise
        return architecture_of_model(there.model), scorers_of(there)


def _files_line(packed: Packed, where: str, *, inline: bool) -> str:
    names = ", ".join(sorted(packed.files)[:5]) + (", …" if len(packed.files) > 5 else "")
    how = "travel in the ConfigMap" if inline else f"go to {where} with --apply"
    return f"Local files ({len(packed.files)}, {packed.size / 1e6:.1f} MB: {names}) {how}."
