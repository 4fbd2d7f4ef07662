"""GGUF files and pickled `.bin` weights, written once as safetensors in Hugging Face format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rayft.errors import JobError
from rayft.storage import made


def converted(source: Path, identity: str, cache_dir: Path) -> Path:
    """A folder with the model of `source` (a GGUF file, or a folder with `.bin` weights) as fp32 safetensors.

    It is an entry of the node cache: one process of the node converts while others wait. The whole model is in memory
    meanwhile. identity: of the source's content. Raises JobError if transformers cannot read the source, StorageError if
    the cache cannot hold the result.
    """
    return made(
        f"model-{identity}",
        f"{source} as safetensors",
        lambda: _fp32_bytes(source),
        lambda to: _convert(source, to),
        cache_dir,
    )


def _fp32_bytes(source: Path) -> int:
    """What the model takes in fp32, about: GGUF files say how many elements they hold, `.bin` ones mostly have 16 bits."""
    if source.is_file():
        from gguf import GGUFReader

        try:
            return 4 * sum(int(tensor.n_elements) for tensor in GGUFReader(source).tensors)
        except Exception:  # the conversion says what is wrong with it
            return source.stat().st_size
    return 2 * sum(path.stat().st_size for path in source.glob("*.bin"))


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder, gguf = (source.parent, {"gguf_file": source.name}) if source.is_file() else (source, {})
    # Nothing of the source is run: not its code, which transformers would ask for at a terminal, and no pickled object.
    safe: dict[str, Any] = {"trust_remote_code": False, **gguf}
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, weights_only=True, **safe)
        tokenizer = AutoTokenizer.from_pretrained(folder, **safe)
    except Exception as error:  # a damaged file raises whatever its parser stumbles over
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise JobError(
            f"transformers cannot read the model {source}: {reason}.",
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
