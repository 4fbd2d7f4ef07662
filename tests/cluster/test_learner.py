"""The learner against a plain PyTorch loop, over ranks, ZeRO stages, accumulation and packing; and its fragments.

A grid runs in one group of ranks, since starting processes costs more than the steps.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.cluster.steps import (
    Fragments,
    first_gradients,
    learner_of,
    plan_of,
    prepare_folder,
    reference_losses,
    small_job,
    state_of,
    train_steps,
    with_filled_adapters,
)
from tests.ranks import run_ranks

STEPS = 20
STAGES = (0, 1, 2, 3)
#: So small that the model has several, as large models have.
SUB_GROUPS = {"zero_optimization": {"sub_group_size": 5000}}
ADAPTER = {"type": "lora", "lora_r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_folder(tmp_path_factory.mktemp("learner"))


def job_of(folder: Path, **train: Any) -> Any:
    return small_job(folder, train=train)


def _grid(folder: Path, cells: list[tuple[int, int, bool]]) -> dict[tuple[int, int, bool], list[float]]:
    """Losses of every (stage, accumulation, packed) on this group of ranks."""
    losses = {}
    for stage, accumulation, packed in cells:
        rows = 8 // (accumulation * dist.get_world_size())
        job = small_job(
            folder,
            train={"micro_batch_size": max(1, rows if not packed else 4 // accumulation)},
            deepspeed=SUB_GROUPS if stage == 3 else {},
        )
        plan = plan_of(job, folder, stage=stage, packed=packed)
        learner = learner_of(plan, folder)
        results, _ = train_steps(learner, plan, folder, STEPS)
        learner.close()
        losses[stage, accumulation, packed] = [loss for loss, _ in results]
    return losses


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.full), 2])
def test_same_losses_however_the_step_is_split(folder: Path, world_size: int) -> None:
    """{1, 2 ranks} x {ZeRO 0 to 3} x {accumulation 1, 4} x {packed, not}: the losses of a plain loop, to 1e-5."""
    plan = plan_of(small_job(folder), folder, stage=0, packed=True)
    expected, _ = reference_losses(plan, folder, STEPS)
    cells = list(itertools.product(STAGES, (1, 4), (True, False)))
    for losses in run_ranks(_grid, world_size, folder, cells):
        for cell, measured in losses.items():
            assert measured[0] == pytest.approx(expected[0], abs=1e-6), cell
            np.testing.assert_allclose(measured, expected, rtol=1e-5, err_msg=str(cell))


def _from_start(folder: Path, adapter: dict[str, Any]) -> tuple[dict[str, np.ndarray], Any, Any]:
    """The trained parameters before the first step, its gradients, and the losses of all steps."""
    plan = plan_of(small_job(folder, adapter=adapter), folder, stage=2, packed=True)
    learner = learner_of(plan, folder)
    start = with_filled_adapters(state_of(learner))
    learner.load(Fragments(start), 0)  # type: ignore[arg-type]
    losses = [loss for loss, _ in train_steps(learner, plan, folder, STEPS)[0]]
    learner.close()
    job = small_job(folder, adapter=adapter, train={"max_grad_norm": 0.0})
    gradients = first_gradients(plan_of(job, folder, stage=2, packed=True), folder, start)
    return {name: data for (name, kind), data in start.items() if kind == "param"}, gradients, losses


@pytest.mark.parametrize("adapter", [{}, ADAPTER], ids=["full", "lora"])
def test_losses_and_gradients_of_a_plain_loop(folder: Path, adapter: dict[str, Any]) -> None:
    """Gradients of every parameter by norm of the difference over norm to 1e-6, losses to 1e-5 over 20 steps."""
    plan = plan_of(small_job(folder, adapter=adapter), folder, stage=0, packed=True)
    start, gradients, losses = run_ranks(_from_start, 2, folder, adapter)[0]
    expected_losses, expected = reference_losses(plan, folder, STEPS, start)
    assert losses[0] == pytest.approx(expected_losses[0], rel=1e-6)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        difference = torch.from_numpy(gradients[name]).view_as(gradient) - gradient
        assert difference.norm() <= 1e-6 * gradient.norm(), name


def _resume(folder: Path, precision: str, kind: str) -> dict[str, Any]:
    """At every stage: 3 + 3 steps against 6 straight, then 3 steps from the state that stage 2 had after 3."""
    outcome: dict[str, Any] = {}
    common: Any = None
    for stage in (2, 0, 1, 3):
        job = small_job(
            folder,
            kind,
            train={"precision": precision, "micro_batch_size": 1, "max_steps": 6},
            deepspeed=SUB_GROUPS if stage == 3 else {},
        )
        plan = plan_of(job, folder, stage=stage, packed=True)
        learner = learner_of(plan, folder)
        _, position = train_steps(learner, plan, folder, 3)
        saved, updates = state_of(learner), learner.optimizer_step()
        straight, _ = train_steps(learner, plan, folder, 3, first=3, start=position)
        final = state_of(learner)
        learner.close()
        common = common or (saved, updates)
        for name, (state, count) in {"own": (saved, updates), "stage 2": common}.items():
            learner = learner_of(plan, folder)
            learner.load(Fragments(state), count)  # type: ignore[arg-type]
            resumed, _ = train_steps(learner, plan, folder, 3, first=3, start=position)
            again = state_of(learner)
            learner.close()
            outcome[f"{stage} from {name}"] = (
                straight,
                resumed,
                all(np.array_equal(final[key], again[key]) for key in final),
            )
    return outcome


OTHERS = [
    pytest.param(precision, kind, marks=pytest.mark.full)
    for kind in ("reward", "dpo", "kto")
    for precision in ("fp32", "bf16")
]


@pytest.mark.parametrize(("precision", "kind"), [("fp32", "sft"), ("bf16", "sft"), *OTHERS])
def test_fragments_resume_exactly_at_every_stage(folder: Path, precision: str, kind: str) -> None:
    for outcome in run_ranks(_resume, 2, folder, precision, kind):
        for name, (straight, resumed, equal) in outcome.items():
            if name.endswith("own"):
                assert resumed == straight, name
                assert equal, name
            elif precision == "fp32":
                np.testing.assert_allclose(resumed, straight, rtol=1e-4, err_msg=name)


#: Options of DeepSpeed's own that rayft knows nothing of, each at a stage that has it.
PASSED_THROUGH = {
    "hpZ": (3, {"zero_hpz_partition_size": 2}),
    "parameters offloaded": (3, {"offload_param": {"device": "cpu"}}),
    "prefetching off": (3, {"stage3_prefetch_bucket_size": 0}),
    "small buckets": (2, {"reduce_bucket_size": 2000, "allgather_bucket_size": 2000}),
}


def _passed_through(folder: Path) -> dict[str, tuple[list[float], bool]]:
    """Losses with each option, and whether 3 + 3 steps end where 6 straight ones do."""
    from deepspeed.utils import groups

    outcome = {}
    for name, (stage, zero) in PASSED_THROUGH.items():
        job = small_job(folder, train={"max_steps": 6}, deepspeed={"zero_optimization": zero})
        plan = plan_of(job, folder, stage=stage, packed=True)
        learner = learner_of(plan, folder)
        first, position = train_steps(learner, plan, folder, 3)
        saved, updates = state_of(learner), learner.optimizer_step()
        second, _ = train_steps(learner, plan, folder, 3, first=3, start=position)
        final = state_of(learner)
        learner.close()
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # hpZ's, which DeepSpeed makes once in a process
        learner = learner_of(plan, folder)
        learner.load(Fragments(saved), updates)  # type: ignore[arg-type]
        train_steps(learner, plan, folder, 3, first=3, start=position)
        again = state_of(learner)
        learner.close()
        outcome[name] = (
            [loss for loss, _ in [*first, *second]],
            all(np.array_equal(final[key], again[key]) for key in final),
        )
    return outcome


def test_options_of_deepspeed_pass_through(folder: Path) -> None:
    """Parameter offload, hpZ and bucket sizes change neither the losses nor an exact resume."""
    plan = plan_of(small_job(folder, train={"max_steps": 6}), folder, stage=0, packed=True)
    expected, _ = reference_losses(plan, folder, 6)
    for outcome in run_ranks(_passed_through, 2, folder):
        for name, (losses, equal) in outcome.items():
            np.testing.assert_allclose(losses, expected, rtol=1e-5, err_msg=name)
            assert equal, name
