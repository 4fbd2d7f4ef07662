"""A model ready to generate from whatever people have: a folder, hub id, GGUF, run, or adapter beside its base."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from rayft.errors import JobError
from rayft.model import load_tokenizer, resolve_model
from rayft.model.adapter_info import adapter_folder, base_of, scores
from rayft.model.load import build_model
from rayft.spec import Model
from rayft.storage import node_cache_dir


def load_model(
    path: str, *, cache_dir: Path | None = None, device: str | None = None, dtype: torch.dtype | None = None
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model at `path` and its tokenizer, on `device` (default: a GPU if there is one).

    path: as `Model.path`, or a PEFT adapter folder or a run that left one, whose base model is then loaded too.
    dtype: default bf16 where the hardware computes in it, else fp32. Raises JobError.
    """
    cache_dir = cache_dir or node_cache_dir()
    device, dtype = choose_device(device, dtype)
    adapter = adapter_folder(path, cache_dir)
    spec = Model.model_validate({"path": base_of(adapter) if adapter else path})
    files = resolve_model(spec, cache_dir)
    if scores(adapter or files.folder):
        raise JobError(
            f"The model {path} is a reward model: it scores answers and writes none.",
            "Use `rayft score`, or give a language model.",
        )
    model: nn.Module = build_model(files, spec, dtype=dtype, attention="auto", device=device)
    if adapter is None:
        return model, load_tokenizer(files, spec)
    from peft import PeftModel

    model = PeftModel.from_pretrained(model, str(adapter)).eval()
    if (adapter / "tokenizer_config.json").exists():
        spec = spec.model_copy(update={"tokenizer": str(adapter)})
        files = resolve_model(spec, cache_dir)
    return model, load_tokenizer(files, spec)


def choose_device(device: str | None, dtype: torch.dtype | None) -> tuple[str, torch.dtype]:
    """A GPU if there is one, and bf16 where the hardware computes in it, unless told otherwise."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return device, dtype or (torch.bfloat16 if _computes_bf16(device) else torch.float32)


def _computes_bf16(device: str) -> bool:
    if device != "cpu":
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported()
