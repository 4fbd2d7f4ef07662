"""The proof of a merge: base and adapter apart, the merge in fp32, and the files as stored, run on the same prompts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rayft.errors import StorageError
from rayft.model.files import ModelFiles
from rayft.model.streamed import StreamedModel, empty_model
from rayft.model.trained import Adapted
from rayft.model.weights import Weights
from rayft.spec import Model

#: Largest difference of a logit, over the largest logit, at which a merge in fp32 counts as equal to its parts.
TOLERANCE = 1e-4
#: Prompts, and tokens of each, that are compared: with a vocabulary of 150k these are 0.3 GB of logits.
MAX_PROMPTS, MAX_TOKENS = 8, 64


@dataclass(frozen=True)
class MergeProof:
    """Largest differences of a logit over the largest logit, on `prompts` prompts of together `tokens` tokens.

    merge_error: the merge in fp32 against base and adapter apart; at most `tolerance`. stored_error: the files, cast to
    their dtype, against base and adapter apart. adapter_effect: the base alone against base and adapter; where
    stored_error comes near it, the cast has lost what was learned. same_top: share of positions with the same likeliest
    token in the files and in base and adapter apart.
    """

    prompts: int
    tokens: int
    tolerance: float
    merge_error: float
    stored_error: float
    adapter_effect: float
    same_top: float


def prove_merge(
    trained: Adapted, files: ModelFiles, model: Model, folder: Path, prompts: list[list[int]]
) -> MergeProof | None:
    """Compare the merged model in `folder` with base and adapter apart, in fp32; None without prompts.

    Raises StorageError if they differ by more than the tolerance.
    """
    prompts = [prompt[:MAX_TOKENS] for prompt in prompts if prompt][:MAX_PROMPTS]
    if not prompts:
        return None
    written = replace(files, folder=folder, identity="", source=str(folder), tokenizer=folder)
    stored = Weights(written, trained.skeleton)
    expected = trained.adapted.logits(prompts)
    base = StreamedModel(empty_model(files, model), trained.read_base).logits(prompts)
    adapter_effect = _difference(expected, base)
    del base
    merged = StreamedModel(empty_model(files, model), trained.read).logits(prompts)
    merge_error = _difference(expected, merged)
    del merged
    as_stored = StreamedModel(empty_model(written, model), stored.resolve).logits(prompts)
    top = [a.argmax(-1) == s.argmax(-1) for a, s in zip(expected, as_stored, strict=True)]
    proof = MergeProof(
        prompts=len(prompts),
        tokens=sum(map(len, prompts)),
        tolerance=TOLERANCE,
        merge_error=merge_error,
        stored_error=_difference(expected, as_stored),
        adapter_effect=adapter_effect,
        same_top=torch.cat(top).float().mean().item(),
    )
    if not proof.merge_error <= TOLERANCE:
        raise StorageError(
            f"The merged model differs from base and adapter by {proof.merge_error:.1e} of the largest logit "
            f"(allowed: {TOLERANCE:.0e}), so it was not published.",
            "Export the adapter apart (without merging), and report this as a bug.",
        )
    return proof


def _difference(expected: list[torch.Tensor], actual: list[torch.Tensor]) -> float:
    largest = max(t.abs().max().item() for t in expected)
    return max((a - e).abs().max().item() for e, a in zip(expected, actual, strict=True)) / largest
