"""The choice of the ZeRO stage, what is suggested where nothing fits, and the GPUs people name."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rayft.errors import JobError
from rayft.plan.choose import FILL, Choice, choose, choose_stage, memory_limit, suggest
from rayft.plan.gpus import GPUS, find_gpu
from rayft.plan.memory import STAGES
from rayft.plan.render import compare, flops_per_token, render
from rayft.spec import load_job, parse_job
from tests.unit.test_plan_memory import CONFIG, MODEL, job

GIB = 2**30


def chosen(limit_gib: float, workers: Any = 8, **groups: Any) -> Choice:
    return choose(job(workers, **groups), MODEL, int(limit_gib * GIB))


@pytest.mark.parametrize("stage", STAGES)
def test_the_lowest_stage_that_fits(stage: int) -> None:
    plans = chosen(1000).plans
    limit = int(plans[stage].device / FILL) + 1
    choice = choose(job(8), MODEL, limit)
    assert choice.fits
    assert choice.stage == stage
    assert ("splitting more costs speed" if stage == 0 else f"stage {stage - 1} would need") in choice.reason
    assert choose(job(8), MODEL, limit - 2).stage != stage or not choose(job(8), MODEL, limit - 2).fits


def test_adapters_are_not_split() -> None:
    assert chosen(40, adapter={"type": "lora"}).stage == 0


def test_nothing_fits() -> None:
    choice = chosen(20)
    assert not choice.fits
    assert choice.stage == 3
    assert choice.reason.startswith("no stage fits")


@pytest.mark.parametrize(
    ("groups", "limit", "stage"),
    [
        ({"zero": {"offload_optimizer": True}}, 200, 1),  # offloading needs a stage
        ({"zero": {"stage": 1}}, 200, 1),
    ],
)
def test_other_choices_of_the_job_are_respected(groups: dict[str, Any], limit: float, stage: int) -> None:
    assert chosen(limit, **groups).stage == stage


def test_what_zero_3_cannot_do_is_not_chosen() -> None:
    assert chosen(25, adapter={"type": "lora"}).stage == 3
    for adapter in ({"type": "lora", "use_dora": True}, {"type": "qlora", "lora_r": 2048}):
        assert chosen(25, adapter=adapter).stage < 3


def test_one_worker_has_nobody_to_split_with() -> None:
    assert chosen(1, workers=1).stage == 0


def test_auto_needs_a_limit() -> None:
    with pytest.raises(JobError, match=r"zero\.stage auto needs to know the GPU. Set cluster\.gpu"):
        choose(job(), MODEL, None)
    assert choose(job(zero={"stage": 2}), MODEL, None).fits
    alone = choose(job(1), MODEL, None)
    assert alone.stage == 0, "one worker has nobody to split with, on whatever GPU"


def test_a_part_of_a_gpu_has_a_part_of_its_memory() -> None:
    parts = [{"num_workers": 2, "gpus_per_worker": part, "gpu": "H100-80GB"} for part in (1, 0.75)]
    whole, some = (memory_limit(job(cluster=cluster)) for cluster in parts)
    assert some == pytest.approx(0.75 * whole)


def test_suggestions_fit_and_are_overrides(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps(job(2).model_dump(mode="json")))
    limit = int(39.4 * GIB)
    found = suggest(job(2), MODEL, limit)
    assert [overrides.split("=")[0] for overrides, _ in found] == [
        "train.gradient_checkpointing",
        "cluster.num_workers",
        "adapter.type",
    ]
    for overrides, choice in found:
        changed = load_job(path, overrides.split())
        assert choose(changed, MODEL, limit).stage == choice.stage
        assert choice.fits


def test_nothing_is_suggested_where_it_fits_or_nothing_helps() -> None:
    assert suggest(job(8), MODEL, int(79 * GIB)) == []
    assert suggest(job(2), MODEL, int(1 * GIB)) == []


def test_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    small, large = (choose(job(8), MODEL, find_gpu(name).memory).stage for name in ("A100-80GB", "B200"))
    assert small != large
    assert choose_stage(job(8), tmp_path, gpu="NVIDIA A100-SXM4-80GB").stage == small
    named = job(cluster={"num_workers": 8, "gpus_per_worker": 1, "gpu": "B200"})
    assert choose_stage(named, tmp_path, gpu="A100-80GB").stage == large  # the job's word counts
    with pytest.raises(JobError, match="needs to know the GPU"):
        choose_stage(job(8), tmp_path)
    with pytest.raises(JobError, match=r"config\.json cannot be read"):
        choose_stage(job(8), tmp_path / "nowhere")


def test_on_cpu_the_machine_is_shared() -> None:
    one, two = (
        memory_limit(parse_job({**job().model_dump(), "cluster": {"num_workers": n}})) for n in (1, 2)
    )
    assert one is not None
    assert two is not None
    assert one // 2 == two


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("H100-80GB", "H100-80GB"),
        ("h100", "H100-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA H100 PCIe", "H100-PCIE-80GB"),
        ("A100-80G", "A100-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA H200", "H200-141GB"),
        ("NVIDIA L4", "L4-24GB"),
        ("L40S", "L40S-48GB"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090-24GB"),
    ],
)
def test_gpus_by_the_names_people_use(name: str, found: str) -> None:
    assert find_gpu(name).name == found


@pytest.mark.parametrize("gpu", GPUS)
def test_every_gpu_is_found_by_its_own_name_and_has_a_bit_less_than_it_says(gpu: Any) -> None:
    assert find_gpu(gpu.name) == gpu
    says = int(gpu.name.rpartition("-")[2].removesuffix("GB"))
    assert 0.88 * says < gpu.memory_gib <= says


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("A100", "is made in several sizes. Write A100-40GB or A100-80GB"),
        ("H1000-80GB", "Did you mean H100-80GB"),
        ("H100-40GB", "is not known"),
        ("potato", "Known are"),
    ],
)
def test_unknown_gpus(name: str, message: str) -> None:
    with pytest.raises(JobError) as caught:
        find_gpu(name)
    assert message in str(caught.value)


def test_flops_of_a_token() -> None:
    """8B at 2048 tokens: 6 N, and 12 layers x hidden x half of the row for causal attention."""
    full = flops_per_token(job(), MODEL)
    assert full == 6 * MODEL.total + 6 * 32 * 4096 * 2048
    assert flops_per_token(job(adapter={"type": "lora"}), MODEL) == full - 2 * MODEL.total
    assert flops_per_token(job(train={"gradient_checkpointing": True}), MODEL) == full + 2 * MODEL.total


def test_the_plan_as_printed() -> None:
    out = io.StringIO()
    planned = job(2, cluster={"num_workers": 2, "gpus_per_worker": 1, "gpu": "A100-40GB"})
    gpu = find_gpu("A100-40GB")
    render(planned, MODEL, choose(planned, MODEL, gpu.memory), Console(file=out, width=120), gpu)
    text = out.getvalue()
    assert "8,030,261,248 parameters, 8,030,261,248 trained" in text
    assert "Stage 3: no stage fits" in text
    assert "It would fit with cluster.num_workers=" in text
    (row,) = [line for line in text.splitlines() if "gradients" in line]
    assert [cell.strip() for cell in row.strip("│ ").split("│")] == [
        "gradients",
        "29.92",
        "29.92",
        "14.96",
        "14.96",
    ]


def test_predicted_against_measured() -> None:
    out = io.StringIO()
    plan = chosen(79).plan
    Console(file=out, width=100).print(
        compare(plan, [plan.device / 1e9, 1.1 * plan.device / 1e9], on_gpu=False)
    )
    assert "+0%" in out.getvalue()
    assert "+10%" in out.getvalue()
