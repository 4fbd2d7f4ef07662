"""The score head of a reward model: the hidden state of a document's last token to one number (or one per head), in fp32.

The model is transformers' own `…ForSequenceClassification`, so that what is saved loads anywhere; its forward, which
looks for the last token by the id of the padding, is not used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rayft.data.tensors import IGNORE
from rayft.errors import JobError
from rayft.model.head import causal_model, forward_hidden


class ScoreHead(nn.Linear):
    """The linear layer of a sequence classifier, computed in fp32 whatever the dtype of the rest."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden.float(), self.weight.float())


def install_score_head(model: nn.Module) -> None:
    """Make the score layer of `model` (adapters may be around it) a `ScoreHead`. Raises JobError if it has another."""
    heads = [
        module
        for name, module in causal_model(model).named_modules()
        if type(module) is nn.Linear and "score" in name.split(".")
    ]
    if not heads or any(head.bias is not None for head in heads):
        raise JobError(
            f"{type(causal_model(model)).__name__} has no linear score head.",
            "Use a model of another family for method reward.",
        )
    for head in heads:
        head.__class__ = ScoreHead


def forward_scores(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Scores of the documents of a micro-batch, fp32[D, H] with gradient.

    batch: as for `rayft.model.head.forward_nll`, and last int64[D], where the last token of each document is in the
    flattened input_ids.
    """
    hidden = forward_hidden(model, batch).flatten(0, 1)
    inner: Any = causal_model(model)
    return inner.score(hidden.index_select(0, batch["last"])).float()


def forward_values(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Value of the state before each target of a micro-batch in row-major order, fp32[N] with gradient.

    batch: as for `rayft.model.head.forward_nll`. The state is what the token before the target has seen.
    """
    hidden = forward_hidden(model, batch).flatten(0, 1)
    targets = batch["targets"].flatten()
    inner: Any = causal_model(model)
    return inner.score(hidden.index_select(0, (targets != IGNORE).nonzero().squeeze(1)))[:, 0].float()
