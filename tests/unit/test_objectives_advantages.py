"""Advantages and weights against numbers computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rayft.objectives.advantages import (
    EPSILON,
    gae,
    group_relative,
    leave_one_out,
    overlong_penalty,
    returns_to_go,
    token_rewards,
    whiten,
    without_spread,
)
from rayft.objectives.aggregation import token_weights


def test_gae_of_one_answer() -> None:
    """gamma 0.9, lambda 0.8: deltas are r + 0.9 v' - v, each counts 0.72 of the next."""
    rewards, values = np.array([0.0, 1.0, 2.0]), np.array([0.5, 1.0, 1.5])
    deltas = [0.9 * 1.0 - 0.5, 1.0 + 0.9 * 1.5 - 1.0, 2.0 - 1.5]
    last = deltas[2]
    middle = deltas[1] + 0.72 * last
    first = deltas[0] + 0.72 * middle
    [advantages], [returns] = gae([rewards], [values], gamma=0.9, gae_lambda=0.8)
    np.testing.assert_allclose(advantages, [first, middle, last], rtol=1e-12)
    np.testing.assert_allclose(returns, advantages + values, rtol=1e-12)


def test_gae_passes_over_what_the_policy_did_not_write() -> None:
    """Tokens 1100011 of which three came from a tool: the four others are neighbours (gamma 1, lambda 0.95, values 0.5)."""
    written = np.array([1, 1, 0, 0, 0, 1, 1], bool)
    values, rewards = np.full(7, 0.5), np.zeros(7)
    rewards[-1] = 1.0
    [advantages], _ = gae([rewards[written]], [values[written]], gamma=1.0, gae_lambda=0.95)
    np.testing.assert_allclose(advantages, [0.4286875, 0.45125, 0.475, 0.5], rtol=1e-12)


def test_gae_of_an_answer_that_was_cut_off_goes_on_with_the_value_after_it() -> None:
    [cut], _ = gae([np.zeros(1)], [np.array([0.25])], gamma=0.5, gae_lambda=1.0, after=[2.0])
    [ended], _ = gae([np.zeros(1)], [np.array([0.25])], gamma=0.5, gae_lambda=1.0)
    assert cut.tolist() == [0.75]
    assert ended.tolist() == [-0.25]


def test_rewards_of_tokens_and_returns_to_go() -> None:
    rewards = token_rewards(3.0, np.array([0.5, 0.0, 1.0]))
    assert rewards.tolist() == [-0.5, 0.0, 2.0]
    assert returns_to_go(rewards, 1.0).tolist() == [1.5, 2.0, 2.0]
    assert returns_to_go(rewards, 0.5).tolist() == [0.0, 1.0, 2.0]


def test_group_relative() -> None:
    """(0, 1, 2) has mean 1 and sample deviation 1; all six scores have sample deviation sqrt(6 / 5) around 2."""
    scores = np.array([[0.0, 1.0, 2.0], [2.0, 3.0, 4.0]])
    deviation = np.sqrt(10.0 / 5)
    np.testing.assert_allclose(group_relative(scores, "none"), [[-1, 0, 1]] * 2)
    np.testing.assert_allclose(group_relative(scores, "group"), np.array([[-1, 0, 1]] * 2) / (1 + EPSILON))
    np.testing.assert_allclose(
        group_relative(scores, "batch"), np.array([[-1, 0, 1]] * 2) / (deviation + EPSILON)
    )


def test_leave_one_out() -> None:
    np.testing.assert_allclose(leave_one_out(np.array([[0.0, 1.0, 5.0]])), [[-3.0, -1.5, 4.5]])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_group_without_spread_teaches_nothing(scale: str) -> None:
    """Exactly: thirds do not cancel in floating point, and a deviation of rounding errors would blow them up."""
    scores = np.array([[0.1, 0.1, 0.1], [0.0, 0.0, 1.0]])
    assert group_relative(scores, scale)[0].tolist() == [0.0] * 3  # type: ignore[arg-type]
    assert leave_one_out(scores)[0].tolist() == [0.0] * 3
    assert without_spread(scores).tolist() == [True, False]


def test_a_single_answer_has_no_group() -> None:
    for estimator in (lambda s: group_relative(s, "group"), leave_one_out):
        with pytest.raises(ValueError, match="num_generations"):
            estimator(np.array([[1.0]]))


def test_whitening_is_over_all_tokens() -> None:
    """1, 2, 3, 6: mean 3, sample deviation sqrt(14 / 3)."""
    deviation = np.sqrt(14 / 3) + EPSILON
    first, second = whiten([np.array([1.0]), np.array([2.0, 3.0, 6.0])])
    np.testing.assert_allclose(np.concatenate([first, second]), np.array([-2, -1, 0, 3]) / deviation)
    first, second = whiten([np.array([1.0]), np.array([2.0, 3.0, 6.0])], shift=False)
    np.testing.assert_allclose(np.concatenate([first, second]), np.array([-2, -1, 0, 3]) / deviation + 3)


def test_overlong_penalty() -> None:
    found = [overlong_penalty(length, longest=100, buffer=20) for length in (10, 80, 90, 100, 110)]
    assert found == [0.0, 0.0, -0.5, -1.0, -1.0]


def test_weights_of_answers_of_one_and_of_nine_tokens() -> None:
    assert token_weights([1, 9], "token_mean").tolist() == [0.1, 0.1]
    np.testing.assert_allclose(token_weights([1, 9], "sequence_mean"), [1 / 2, 1 / 18])
    np.testing.assert_allclose(token_weights([1, 9], "constant", 20), [1 / 40, 1 / 40])
    np.testing.assert_allclose(token_weights([0, 9], "sequence_mean"), [1 / 2, 1 / 18])
