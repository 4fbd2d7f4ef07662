"""Numbers about tokens that were drawn: how far off the engine was, and how far the reference is. numpy, float64."""

from __future__ import annotations

import numpy as np

from rayft.objectives.bounds import K3_BOUND, LOG_RATIO_BOUND, Estimator


def truncated_importance(old_logprobs: np.ndarray, engine_logprobs: np.ndarray, most: float) -> np.ndarray:
    """Weight of each token, p_old / p_engine but at most `most`: corrects for an engine that rounds otherwise or whose weights
    are older (Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025)."""
    difference = np.asarray(old_logprobs, np.float64) - engine_logprobs
    return np.minimum(np.exp(np.clip(difference, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)), most)


def kl_of_tokens(logprobs: np.ndarray, reference: np.ndarray, estimator: Estimator) -> np.ndarray:
    """KL of each token as `rayft.objectives.kl` estimates it."""
    d = np.clip(np.asarray(logprobs, np.float64) - reference, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    if estimator == "k1":
        return d
    return 0.5 * d**2 if estimator == "k2" else np.minimum(np.exp(-d) - 1 + d, K3_BOUND)
