"""A model's sizes for the memory plan without torch and without its weights: config.json alone, or a GGUF file's header."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from rayft.errors import JobError, RayftError
from rayft.model.locate import is_hub_id
from rayft.plan.architecture import Architecture, read_architecture
from rayft.spec import Job, Model
from rayft.storage import RetryPolicy, open_store

#: Keys of a GGUF header below its architecture's name, and what config.json calls them.
_GGUF = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "feed_forward_length": "intermediate_size",
    "attention.key_length": "head_dim",
}
#: How often storage is asked: a plan is not worth more, and the run itself asks again.
_PATIENCE = RetryPolicy(attempts=2)


def architecture_of_model(model: Model) -> Architecture:
    """Its sizes. Raises RayftError where config.json cannot be had from here or is not understood."""
    return read_architecture(_config(model))


def scorers_of(job: Job) -> dict[str, Architecture]:
    """The architectures of the job's reward models that can be had from here, by their path."""
    found = {}
    for source in job.rewards:
        if source.type == "model":
            try:
                found[source.path] = architecture_of_model(Model(path=source.path))
            except RayftError:
                continue
    return found


def _config(model: Model) -> dict[str, Any]:
    path = model.path
    if path.startswith("package:"):
        return _gguf_config(_in_package(path.removeprefix("package:")))
    if path.startswith("s3://"):
        store = open_store(path, _PATIENCE)
        for key in ("config.json", "model/config.json"):
            if store.exists(key):
                return _parsed(store.get(key), store.where(key))
        raise JobError(f"There is no config.json at {path}.", "Check bucket and prefix.")
    local = Path(path.removeprefix("file://")).expanduser()
    if local.suffix == ".gguf" and local.is_file():
        return _gguf_config(local)
    for file in (local / "config.json", local / "model" / "config.json"):
        if file.is_file():
            return _parsed(file.read_bytes(), str(file))
    if is_hub_id(path):
        return _from_hub(model)
    raise JobError(f"{path} cannot be looked at from here.", "The run will look at it where it runs.")


def _from_hub(model: Model) -> dict[str, Any]:
    """From the hub's cache on this machine, else from the hub, asked once."""
    import requests
    from huggingface_hub import get_token, hf_hub_url, try_to_load_from_cache

    if model.gguf_file:
        raise JobError(f"{model.path} is a GGUF model of the hub, whose sizes stand in its weights.", "")
    cached = try_to_load_from_cache(model.path, "config.json", revision=model.revision)
    if isinstance(cached, str):
        return _parsed(Path(cached).read_bytes(), cached)
    url = hf_hub_url(model.path, "config.json", revision=model.revision)
    token = get_token()
    try:
        answer = requests.get(url, headers={"Authorization": f"Bearer {token}"} if token else {}, timeout=10)
        answer.raise_for_status()
    except requests.RequestException as error:
        raise JobError(
            f"The config.json of the hub model {model.path} cannot be had from here ({type(error).__name__}).",
            "Check name, network and HF_TOKEN.",
        ) from None
    return _parsed(answer.content, model.path)


def _in_package(name: str) -> Path:
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    files = [
        f
        for place in (spec.submodule_search_locations or [] if spec else [])
        for f in Path(place).glob("*.gguf")
    ]
    if len(files) != 1:
        raise JobError(f"The package {name!r} is not installed here, or has not just one GGUF file.", "")
    return files[0]


def _gguf_config(path: Path) -> dict[str, Any]:
    """What config.json would say, from the header."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    fields = reader.fields
    family = fields["general.architecture"].contents()
    config: dict[str, Any] = {"model_type": family}
    for key, name in _GGUF.items():
        if field := fields.get(f"{family}.{key}"):
            config[name] = field.contents()
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config["vocab_size"] = int(tensors["token_embd.weight"].shape[-1])
    config["tie_word_embeddings"] = "output.weight" not in tensors
    return config


def _parsed(text: bytes, where: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise JobError(f"{where} is no model's config.", "")
    return config
