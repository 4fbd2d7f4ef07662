"""From losses of tokens to the loss of a step: what each token of a sequence weighs.

Weights are computed once for all sequences of an optimizer step, so the loss is a plain weighted sum and does not
depend on ranks, micro-batches and packs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

Aggregation = Literal["token_mean", "sequence_mean", "constant"]


def token_weights(
    lengths_S: Sequence[int], aggregation: Aggregation, constant: int | None = None
) -> np.ndarray:
    """Weight of each token of each of S sequences, float64[S]; the loss is the weighted sum over the step's tokens.

    - token_mean: every token alike, long sequences count more (DAPO, arXiv:2503.14476).
    - sequence_mean: the mean over a sequence's tokens, then over sequences (GRPO, arXiv:2402.03300 eq. 3).
    - constant: the sum over a sequence's tokens over `constant`, such as the most tokens an answer can have, then the mean over
      sequences: unbiased in the length (Dr. GRPO, arXiv:2503.20783).

    A sequence without tokens weighs nothing, and still counts as a sequence.
    """
    lengths = np.asarray(lengths_S, np.float64)
    if aggregation == "token_mean":
        return np.full(len(lengths), 1 / max(lengths.sum(), 1.0))
    if aggregation == "sequence_mean":
        return 1 / (np.maximum(lengths, 1.0) * len(lengths))
    assert constant is not None
    return np.full(len(lengths), 1 / (constant * len(lengths)))
