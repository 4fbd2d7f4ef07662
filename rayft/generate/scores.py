"""Reward models that are ready to score: loading one, and the engine that scores with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedTokenizerBase

from rayft.data.template import Sample
from rayft.data.tensors import sequence_tensors
from rayft.errors import DataError, JobError
from rayft.generate.attention import packed_scoring
from rayft.generate.engine import Sync
from rayft.generate.hf import evaluating, in_step, like_lengths
from rayft.generate.load import choose_device
from rayft.model import load_tokenizer, resolve_model
from rayft.model.adapter_info import adapter_folder, base_of
from rayft.model.files import ModelFiles, NewScore
from rayft.model.head import causal_model
from rayft.model.load import build_model
from rayft.model.score import forward_scores, install_score_head
from rayft.model.weights import Weights, is_score, skeleton
from rayft.spec import Model
from rayft.storage import node_cache_dir


class ScoreEngine:
    """Scores whole conversations with a reward model, which may be wrapped (peft) or sharded (ZeRO-3).

    batch_size: documents at a time. sync: as for `rayft.generate.hf.TransformersEngine`.
    """

    def __init__(self, model: nn.Module, *, batch_size: int = 16, sync: Sync | None = None) -> None:
        self.model, self.batch_size, self.sync = model, batch_size, sync
        self.config = causal_model(model).config

    @property
    def context(self) -> int | None:
        """Tokens that the model takes; None without a limit."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    @torch.no_grad()
    def rate(self, documents: Sequence[Sequence[int]]) -> list[list[float]]:
        """The scores of each document (token ids), one per head. Raises DataError beyond the model's context."""
        for number, ids in enumerate(documents, 1):
            if not len(ids) or (self.context and len(ids) > self.context):
                raise DataError(
                    f"Conversation {number} given to the model has {len(ids)} tokens; its context is {self.context}.",
                    "Shorten it, or leave it out.",
                )
        device = next(self.model.parameters()).device
        results: list[list[float]] = [[] for _ in documents]
        lengths = [len(ids) for ids in documents]
        with evaluating(self.model), packed_scoring(self.model) as packed:
            for rows in in_step(like_lengths(lengths, self.batch_size), self.sync):
                samples = [
                    Sample(np.array(documents[row]), np.zeros(len(documents[row]), np.bool_)) for row in rows
                ]
                batch = sequence_tensors(samples, packed=packed)
                found = forward_scores(self.model, {name: x.to(device) for name, x in batch.items()})
                for row, scores in zip(rows, found.double().tolist(), strict=True):
                    results[row] = scores
        return results


def load_score_model(
    path: str,
    *,
    cache_dir: Path | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The reward model at `path` (a run, an exported folder, a hub id, an adapter) and its tokenizer.

    device, dtype: as for `rayft.generate.load.load_model`; the score head is fp32 in any case. Raises JobError if the
    model has no score head.
    """
    cache_dir = cache_dir or node_cache_dir()
    device, dtype = choose_device(device, dtype)
    adapter = adapter_folder(path, cache_dir)
    spec = Model.model_validate({"path": base_of(adapter) if adapter else path})
    files = resolve_model(spec, cache_dir)
    heads = _adapter_heads(adapter) if adapter else _heads(files)
    if not heads:
        raise JobError(
            f"The model {path} has no score head.", "Give a model that was trained with `method: reward`."
        )
    files = replace(files, score=NewScore(heads, seed=0))
    model: nn.Module = build_model(files, spec, dtype=dtype, attention="auto", device=device)
    if adapter is None:
        _widen_head(model, files, spec, device)
    else:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=False).eval()
        if (adapter / "tokenizer_config.json").exists():
            spec = spec.model_copy(update={"tokenizer": str(adapter)})
            files = resolve_model(spec, cache_dir)
        weight = _adapter_head(adapter).to(device)
        causal_model(model).get_submodule("score").modules_to_save["default"].weight.data = weight  # type: ignore[index,union-attr]
    install_score_head(model)
    return model.eval(), load_tokenizer(files, spec)


def _widen_head(model: nn.Module, files: ModelFiles, spec: Model, device: str) -> None:
    """The score head as the files have it, whatever the dtype of the rest."""
    weights = Weights(files, skeleton(files, spec))
    for name, parameter in model.named_parameters():
        if is_score(name):
            parameter.data = weights.read(name).float().to(device)
    weights.close()


def _heads(files: ModelFiles) -> int:
    """Score heads of a model in Hugging Face format; 0 if it is no sequence classifier."""
    config: dict[str, Any] = json.loads((files.folder / "config.json").read_text(encoding="utf-8"))
    classifies = any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or ())
    return len(config.get("id2label") or {0: "", 1: ""}) if classifies else 0


def _adapter_head(adapter: Path) -> torch.Tensor:
    """The weight of an adapter's score head, fp32 [heads, hidden]. Raises JobError if it has none."""
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if name.endswith("score.weight")]  # noqa: SIM118 -- not a dict
        if not names:
            raise JobError(
                f"The adapter {adapter} has no score head.",
                "Give one that was trained with `method: reward`.",
            )
        return file.get_tensor(names[0]).float()


def _adapter_heads(adapter: Path) -> int:
    return len(_adapter_head(adapter))
