"""Policy and value losses: exact gradients on a small MDP, clipping by hand, and whatever the layout of a batch."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayft.data.template import Sample
from rayft.model.attention import NAME, register_documents_attention
from rayft.model.head import install_nll_head
from rayft.objectives.advantages import gae, group_relative, leave_one_out
from rayft.objectives.aggregation import token_weights
from rayft.objectives.importance import truncated_importance
from rayft.objectives.policy import (
    Clip,
    PolicyObjective,
    policy_loss,
    token_tensors,
)
from rayft.objectives.value import ValueObjective, value_loss
from tests.tiny import FAMILIES, save_tiny, tiny_model
from tests.unit.test_model_score import built, job_of

#: All answers of three steps over a vocabulary of two tokens.
ANSWERS = list(itertools.product((0, 1), repeat=3))
SCORES = dict(zip(ANSWERS, np.random.default_rng(0).normal(size=8), strict=True))
ONE_EACH = torch.zeros(3, dtype=torch.int64)


class Tabular:
    """A policy with a logit for each token in each of the seven states (what was written so far), float64."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.logits = torch.randn(7, 2, generator=generator, dtype=torch.float64, requires_grad=True)
        prefixes = [prefix for length in range(3) for prefix in itertools.product((0, 1), repeat=length)]
        self.state = {prefix: number for number, prefix in enumerate(prefixes)}

    def logprobs(self, answer: tuple[int, ...]) -> torch.Tensor:
        rows = [self.logits[self.state[answer[:t]]].log_softmax(0)[answer[t]] for t in range(3)]
        return torch.stack(rows)

    def chance(self, answer: tuple[int, ...]) -> float:
        return float(self.logprobs(answer).sum().exp())

    def value(self, prefix: tuple[int, ...]) -> float:
        """The expected score from here on."""
        going = [answer for answer in ANSWERS if answer[: len(prefix)] == prefix]
        chances = np.array([self.chance(answer) for answer in going])
        return float(chances @ [SCORES[answer] for answer in going] / chances.sum())

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, self.logits)[0]

    def gradient_of_return(self) -> torch.Tensor:
        """Of the exact expected score."""
        return self.gradient(
            sum((self.logprobs(a).sum().exp() * SCORES[a] for a in ANSWERS), torch.zeros(()))
        )


def on_policy_loss(
    policy: Tabular, answer: tuple[int, ...], advantages: np.ndarray, ratio: str = "token"
) -> torch.Tensor:
    """Summed over the answer's tokens."""
    logprobs = policy.logprobs(answer)
    losses, ratios, clipped = policy_loss(
        logprobs,
        logprobs.detach(),
        torch.as_tensor(advantages),
        ONE_EACH,
        1,
        ratio=ratio,  # type: ignore[arg-type]
        clip=Clip(),
    )
    assert ratios.tolist() == [1.0] * 3
    assert not clipped.any()
    return losses.sum()


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 1.0])
def test_the_expected_gradient_of_ppo_is_that_of_the_return(gae_lambda: float) -> None:
    """With the true values as critic, whatever lambda is."""
    policy = Tabular()
    expected = torch.zeros(7, 2, dtype=torch.float64)
    for answer in ANSWERS:
        values = np.array([policy.value(answer[:t]) for t in range(3)])
        rewards = np.array([0.0, 0.0, SCORES[answer]])
        [advantages], _ = gae([rewards], [values], gamma=1.0, gae_lambda=gae_lambda)
        expected += policy.chance(answer) * policy.gradient(on_policy_loss(policy, answer, advantages))
    torch.testing.assert_close(-expected, policy.gradient_of_return(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("estimator", ["leave_one_out", "group_relative"])
def test_the_expected_gradient_of_groups_is_that_of_the_return(estimator: str) -> None:
    """Over all groups of two answers. A group's mean holds half of the answer's own score, so half of the gradient is left."""
    policy = Tabular()
    expected = torch.zeros(7, 2, dtype=torch.float64)
    for group in itertools.product(ANSWERS, repeat=2):
        scores = np.array([[SCORES[answer] for answer in group]])
        advantages = leave_one_out(scores) if estimator == "leave_one_out" else group_relative(scores, "none")
        chance = policy.chance(group[0]) * policy.chance(group[1])
        for answer, advantage in zip(group, advantages[0], strict=True):
            loss = on_policy_loss(policy, answer, np.full(3, advantage))
            expected += chance * policy.gradient(loss) / 2
    share = 1.0 if estimator == "leave_one_out" else 0.5
    torch.testing.assert_close(-expected, share * policy.gradient_of_return(), rtol=1e-10, atol=1e-12)


def test_the_ratio_of_a_whole_answer_has_the_same_gradient() -> None:
    """RLOO: one ratio, that stands at each of three tokens."""
    policy = Tabular()
    expected = torch.zeros(7, 2, dtype=torch.float64)
    mean = policy.value(())
    for answer in ANSWERS:
        loss = on_policy_loss(policy, answer, np.full(3, SCORES[answer] - mean), "sequence") / 3
        expected += policy.chance(answer) * policy.gradient(loss)
    torch.testing.assert_close(-expected, policy.gradient_of_return(), rtol=1e-10, atol=1e-12)


class OfTable(PolicyObjective):
    """The objective over log-probabilities that are there."""

    def logprobs(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        return batch["logprobs"]


@pytest.mark.parametrize("known", ["before", "by this pass"])
def test_tokens_of_another_policy_are_weighted_back(known: str) -> None:
    """Of an engine's, that is: wherever a token is drawn by it, the objective's gradient is as if the policy had drawn it. (That the
    engine comes to other places in an answer is not weighted.)"""
    policy, engine = Tabular(), Tabular()
    noise = torch.randn(7, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    engine.logits = (engine.logits + 0.3 * noise).detach()
    objective = OfTable(importance_cap=1e9)
    one = torch.zeros(1, dtype=torch.int64)
    expected = torch.zeros(7, 2, dtype=torch.float64)
    for place, token in itertools.product(policy.state, (0, 1)):
        answer = (*place, token, 0, 0)[:3]
        now, drawn = (one_of.logprobs(answer)[len(place), None] for one_of in (policy, engine))
        batch = {
            "logprobs": now,
            "advantages": torch.tensor([policy.value((*place, token))]),
            "weights": torch.ones(1),
            "target_document": one,
            "last": one,
        }
        if known == "before":
            weights = truncated_importance(now.detach().numpy(), drawn.numpy(), most=1e9)
            batch |= {"old_logprobs": now.detach(), "importance": torch.from_numpy(weights)}
        else:
            batch["engine_logprobs"] = drawn
        loss, _ = objective.loss(None, batch)  # type: ignore[arg-type]
        comes_here = policy.logprobs(answer)[: len(place)].sum().exp()
        expected += float(comes_here * drawn.exp()) * policy.gradient(loss)
    torch.testing.assert_close(-expected, policy.gradient_of_return(), rtol=1e-5, atol=1e-7)


def test_importance_is_truncated() -> None:
    weights = truncated_importance(np.log([0.5, 0.5, 1.0]), np.log([1.0, 0.1, 1e-30]), most=2.0)
    np.testing.assert_allclose(weights, [0.5, 2.0, 2.0])


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.5, 1.0, -1.28, True),  # 1 + high
        (1.5, -1.0, 1.5, False),
        (0.5, 1.0, -0.5, False),
        (0.5, -1.0, 0.8, True),  # 1 - low
        (5.0, -1.0, 3.0, False),  # the dual bound
        (1.1, 2.0, -2.2, False),
    ],
)
def test_clipping(ratio: float, advantage: float, loss: float, clipped: bool) -> None:
    logprobs = torch.tensor([ratio]).log().requires_grad_()
    one = torch.zeros(1, dtype=torch.int64)
    clip = Clip(low=0.2, high=0.28, dual=3.0)
    losses, ratios, was = policy_loss(
        logprobs, torch.zeros(1), torch.tensor([advantage]), one, 1, ratio="token", clip=clip
    )
    assert losses.tolist() == pytest.approx([loss])
    assert ratios.tolist() == pytest.approx([ratio])
    assert was.tolist() == [clipped]
    losses.sum().backward()
    gives_gradient = not clipped and ratio < 3
    assert (logprobs.grad.abs().sum() > 0) == gives_gradient  # type: ignore[union-attr]


def test_ratios_of_answers() -> None:
    """Log-ratios 0.1, 0.3 and 0.2 in two answers: their sum or their mean at each token."""
    logprobs, document = torch.tensor([0.1, 0.3, 0.2]), torch.tensor([0, 0, 1])
    advantages = torch.ones(3)
    for kind, expected in (("sequence", [0.4, 0.4, 0.2]), ("sequence_mean", [0.2, 0.2, 0.2])):
        _, ratios, _ = policy_loss(
            logprobs, torch.zeros(3), advantages, document, 2, ratio=kind, clip=Clip(9, 9)  # type: ignore[arg-type]
        )  # fmt: skip
        assert ratios.log().tolist() == pytest.approx(expected)


def test_a_ratio_beyond_all_bounds_is_finite() -> None:
    logprobs = torch.tensor([100.0], requires_grad=True)
    losses, _, _ = policy_loss(
        logprobs,
        torch.zeros(1),
        torch.tensor([-1.0]),
        torch.zeros(1, dtype=torch.int64),
        1,
        ratio="token",
        clip=Clip(),
    )
    assert torch.isfinite(losses).all()


def test_value_loss() -> None:
    """Old value 1, clip 0.2. Value 2 is held at 1.2: against return 3 the held error counts, against 0 the free one."""
    values, old = torch.tensor([2.0, 2.0, 1.1]), torch.ones(3)
    losses, clipped = value_loss(values, old, torch.tensor([3.0, 0.0, 1.0]), 0.2)
    assert losses.tolist() == pytest.approx([0.5 * 1.8**2, 0.5 * 4.0, 0.5 * 0.01])
    assert clipped.tolist() == [True, False, False]
    losses, clipped = value_loss(values, old, torch.tensor([3.0, 0.0, 1.0]), None)
    assert losses.tolist() == pytest.approx([0.5, 2.0, 0.005])
    assert not clipped.any()


def rollouts(count: int = 5) -> tuple[list[Sample], dict[str, list[np.ndarray]]]:
    """Prompts with answers of uneven length, and all columns of a policy's batch."""
    rng = np.random.default_rng(3)
    samples = []
    for _ in range(count):
        prompt, answer = rng.integers(1, 9), rng.integers(1, 12)
        trained = np.arange(prompt + answer) >= prompt
        samples.append(Sample(rng.integers(0, 256, prompt + answer).astype(np.int32), trained))
    lengths = [int(sample.trained.sum()) for sample in samples]
    weights = token_weights(lengths, "sequence_mean")
    columns = {
        "old_logprobs": [rng.normal(-5.5, 0.2, n) for n in lengths],
        "reference": [rng.normal(-5.5, 0.2, n) for n in lengths],
        "advantages": [np.full(n, rng.normal()) for n in lengths],
        "importance": [rng.uniform(0.5, 1.5, n) for n in lengths],
        "weights": [np.full(n, w) for n, w in zip(lengths, weights, strict=True)],
    }
    return samples, columns


@pytest.mark.parametrize("ratio", ["token", "sequence", "sequence_mean"])
def test_losses_whatever_the_micro_batches(ratio: str) -> None:
    """All answers in one pack, padded, and one at a time with an empty micro-batch: one loss, one gradient, one set of metrics."""
    register_documents_attention()
    model = tiny_model("llama", attention=NAME)
    install_nll_head(model, chunk=7)
    objective = PolicyObjective(ratio=ratio, clip=Clip(0.2, 0.3), temperature=0.8, kl_in_loss="k3")  # type: ignore[arg-type]
    samples, columns = rollouts()
    coef = {"kl_coef": torch.tensor([0.3])}

    def parts(groups: list[list[int]], packed: bool) -> tuple[float, torch.Tensor, dict[str, float]]:
        model.zero_grad()
        total, sums = 0.0, dict[str, float]()
        for group in groups:
            own = {name: [arrays[i] for i in group] for name, arrays in columns.items()}
            batch = token_tensors([samples[i] for i in group], own, packed=packed, pad_id=0) | coef
            loss, metrics = objective.loss(model, batch)
            loss.backward()
            total += float(loss.detach())
            sums = {name: sums.get(name, 0.0) + value for name, value in metrics.items()}
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        return total, gradient, sums

    loss, gradient, metrics = parts([[0, 1, 2, 3, 4]], True)
    assert gradient.norm() > 0
    for groups, packed in (([[0, 1, 2, 3, 4]], False), ([[3], [], [1, 0], [4, 2]], True)):
        other, other_gradient, other_metrics = parts(groups, packed)
        assert other == pytest.approx(loss, rel=1e-5)
        assert (other_gradient - gradient).norm() <= 1e-5 * gradient.norm()
        assert other_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_that_share_their_prompt_are_those_that_have_it_each(family: str) -> None:
    """One loss, one gradient, one set of log-probabilities and values, for prompts of one, two and many tokens."""
    register_documents_attention()
    model = tiny_model(family, attention=NAME)
    install_nll_head(model, chunk=7)
    rng = np.random.default_rng(5)
    samples = []
    for prompt_length, answers in ((9, 3), (1, 2), (2, 2), (14, 1)):
        prompt = rng.integers(0, 250, prompt_length)
        for _ in range(answers):
            ids = np.concatenate([prompt, rng.integers(0, 250, rng.integers(1, 12))]).astype(np.int32)
            samples.append(Sample(ids, np.arange(len(ids)) >= prompt_length))
    lengths = [int(sample.trained.sum()) for sample in samples]
    columns = {
        "old_logprobs": [rng.normal(-5.5, 0.2, n) for n in lengths],
        "advantages": [np.full(n, rng.normal()) for n in lengths],
        "importance": [np.ones(n) for n in lengths],
        "weights": token_weights(lengths, "token_mean"),
    }
    columns["weights"] = [np.full(n, w) for n, w in zip(lengths, columns["weights"], strict=True)]
    objective = PolicyObjective(ratio="token", temperature=0.8)
    found = []
    for shared in (False, True):
        model.zero_grad()
        batch = token_tensors(samples, columns, packed=True, pad_id=0, shared=shared)
        loss, _ = objective.loss(model, batch)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        with torch.no_grad():
            logprobs = objective.logprobs(model, batch)
        at_ends = batch["input_ids"][0][batch["last"]].tolist()
        found.append((float(loss.detach()), gradient, logprobs, at_ends, batch["input_ids"].shape[1]))
    (loss, gradient, logprobs, ends, tokens), (other, other_gradient, other_logprobs, other_ends, fewer) = (
        found
    )
    assert other == pytest.approx(loss, rel=1e-5)
    assert gradient.norm() > 0
    assert (other_gradient - gradient).norm() <= 1e-5 * gradient.norm()
    assert torch.allclose(other_logprobs, logprobs, atol=1e-5)
    assert other_ends == ends == [int(sample.ids[-1]) for sample in samples]
    assert tokens - fewer == 2 * 8 + 1  # two of three answers do without 8 tokens, one of two without 1


def test_the_only_update_of_a_step_needs_no_pass_before_it() -> None:
    """Given what the engine thought alone, loss and gradient are those with the old probabilities looked up before."""
    register_documents_attention()
    model = tiny_model("llama", attention=NAME)
    install_nll_head(model, chunk=7)
    samples, columns = rollouts()
    told: list[torch.Tensor] = []
    objective = PolicyObjective(kl_in_loss="k3", temperature=0.8, importance_cap=1.1, tell=told.append)
    kept = {name: columns[name] for name in ("advantages", "weights", "reference")}
    with torch.no_grad():
        flat = objective.logprobs(model, token_tensors(samples, {}, packed=True, pad_id=0)).numpy()
    old = np.split(flat, np.cumsum([len(array) for array in columns["weights"]])[:-1])
    engine = [array + np.float32(0.2) * np.sin(np.arange(len(array), dtype=np.float32)) for array in old]
    importance = [truncated_importance(o, e, 1.1) for o, e in zip(old, engine, strict=True)]
    assert max(weight.max() for weight in importance) == 1.1
    found = []
    for more in ({"old_logprobs": old, "importance": importance}, {"engine_logprobs": engine}):
        model.zero_grad()
        batch = token_tensors(samples, {**kept, **more}, packed=True, pad_id=0)
        loss, metrics = objective.loss(model, batch | {"kl_coef": torch.tensor([0.3])})
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((loss.item(), gradient, metrics))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]
    assert found[1][2]["moved"] == 0.0
    [seen] = told
    assert np.array_equal(seen.numpy(), flat)


def test_padding_with_the_token_that_ends_a_turn_changes_nothing() -> None:
    """What is trained goes by lengths, never by ids: the end of an answer counts, the same id behind it does not."""
    model = tiny_model("llama")
    samples, columns = rollouts()
    end = 257
    for sample in samples:
        sample.ids[-1] = end
    found = []
    for pad_id in (0, end):
        model.zero_grad()
        batch = token_tensors(samples, columns, packed=False, pad_id=pad_id)
        loss, _ = PolicyObjective().loss(model, batch)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((loss.item(), gradient, len(PolicyObjective().logprobs(model, batch))))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-6, atol=1e-9)
    assert found[0][2] == sum(int(sample.trained.sum()) for sample in samples)


def test_log_probabilities_in_bf16_are_close_to_those_in_fp32() -> None:
    """The softmax is taken in fp32: what is left is the rounding of weights and logits, half a percent of a nat on average."""
    model = tiny_model("llama")
    samples, _ = rollouts(40)
    batch = token_tensors(samples, {}, packed=False, pad_id=0)
    with torch.no_grad():
        exact = PolicyObjective().logprobs(model, batch)
        rounded = PolicyObjective().logprobs(model.bfloat16(), batch)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().mean().item() < 5e-3


def test_what_a_batch_says_is_what_counts() -> None:
    """The loss of one pack against a sum written out: importance, weights, clipping, the weighted penalty."""
    register_documents_attention()
    model = tiny_model("llama", attention=NAME)
    install_nll_head(model, chunk=7)
    samples, columns = rollouts()
    objective = PolicyObjective(clip=Clip(0.1, 0.1), kl_in_loss="k3")
    batch = token_tensors(samples, columns, packed=True, pad_id=0) | {"kl_coef": torch.tensor([0.3])}
    with torch.no_grad():
        logprobs = objective.logprobs(model, batch).tolist()
        found, metrics = objective.loss(model, batch)
    expected, penalty = 0.0, 0.0
    flat = {name: np.concatenate(arrays) for name, arrays in columns.items()}
    for n, logprob in enumerate(logprobs):
        ratio = np.exp(logprob - flat["old_logprobs"][n])
        advantage = flat["advantages"][n]
        loss = max(-ratio * advantage, -min(max(ratio, 0.9), 1.1) * advantage)
        d = logprob - flat["reference"][n]
        kl = (np.exp(-d) - 1 + d) * ratio
        expected += flat["weights"][n] * (flat["importance"][n] * loss + 0.3 * kl)
        penalty += flat["weights"][n] * kl
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert metrics["kl_loss"] == pytest.approx(penalty, rel=1e-5)


def test_values_are_of_the_states_before_the_tokens(tmp_path: Path) -> None:
    """Packed and padded, against transformers' own hidden states, one answer at a time."""
    job = job_of(save_tiny(tmp_path / "model"))
    model = built(job, tmp_path / "cache")
    samples, _ = rollouts()
    expected = []
    with torch.no_grad():
        for sample in samples:
            ids = torch.from_numpy(sample.ids.astype(np.int64))[None]
            hidden = model.model(input_ids=ids, use_cache=False)[0][0]
            start = int(sample.trained.argmax())
            expected.append((hidden[start - 1 : -1] @ model.score.weight.t())[:, 0])
        for packed in (True, False):
            values = ValueObjective().values(model, token_tensors(samples, {}, packed=packed, pad_id=0))
            torch.testing.assert_close(values, torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_columns_have_a_value_for_each_token() -> None:
    samples, columns = rollouts()
    columns["advantages"][2] = columns["advantages"][2][:-1]
    with pytest.raises(AssertionError, match="advantages"):
        token_tensors(samples, columns, packed=True, pad_id=0)
