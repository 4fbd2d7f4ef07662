"""From scored answers to what is trained on: advantages, weights, and what the log says of them.

Shapes: S answers of a step, P prompts with G answers each; lists hold one array per answer, with a value for each of its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rayft.objectives.advantages import (
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
from rayft.objectives.importance import kl_of_tokens, truncated_importance
from rayft.rlhf.layout import MiniBatch
from rayft.rlhf.rollout import Rollout
from rayft.spec import Job

Columns = dict[str, list[np.ndarray]]


def score_with_rules(rollouts: Sequence[Rollout], scores_S: np.ndarray, job: Job) -> np.ndarray:
    """The scores after what the job says of length and of answers that were cut off, float64[S]."""
    rl, longest = job.rl, job.rollout.max_new_tokens
    made = np.array(scores_S, np.float64)
    for number, rollout in enumerate(rollouts):
        if rl.overlong_buffer:
            made[number] += overlong_penalty(len(rollout.ids), longest=longest, buffer=rl.overlong_buffer)
        if rl.truncated == "penalty" and not rollout.ended:
            made[number] = rl.truncated_penalty
    return made


def uniform_groups(scores_S: np.ndarray, job: Job) -> np.ndarray:
    """Which prompts' answers all score the same, bool[P]."""
    return without_spread(scores_S.reshape(-1, job.rl.num_generations or 1))


def experience(
    rollouts: Sequence[Rollout],
    scores_S: np.ndarray,
    old: Sequence[np.ndarray] | None,
    reference: Sequence[np.ndarray] | None,
    values: Sequence[np.ndarray] | None,
    job: Job,
    kl_coef: float,
) -> tuple[Columns, dict[str, float]]:
    """Columns of `PolicyObjective` and `ValueObjective` but for weights, and metrics of the step's answers.

    old, reference: log-probabilities of the answers' tokens under the policy before the step and under the reference; without
    `old` (`RlPlan.one_pass`) what follows from it is left to `looked_back`. values: the critic's. scores_S: with rules applied.
    """
    rl = job.rl
    lengths = [len(rollout.ids) for rollout in rollouts]
    penalties = [np.zeros(n) for n in lengths]
    if reference is not None and rl.kl_in == "reward":
        assert rl.kl_estimator is not None
        assert old is not None
        penalties = [
            kl_coef * kl_of_tokens(o, r, rl.kl_estimator) for o, r in zip(old, reference, strict=True)
        ]
    columns: Columns = {}
    if rl.grouped:
        totals_PG = (scores_S - [penalty.sum() for penalty in penalties]).reshape(-1, rl.num_generations or 1)
        if rl.advantage_estimator == "leave_one_out":
            of_answers = leave_one_out(totals_PG).flatten()
        else:
            assert rl.advantage_scale is not None
            of_answers = group_relative(totals_PG, rl.advantage_scale).flatten()
        advantages = [np.full(n, a) for n, a in zip(lengths, of_answers, strict=True)]
    else:
        rewards = [token_rewards(s, p) for s, p in zip(scores_S, penalties, strict=True)]
        if rl.critic:
            assert values is not None
            advantages, returns = gae(rewards, values, gamma=rl.gamma, gae_lambda=rl.gae_lambda)
            columns |= {"old_values": list(values), "returns": returns}
        else:
            advantages = [returns_to_go(reward, rl.gamma) for reward in rewards]
    if rl.whiten_advantages:
        advantages = whiten(advantages, counted=kept_in_loss(rollouts, job))
    columns["advantages"] = advantages
    if reference and rl.kl_in == "loss":
        columns["reference"] = list(reference)
    metrics = {
        "score": float(np.mean(scores_S)),
        "score_std": float(np.std(scores_S)),
        "length": float(np.mean(lengths)),
        "truncated": float(np.mean([not rollout.ended for rollout in rollouts])),
    }
    if rl.grouped:
        metrics["uniform_groups"] = float(np.mean(uniform_groups(scores_S, job)))
    if old is None:
        columns["engine_logprobs"] = [np.asarray(rollout.logprobs) for rollout in rollouts]
        return columns, metrics
    more_columns, more_metrics = looked_back(rollouts, old, reference, job, kl_coef)
    return columns | more_columns, metrics | more_metrics


def looked_back(
    rollouts: Sequence[Rollout],
    old: Sequence[np.ndarray],
    reference: Sequence[np.ndarray] | None,
    job: Job,
    kl_coef: float,
) -> tuple[Columns, dict[str, float]]:
    """Columns and metrics that follow from the log-probabilities under the policy before the step."""
    drawn = [np.asarray(rollout.logprobs) for rollout in rollouts]
    gaps = np.concatenate([np.abs(np.asarray(o) - d) for o, d in zip(old, drawn, strict=True)])
    metrics = {"engine_gap": float(gaps.mean()), "engine_gap_max": float(gaps.max())}
    if reference:
        kl = [kl_of_tokens(o, r, "k1") for o, r in zip(old, reference, strict=True)]
        metrics |= {"kl": float(np.mean([own.sum() for own in kl])), "kl_coef": kl_coef}
    cap = job.rl.importance_cap
    weights = [truncated_importance(o, d, cap) for o, d in zip(old, drawn, strict=True)]
    return {"old_logprobs": list(old), "importance": weights}, metrics


def kept_in_loss(rollouts: Sequence[Rollout], job: Job) -> list[bool]:
    """Which answers are trained on."""
    return [job.rl.truncated != "mask" or rollout.ended for rollout in rollouts]


def weights_of(rollouts: Sequence[Rollout], mini_batches: Sequence[MiniBatch], job: Job) -> list[np.ndarray]:
    """Weight of each token in the loss of its mini-batch; 0 for answers that are left out of it."""
    assert job.rl.loss_aggregation is not None
    made: list[np.ndarray] = [np.empty(0)] * len(rollouts)
    for mini_batch in mini_batches:
        all_kept = kept_in_loss(rollouts, job)
        kept = [all_kept[i] for i in mini_batch.answers]
        lengths = [len(rollouts[i].ids) * keep for i, keep in zip(mini_batch.answers, kept, strict=True)]
        weights = token_weights(lengths, job.rl.loss_aggregation, job.rollout.max_new_tokens)
        for i, weight, keep in zip(mini_batch.answers, weights, kept, strict=True):
            made[i] = np.full(len(rollouts[i].ids), weight * keep)
    return made
