"""The whole copy of a sharded policy is there for as long as answers are drawn, and no longer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rayft.rlhf.actors import PolicyActor
from rayft.rlhf.engines import GatheredModel
from tests.tiny import save_tiny, tiny_model
from tests.unit.test_rlhf_parts import job_of


def size_of(gathered: GatheredModel) -> int:
    return sum(parameter.numel() for parameter in gathered.module.parameters())


@pytest.mark.parametrize("fails", [False, True])
def test_it_is_freed_after_the_phase(fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(
        model={"path": str(save_tiny(tmp_path / "model"))},
        train={"global_batch_size": 2, "precision": "fp32"},
    )
    policy = tiny_model(seed=5)
    named = [(name, parameter.data) for name, parameter in policy.named_parameters()]
    learner: Any = SimpleNamespace(job=job, weights=lambda **_: [named[:3], named[3:]])
    gathered = GatheredModel(job, learner, "cpu")
    assert size_of(gathered) == 0
    ids = torch.arange(5)[None]
    seen: list[torch.Tensor] = []

    def draw(*_: Any) -> list[Any]:
        with torch.no_grad():
            seen.append(gathered.module(ids).logits)
        if fails:
            raise RuntimeError("no answer")
        return []

    monkeypatch.setattr("rayft.rlhf.actors.draw_unit", draw)
    actor = object.__new__(PolicyActor)
    actor._gathered, actor.job = gathered, job
    actor.engine = actor.tokenizer = None  # type: ignore[assignment]
    if fails:
        with pytest.raises(RuntimeError, match="no answer"):
            actor.generate([object()])  # type: ignore[list-item]
    else:
        actor.generate([object(), object()])  # type: ignore[list-item]
    with torch.no_grad():
        wanted = policy(ids).logits
    assert all(torch.allclose(logits, wanted, atol=1e-5) for logits in seen)
    assert len(seen) == (1 if fails else 2)
    assert size_of(gathered) == 0, "the copy outlives the phase"
