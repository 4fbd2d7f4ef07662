"""Learning rate as a function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from rayft.spec import Train


def warmup_steps(train: Train, total_steps: int) -> int:
    """Optimizer steps of linear warm-up."""
    return (
        train.warmup_steps if train.warmup_steps is not None else math.ceil(train.warmup_ratio * total_steps)
    )


def learning_rate(train: Train, step: float, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (0-based; between two where rows were dropped) out of `total_steps`.

    Warm-up rises linearly from 1/(w+1) of the peak; after it constant, linear, cosine (SGDR without restarts,
    arXiv:1608.03983) or warm-up-stable-decay with a linear tail (arXiv:2404.06395), down to `min_lr_ratio`.
    """
    warmup = warmup_steps(train, total_steps)
    if step < warmup:
        return train.learning_rate * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    floor = train.min_lr_ratio
    if train.lr_scheduler == "constant":
        factor = 1.0
    elif train.lr_scheduler == "linear":
        factor = floor + (1 - floor) * (1 - progress)
    elif train.lr_scheduler == "cosine":
        factor = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    else:
        decay = train.decay_ratio
        factor = 1.0 if progress < 1 - decay else floor + (1 - floor) * (1 - progress) / max(decay, 1e-9)
    return train.learning_rate * factor
