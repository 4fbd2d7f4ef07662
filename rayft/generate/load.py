"""A model ready to generate from whatever people have: a folder, hub id, GGUF, run, or adapter beside its base."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from rayft.errors import JobError
from rayft.model import load_tokenizer, resolve_model
from rayft.model.load import build_model
from rayft.spec import Model
from rayft.storage import node_cache, node_cache_dir, open_store


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


def adapter_folder(path: str, cache_dir: Path) -> Path | None:
    """The PEFT adapter that `path` is or that a run at `path` exported, on this machine; None if there is none."""
    if "://" in path and not path.startswith("file://"):
        for uri in (path.rstrip("/"), f"{path.rstrip('/')}/model"):
            if open_store(uri).exists("adapter_config.json"):
                parent, _, name = uri.rpartition("/")
                return node_cache(open_store(parent), name, cache_dir, keep=lambda path: "/" not in path)
        return None
    local = Path(path.removeprefix("file://")).expanduser()
    return next((f for f in (local, local / "model") if (f / "adapter_config.json").exists()), None)


def scores(folder: Path) -> bool:
    """Whether the model, or the adapter, in a folder is one that scores."""
    name = "adapter_config.json" if (folder / "adapter_config.json").exists() else "config.json"
    config = json.loads((folder / name).read_text(encoding="utf-8"))
    architectures = config.get("architectures") or ()
    return config.get("task_type") == "SEQ_CLS" or any(
        "ForSequenceClassification" in a for a in architectures
    )


def base_of(adapter: Path) -> str:
    """The base model that an adapter's config names. Raises JobError if it names none."""
    base = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get(
        "base_model_name_or_path"
    )
    if not base:
        raise JobError(
            f"{adapter / 'adapter_config.json'} does not name the adapter's base model.",
            "Set base_model_name_or_path in it to a folder or hub id.",
        )
    return str(base)


def _computes_bf16(device: str) -> bool:
    if device != "cpu":
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported()
