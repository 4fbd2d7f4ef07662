"""Advantages of rollouts: how much better each answer, or each of its tokens, was than expected.

Pure functions over numpy arrays in float64. Shapes: P prompts, G answers to each, S = P * G sequences, T tokens of one
sequence's answer. Lists hold one array per sequence. A token that the policy did not write (a tool's output) is in none of the arrays, so that it
neither discounts nor carries anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

#: Added to standard deviations. Answers that differ by less are as good as alike.
EPSILON = 1e-4


def token_rewards(score: float, penalties_T: np.ndarray) -> np.ndarray:
    """Reward of each token, float64[T]: minus its penalty (such as kl_coef times KL), and at the last the answer's score."""
    rewards = -np.asarray(penalties_T, np.float64)
    rewards[-1] += score
    return rewards


def gae(
    rewards: Sequence[np.ndarray],
    values: Sequence[np.ndarray],
    *,
    gamma: float,
    gae_lambda: float,
    after: Sequence[float] | None = None,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Generalised advantage estimation (arXiv:1506.02438 eq. 16): advantages and returns (advantages + values) of each token.

    values: of the state before each token. after: value of the state after the last token, for answers that were cut
    off and would have gone on; 0 where it is not given.
    """
    advantages = []
    for number, (reward_T, value_T) in enumerate(zip(rewards, values, strict=True)):
        advantage_T = np.zeros(len(reward_T), np.float64)
        following, ahead = (after[number] if after is not None else 0.0), 0.0
        for t in reversed(range(len(reward_T))):
            ahead = reward_T[t] + gamma * following - value_T[t] + gamma * gae_lambda * ahead
            advantage_T[t], following = ahead, value_T[t]
        advantages.append(advantage_T)
    return advantages, [a + np.asarray(v, np.float64) for a, v in zip(advantages, values, strict=True)]


def returns_to_go(rewards_T: np.ndarray, gamma: float) -> np.ndarray:
    """Discounted sum of each token's reward and all after it, float64[T]."""
    found, ahead = np.zeros(len(rewards_T), np.float64), 0.0
    for t in reversed(range(len(rewards_T))):
        found[t] = ahead = rewards_T[t] + gamma * ahead
    return found


def group_relative(scores_PG: np.ndarray, scale: Literal["group", "batch", "none"]) -> np.ndarray:
    """Each score minus its group's mean, divided by a standard deviation: GRPO, arXiv:2402.03300 section 4.1.2.

    scale: by the group's own deviation, by that of all scores (arXiv:2508.08221), or not at all (Dr. GRPO,
    arXiv:2503.20783). Deviations are those of a sample (G - 1). A group without spread gets exactly 0.
    """
    scores_PG = np.asarray(scores_PG, np.float64)
    if scores_PG.shape[1] < 2:
        raise ValueError(
            "a group of one answer has nothing to be compared with: num_generations must be 2 or more"
        )
    centred_PG = np.where(
        without_spread(scores_PG)[:, None], 0.0, scores_PG - scores_PG.mean(1, keepdims=True)
    )
    if scale == "none":
        return centred_PG
    deviation = scores_PG.std(1, ddof=1, keepdims=True) if scale == "group" else scores_PG.std(ddof=1)
    return centred_PG / (deviation + EPSILON)


def leave_one_out(scores_PG: np.ndarray) -> np.ndarray:
    """Each score minus the mean of the others of its group: RLOO, arXiv:2402.14740 eq. 6."""
    scores_PG = np.asarray(scores_PG, np.float64)
    G = scores_PG.shape[1]
    if G < 2:
        raise ValueError("without another answer there is no baseline: num_generations must be 2 or more")
    return np.where(
        without_spread(scores_PG)[:, None],
        0.0,
        scores_PG - (scores_PG.sum(1, keepdims=True) - scores_PG) / (G - 1),
    )


def without_spread(scores_PG: np.ndarray) -> np.ndarray:
    """Which groups' answers were all scored the same and so teach nothing, bool[P]."""
    return np.asarray(scores_PG).max(1) == np.asarray(scores_PG).min(1)


def whiten(
    arrays: Sequence[np.ndarray], *, shift: bool = True, counted: Sequence[bool] | None = None
) -> list[np.ndarray]:
    """All tokens' values scaled to deviation 1 over the whole step (arXiv:2006.05990 C67), and with `shift` to mean 0.

    counted: which sequences mean and deviation are of (default: all).
    """
    chosen = [a for a, own in zip(arrays, counted or [True] * len(arrays), strict=True) if own]
    together = np.concatenate([np.empty(0), *(np.asarray(array, np.float64) for array in chosen)])
    if len(together) < 2:
        return [np.asarray(array, np.float64) for array in arrays]
    mean, deviation = together.mean(), together.std(ddof=1)
    kept = 0.0 if shift else mean
    return [(np.asarray(array, np.float64) - mean) / (deviation + EPSILON) + kept for array in arrays]


def overlong_penalty(length: int, *, longest: int, buffer: int) -> float:
    """What an answer's length costs, 0 to -1: nothing up to `longest - buffer` tokens, then linearly more (DAPO,
    arXiv:2503.14476 eq. 13)."""
    return -min(1.0, max(0.0, (length - (longest - buffer)) / buffer))
