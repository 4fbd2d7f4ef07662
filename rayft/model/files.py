"""A model's files on this machine, under an identity that names their content.

GGUF files and `.bin` weights are converted once into safetensors, so that everything else reads one format.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayft.errors import JobError
from rayft.model.locate import locate_model, locate_tokenizer
from rayft.spec import Job, Model
from rayft.storage import ObjectNotFound, hold_file, node_cache_dir

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

#: Keys of config.json that say nothing about what the model computes.
_IRRELEVANT_KEYS = ("_name_or_path", "transformers_version")
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class NewScore:
    """Score heads that a model gets if its files hold none; `seed` decides what they begin with.

    zeros: they begin with nothing, as a critic's should: what a random head makes of states is noise in the first advantages.
    """

    heads: int
    seed: int
    zeros: bool = False


@dataclass(frozen=True)
class ModelFiles:
    """Config, tokenizer and safetensors of one model.

    folder: Hugging Face format. identity: hex digest of config and weights, equal on every machine that has the same
    model, however it got there. source: where the job said it comes from. tokenizer: folder of the tokenizer. score: of
    a reward model; without it the model is a causal language model.
    """

    folder: Path
    identity: str
    source: str
    tokenizer: Path
    random_weights: bool = False
    score: NewScore | None = None

    @property
    def weights(self) -> list[Path]:
        """The safetensors files, sorted by name; empty for random weights. Raises JobError if one is missing."""
        return [] if self.random_weights else _weight_files(self.folder)


def resolve_model(model: Model, cache_dir: Path) -> ModelFiles:
    """Find the job's model, fetch and convert it if need be (once per node), and name its content.

    cache_dir: the node cache, for downloads, conversions and remembered digests. Raises JobError if there is no
    such model or it cannot be trained, StorageError if fetching fails.
    """
    cache_dir = Path(cache_dir).expanduser().absolute()
    found = locate_model(model, cache_dir)
    if found.is_file() or (not model.random_weights and not _has_safetensors(found)):
        from rayft.model.convert import converted

        sources = [found] if found.is_file() else sorted([found / "config.json", *found.glob("*.bin")])
        identity = _identity(sources, cache_dir)
        folder = converted(found, identity, cache_dir)
    else:
        folder = found
        config = [found / "config.json"]
        sources = config if model.random_weights else config + _weight_files(found)
        identity = _identity(sources, cache_dir)
    _refuse_quantized(folder)
    tokenizer = locate_tokenizer(model.tokenizer, cache_dir) if model.tokenizer else folder
    return ModelFiles(folder, identity, model.path, tokenizer, model.random_weights)


def job_files(job: Job, cache_dir: Path) -> ModelFiles:
    """`resolve_model` for what a job trains: a reward model where that is its method."""
    files = resolve_model(job.model, cache_dir)
    if job.method != "reward":
        return files
    return replace(files, score=NewScore(job.reward.heads, job.seed))


def load_config(files: ModelFiles, model: Model) -> PretrainedConfig:
    """The model's config. Raises JobError if transformers does not know the architecture."""
    from transformers import AutoConfig

    labels = {"num_labels": files.score.heads} if files.score else {}
    try:
        return AutoConfig.from_pretrained(files.folder, trust_remote_code=model.trust_remote_code, **labels)
    except (ValueError, OSError) as error:
        raise JobError(
            f"The config of {files.source} cannot be used: {_first_line(error)}",
            "See model.trust_remote_code if the model brings its own code.",
        ) from None


def auto_class(files: ModelFiles) -> Any:
    """transformers' automatic class for the model: a causal language model, or a sequence classifier that scores."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if files.score else AutoModelForCausalLM


def load_tokenizer(files: ModelFiles, model: Model) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with the job's chat template in place of its own if the job names one.

    The pad token is left as the model has it, which may be none. Raises JobError.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(files.tokenizer, trust_remote_code=model.trust_remote_code)
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise JobError(
            f"{files.tokenizer} holds no usable tokenizer: {_first_line(error)}",
            "Set model.tokenizer to a folder or hub id that has one.",
        ) from None
    if model.chat_template:
        try:
            with hold_file(model.chat_template, node_cache_dir()) as file:
                tokenizer.chat_template = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError, ObjectNotFound) as error:
            raise JobError(
                f"The chat template {model.chat_template} cannot be read: {_first_line(error)}",
                "model.chat_template is a Jinja file.",
            ) from None
    return tokenizer


def _has_safetensors(folder: Path) -> bool:
    if any(folder.glob("*.safetensors")) or (folder / _INDEX).exists():
        return True
    if any(folder.glob("*.bin")):
        return False
    raise JobError(
        f"{folder} has a config.json but no weights.", "Add model.safetensors, or set model.random_weights."
    )


def _weight_files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.exists():
        names = sorted(set(_read_json(index)["weight_map"].values()))
    elif (folder / "model.safetensors").exists():
        names = ["model.safetensors"]
    else:
        names = sorted(p.name for p in folder.glob("*.safetensors") if not p.name.startswith("adapter"))
    missing = [name for name in names if not (folder / name).exists()]
    if missing or not names:
        raise JobError(
            f"The model folder {folder} lacks {', '.join(missing) or 'its safetensors files'}.",
            "Copy or download the model again.",
        )
    return [folder / name for name in names]


def _refuse_quantized(folder: Path) -> None:
    quantization = _read_json(folder / "config.json").get("quantization_config")
    if quantization:
        raise JobError(
            f"The model in {folder} is quantized ({quantization.get('quant_method', 'unknown method')}) "
            "and cannot be trained.",
            "Give the unquantized model; adapter.type qlora quantizes it while loading.",
        )


def _identity(files: list[Path], cache_dir: Path) -> str:
    """Digest of names, sizes and contents; of config.json, only what the model computes with."""
    import xxhash

    with ThreadPoolExecutor(4) as pool:
        digests = list(pool.map(lambda path: _content_digest(path, cache_dir), files))
    whole = xxhash.xxh3_128()
    for path, digest in zip(files, digests, strict=True):
        name = path.name if path.suffix != ".gguf" else "gguf"
        whole.update(f"{name} {digest}\n".encode())
    return whole.hexdigest()


def _content_digest(path: Path, cache_dir: Path) -> str:
    """Digest of one file; that of a large one is remembered under its path, size and modification time."""
    import xxhash

    if path.name == "config.json":
        values = {k: v for k, v in _read_json(path).items() if k not in _IRRELEVANT_KEYS}
        return xxhash.xxh3_128(json.dumps(values, sort_keys=True).encode()).hexdigest()
    real = path.resolve()
    stat = real.stat()
    key = xxhash.xxh3_128(f"{real} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}".encode()).hexdigest()
    remembered = cache_dir / "digests" / key
    if remembered.exists():
        return remembered.read_text()
    digest = xxhash.xxh3_128()
    with real.open("rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    text = f"{stat.st_size} {digest.hexdigest()}"
    remembered.parent.mkdir(parents=True, exist_ok=True)
    temporary = remembered.with_name(f"{key}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, remembered)
    return text


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise JobError(
            f"{path} cannot be read: {_first_line(error)}", "Copy or download the model again."
        ) from None


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__).rstrip(".") + "."
