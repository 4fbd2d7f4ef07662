"""GGUF files and pickled `.bin` weights, written once as safetensors in Hugging Face format."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from rayft.errors import JobError, ResourceError

LOCK_TIMEOUT_S = 3600.0


def converted(source: Path, target: Path, *, lock_timeout_s: float = LOCK_TIMEOUT_S) -> Path:
    """`target`, holding the model of `source` (a GGUF file, or a folder with `.bin` weights) as fp32 safetensors.

    One process of the node converts while others wait, at most `lock_timeout_s`; `target` appears complete or not at
    all. The whole model is in memory meanwhile. Raises JobError if transformers cannot read the source.
    """
    import filelock

    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(f"{target}.lock", timeout=lock_timeout_s):
            if not target.exists():
                partial = target.with_suffix(".partial")
                shutil.rmtree(partial, ignore_errors=True)  # only a dead process can have left it
                _convert(source, partial)
                os.replace(partial, target)
    except filelock.Timeout:
        raise ResourceError(
            f"Waited {lock_timeout_s:.0f} s for another process on this node to convert {source} (lock {target}.lock).",
            "See whether that process is stuck and stop it, then start again.",
        ) from None
    return target


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder, gguf = (source.parent, {"gguf_file": source.name}) if source.is_file() else (source, {})
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **gguf)
        tokenizer = AutoTokenizer.from_pretrained(folder, **gguf)
    except Exception as error:  # a damaged file raises whatever its parser stumbles over
        raise JobError(
            f"transformers cannot read the model {source}: {error}.",
            "Give the model as safetensors in Hugging Face format.",
        ) from None
    _drop_quantization_marker(model)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    for file in target.iterdir():
        file.chmod(0o644)  # safetensors writes files that other users of a shared cache could not read


def _drop_quantization_marker(model: Any) -> None:
    """The weights are dequantized by now; the marker that transformers leaves would make saving fail."""
    for owner, name in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        if name in vars(owner):
            delattr(owner, name)
    model.is_quantized = False
