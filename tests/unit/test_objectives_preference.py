"""Direct preference objectives in closed form: ln 2 at the start, hand numbers, what each loss leaves out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rayft.errors import JobError
from rayft.objectives.preference import log1mexp, preference_loss, sum_by_document
from rayft.spec import Dpo, parse_job

LENGTHS = torch.tensor([[2.0, 4.0], [5.0, 1.0]])
LOGPROBS = torch.tensor([[-3.0, -8.0], [-9.0, -2.0]])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def loss_of(reference: torch.Tensor | None, **dpo: Any) -> list[float]:
    return preference_loss(Dpo(**dpo), LOGPROBS, LENGTHS, reference)[0].tolist()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_policy_that_is_its_reference_costs_ln_2_and_earns_nothing(smoothing: float) -> None:
    losses, rewards = preference_loss(Dpo(label_smoothing=smoothing), LOGPROBS, LENGTHS, LOGPROBS)
    assert losses.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-7)
    assert torch.equal(rewards, torch.zeros(2, 2))


def test_dpo_by_hand() -> None:
    reference = torch.tensor([[-5.0, -7.0], [-9.0, -9.0]])
    margins = [2.0 - -1.0, 0.0 - 7.0]
    assert loss_of(reference, beta=0.5) == pytest.approx([-math.log(sigmoid(0.5 * m)) for m in margins])
    smoothed = [-0.9 * math.log(sigmoid(0.5 * m)) - 0.1 * math.log(sigmoid(-0.5 * m)) for m in margins]
    assert loss_of(reference, beta=0.5, label_smoothing=0.1) == pytest.approx(smoothed)
    averaged = [2.0 / 2 - -1.0 / 4, 0.0 - 7.0 / 1]
    assert loss_of(reference, beta=0.5, length_normalized=True) == pytest.approx(
        [-math.log(sigmoid(0.5 * m)) for m in averaged]
    )
    assert loss_of(reference, beta=0.5, loss="ipo") == pytest.approx([(m - 1) ** 2 for m in averaged])
    rewards = preference_loss(Dpo(beta=0.5), LOGPROBS, LENGTHS, reference)[1]
    assert rewards.tolist() == [[1.0, -0.5], [0.0, 3.5]]


def test_without_a_reference_by_hand() -> None:
    averages = [(-1.5, -2.0), (-1.8, -2.0)]
    simpo = [-math.log(sigmoid(2.0 * (c - r) - 1.6)) for c, r in averages]
    assert loss_of(None, loss="simpo", simpo_gamma=1.6) == pytest.approx(simpo)
    odds = [[math.exp(p) / (1 - math.exp(p)) for p in pair] for pair in averages]
    orpo = [-0.1 * math.log(sigmoid(math.log(c / r))) for c, r in odds]
    assert loss_of(None, loss="orpo") == pytest.approx(orpo, rel=1e-5)


def test_log_of_one_minus_exp_near_and_far() -> None:
    x = torch.tensor([-1e-6, -1e-3, -0.5, -0.7, -3.0, -40.0], requires_grad=True)
    exact = torch.log(-torch.expm1(x.detach().double()))
    assert log1mexp(x).tolist() == pytest.approx(exact.tolist(), rel=1e-5)
    log1mexp(x).sum().backward()
    assert x.grad is not None
    expected = -torch.exp(x.detach().double()) / -torch.expm1(x.detach().double())
    assert x.grad.tolist() == pytest.approx(expected.tolist(), rel=1e-4)


def test_a_certain_answer_gives_orpo_finite_numbers() -> None:
    for certain in ([0.0, -2.0], [-2.0, 0.0], [0.0, 0.0]):
        logprobs = torch.tensor([certain], requires_grad=True)
        loss = preference_loss(Dpo(loss="orpo"), logprobs, torch.ones(1, 2), None)[0].sum()
        loss.backward()
        assert math.isfinite(loss.item())
        assert logprobs.grad is not None
        assert torch.isfinite(logprobs.grad).all()


def test_sums_go_by_document() -> None:
    summed = sum_by_document(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 2]), 4)
    assert summed.tolist() == [1.0, 0.0, 6.0, 0.0]


VALUES: dict[str, Any] = {"name": "x", "model": {"path": "m"}, "data": {"train": [{"path": "a"}]}}

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"method": "dpo", "dpo": {"loss": "ipo", "label_smoothing": 0.1}}, "dpo.label_smoothing is for dpo.loss sigmoid or simpo"),
    ({"method": "dpo", "dpo": {"loss": "kto", "nll_coef": 1}}, "dpo.nll_coef is for"),
    ({"method": "dpo", "dpo": {"loss": "kto"}, "train": {"global_batch_size": 1}}, "kto needs train.global_batch_size"),
    ({"method": "dpo", "dpo": {"label_smoothing": 0.5}}, "label_smoothing"),
    ({"method": "dpo", "adapter": {"type": "lora", "lora_dropout": 0.1}}, "adapter.lora_dropout must be 0"),
    ({"method": "dpo", "data": {"train": [{"path": "a"}], "loss_on": "all"}}, "data.loss_on is for method sft"),
    ({"dpo": {"beta": 0.2}}, "dpo: this group does nothing under method sft"),
    ({"method": "dpo", "reward": {"heads": 2}}, "reward: this group does nothing under method dpo"),
    ({"method": "reward", "eval": {"suites": [{"name": "q", "type": "qa", "path": "q"}]}}, "eval.suites"),
]  # fmt: skip


@pytest.mark.parametrize(("groups", "says"), REFUSED)
def test_settings_that_do_nothing_are_refused(groups: dict[str, Any], says: str) -> None:
    with pytest.raises(JobError, match=says):
        parse_job({**VALUES, **groups})
