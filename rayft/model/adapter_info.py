"""What can be said of adapters before one is built: what goes together, where one lies, what its files say. Imports nothing heavy."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from rayft.errors import JobError
from rayft.spec import Adapter
from rayft.storage import node_cache, open_store


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


def check_adapter(adapter: Adapter, zero_stage: int) -> None:
    """Refuse what the libraries cannot do together, before a model is built. Raises JobError naming the keys."""
    if adapter.use_dora and zero_stage == 3:
        raise JobError(
            "adapter.use_dora does not work with zero.stage 3: DoRA needs whole base weights outside the layers that ZeRO-3 gathers.",
            "Use zero.stage 2, or LoRA without use_dora.",
        )
    if adapter.type != "qlora":
        return
    if zero_stage == 3:
        raise JobError(
            "adapter.type qlora does not work with zero.stage 3: 4-bit weights cannot be sharded.",
            "Use zero.stage 2, or adapter.type lora.",
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise JobError(
            "adapter.type qlora needs bitsandbytes, which is not installed.",
            "Install rayft[qlora], or use adapter.type lora.",
        )
    import torch

    if not torch.cuda.is_available():
        raise JobError("adapter.type qlora needs a GPU, and there is none here.", "Use adapter.type lora.")
