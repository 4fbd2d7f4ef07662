"""Every method against its loss written out in a plain PyTorch loop, over ranks, ZeRO stages, accumulation and packing."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.cluster.methods import METHODS, write_comparisons
from tests.cluster.steps import (
    Fragments,
    first_gradients,
    learner_of,
    plan_of,
    prepare_folder,
    reference_losses,
    small_job,
    state_of,
    step_plans,
    train_steps,
    with_filled_adapters,
)
from tests.ranks import run_ranks
from tests.tiny import FAMILIES

STEPS = 8
#: Norm of the difference over norm: rows' gradients nearly cancel in rankings, whose own fp32 noise is 3e-6.
GRADIENTS = 5e-6
#: Other families' own noise is larger: as in `tests/unit/test_model_families.py`.
FAMILY_GRADIENTS = 1e-5
NAMES = [name for name in METHODS if name != "sft"]
ADAPTER = {"type": "lora", "lora_r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_folder(tmp_path_factory.mktemp("methods"))


def job_of(folder: Path, name: str, adapter: dict[str, Any], **train: Any) -> Any:
    return small_job(folder, name, adapter=adapter, train={"max_steps": STEPS, **train})


def _start(folder: Path, name: str, adapter: dict[str, Any]) -> dict[tuple[str, str], np.ndarray]:
    """The training state before the first step, filled adapters and all."""
    learner = learner_of(plan_of(job_of(folder, name, adapter), folder, stage=0, packed=True), folder)
    state = with_filled_adapters(state_of(learner))
    learner.close()
    return state


def parameters(state: dict[tuple[str, str], np.ndarray]) -> dict[str, np.ndarray]:
    return {name: data for (name, kind), data in state.items() if kind == "param"}


def _losses(
    folder: Path,
    names: list[str],
    adapter: dict[str, Any],
    start: dict[str, dict[tuple[str, str], np.ndarray]],
    cells: list[tuple[int, int, bool]],
) -> dict[Any, tuple[list[float], dict[str, np.ndarray]]]:
    """Losses of every method in every (stage, rows of a micro-batch, packed), and the first gradients in the first cell."""
    outcome = {}
    for name in names:
        gradients: dict[str, np.ndarray] = {}
        for stage, rows, packed in cells:
            plan = plan_of(
                job_of(folder, name, adapter, micro_batch_size=rows), folder, stage=stage, packed=packed
            )
            learner = learner_of(plan, folder)
            learner.load(Fragments(start[name]), 0)  # type: ignore[arg-type]
            losses = [loss for loss, _ in train_steps(learner, plan, folder, STEPS)[0]]
            learner.close()
            if not gradients:
                job = job_of(folder, name, adapter, micro_batch_size=rows, max_grad_norm=0.0)
                unclipped = plan_of(job, folder, stage=stage, packed=packed)
                gradients = first_gradients(unclipped, folder, start[name])
            outcome[name, stage, rows, packed] = (losses, gradients)
    return outcome


def _starts(folder: Path, names: list[str], adapter: dict[str, Any]) -> dict[str, Any]:
    return {name: _start(folder, name, adapter) for name in names}


def check(
    folder: Path,
    names: list[str],
    adapter: dict[str, Any],
    world_size: int,
    cells: list[Any],
    bound: float = GRADIENTS,
) -> None:
    """Losses to 1e-6 at the first step and 1e-5 over all, gradients to `bound`."""
    starts = run_ranks(_starts, 1, folder, names, adapter)[0]
    measured = run_ranks(_losses, world_size, folder, names, adapter, starts, cells, timeout_s=600)[0]
    for name in names:
        plan = plan_of(job_of(folder, name, adapter), folder, stage=0, packed=True)
        expected, expected_gradients = reference_losses(plan, folder, STEPS, parameters(starts[name]), name)
        for cell in [(name, *cell) for cell in cells]:
            losses, gradients = measured[cell]
            assert losses[0] == pytest.approx(expected[0], rel=1e-6), cell
            np.testing.assert_allclose(losses, expected, rtol=1e-5, err_msg=str(cell))
            assert gradients.keys() == expected_gradients.keys()
            # What moves all scores alike has no gradient in a ranking, and only fp32's noise to compare.
            largest = max(gradient.norm().item() for gradient in expected_gradients.values())
            noise = 4 * torch.finfo(torch.float32).eps * largest
            for parameter, gradient in expected_gradients.items():
                difference = torch.from_numpy(gradients[parameter]).view_as(gradient) - gradient
                assert difference.norm() <= bound * gradient.norm() + noise, (cell, parameter)
        assert abs(expected[-1] - expected[0]) > 1e-3, "nothing was learned, so nothing was compared"


@pytest.mark.parametrize("adapter", [{}, ADAPTER], ids=["full", "lora"])
def test_losses_and_gradients_of_a_plain_loop(folder: Path, adapter: dict[str, Any]) -> None:
    """One cell: two ranks, ZeRO-2, packed, several micro-batches."""
    check(folder, NAMES, adapter, 2, [(2, 1, True)])


@pytest.mark.full
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_however_the_step_is_split(folder: Path, name: str, world_size: int) -> None:
    """{1, 2 ranks} x {ZeRO 0 to 3} x {micro-batches of 1 and of 4 rows} x {packed, not}."""
    check(folder, [name], {}, world_size, list(itertools.product((0, 1, 2, 3), (1, 4), (True, False))))


@pytest.mark.parametrize(
    "family",
    [
        "gemma2",
        *(
            pytest.param(name, marks=pytest.mark.full)
            for name in sorted(FAMILIES.keys() - {"gemma2", "llama"})
        ),
    ],
)
def test_every_family(family: str, tmp_path: Path) -> None:
    """One method of each way through the model: scores, answers' log-probabilities, those of mismatched answers."""
    folder = prepare_folder(tmp_path, family)
    check(folder, ["reward_ranked", "dpo", "kto"], {}, 1, [(0, 4, True)], FAMILY_GRADIENTS)


def _known(folder: Path, name: str, steps: list[int]) -> list[bool]:
    """After starts of one run with so many steps each: whether the last knows the reference of all its steps."""
    for count in steps:
        data = {
            "train": [
                {"path": str(folder / METHODS[name][0]), "weight": 0.9},
                {"path": str(folder / f"more-{METHODS[name][0]}"), "weight": 0.1},
            ],
            "max_length": 64,
        }
        job = small_job(folder, name, data=data, train={"max_steps": count})
        plan = plan_of(job, folder, stage=0, packed=True)
        learner = learner_of(plan, folder)
        objective: Any = learner.objective
        known = [
            objective.references.of(corpus).has(objective.wanted(step))
            for corpus, step in step_plans(plan, folder, count)
        ]
        learner.close()
    return known


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_the_reference_of_rare_rows_is_known(folder: Path, tmp_path: Path, name: str) -> None:
    """A source of which an epoch shows a part only, after an earlier start that saw one epoch; on two ranks."""
    for file in ("model", METHODS[name][0]):
        (tmp_path / file).symlink_to(folder / file)
    more = prepare_folder_rows(tmp_path / "more", METHODS[name][0])
    (tmp_path / f"more-{METHODS[name][0]}").symlink_to(more)
    for known in run_ranks(_known, 2, tmp_path, name, [6, 40]):
        assert len(known) == 40
        assert all(known)


def prepare_folder_rows(folder: Path, file: str) -> Path:
    folder.mkdir()
    write_comparisons(folder, seed=1)
    return folder / file
