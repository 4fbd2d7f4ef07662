"""Manifests from files, folders, kustomizations and stdin."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from rayft.errors import JobError
from rayft.fleet.lint.findings import Document

#: Names under which kustomize finds a kustomization.
_KUSTOMIZATIONS = ("kustomization.yaml", "kustomization.yml", "Kustomization")
_SUFFIXES = (".yaml", ".yml", ".json")

#: More than any manifest has; what aliases of YAML multiply is counted as often as it is there.
_MOST_NODES = 1_000_000
_MOST_DEPTH = 100
_MOST_BYTES = 64 << 20

_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Base):  # type: ignore[misc]
    """YAML as Kubernetes reads it: dates are texts, and no key is there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As always, but a key that is there twice is an error."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = next((key for place, key in enumerate(keys) if key in keys[:place]), None)
        if twice is not None:
            mark = node.start_mark
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} is there twice", mark)
        made: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return made


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Base.yaml_implicit_resolvers.items()
}


def parse(text: str, source: str) -> list[Document]:
    """The objects in a text of YAML documents; the members of a List each for itself."""
    try:
        values = list(yaml.load_all(text, Loader=_Loader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}" if mark else ""
        hint = "Render templates first, and lint what comes out." if "{{" in text else "Mend it."
        raise JobError(f"{source} is not YAML{line}: {error.problem or error.context}.", hint) from error
    except (yaml.YAMLError, ValueError) as error:
        raise JobError(f"{source} is not YAML: {str(error).splitlines()[0]}.", "Mend it.") from error
    except RecursionError as error:
        raise JobError(f"{source} is nested too deeply.", "Manifests are not.") from error
    found = []
    for index, value in enumerate(values, 1):
        if value is None:
            continue  # nothing between two `---`
        _refuse_monsters(value, source)
        found += [_document(each, source, index) for each in _members(value)]
    if not found:
        raise JobError(f"{source} holds no Kubernetes object.", "Name a manifest.")
    return found


def _members(value: Any) -> list[Any]:
    """The objects of a List, else the value itself."""
    if (
        isinstance(value, dict)
        and str(value.get("kind", "")).endswith("List")
        and isinstance(value.get("items"), list)
    ):
        return list(value["items"])
    return [value]


def _document(value: Any, source: str, index: int) -> Document:
    if not isinstance(value, dict):
        raise JobError(
            f"Document {index} of {source} is not a mapping.", "A manifest begins with apiVersion and kind."
        )
    for key in ("apiVersion", "kind"):
        if not isinstance(value.get(key), str) or not value[key]:
            raise JobError(
                f"Document {index} of {source} is no Kubernetes object: it has no {key}.",
                "Leave out files that are not manifests, such as values of a chart.",
            )
    if value["apiVersion"].startswith("kustomize.config.k8s.io/"):
        raise JobError(f"{source} is a kustomization, not what it builds.", "Name its folder.")
    return Document(value, source, index)


def _refuse_monsters(value: Any, source: str) -> None:
    """Refuse what would take for ever: aliases that multiply, contain themselves, or nest beyond reason."""
    sizes: dict[int, int] = {}

    def count(each: Any, depth: int) -> int:
        """How many values there are, each as often as it is referred to."""
        if depth > _MOST_DEPTH:  # a value within itself comes here too
            raise JobError(f"{source} is nested too deeply.", "Manifests are not.")
        if not isinstance(each, dict | list):
            return 1
        if id(each) not in sizes:
            parts = each.values() if isinstance(each, dict) else each
            sizes[id(each)] = 1 + sum(count(part, depth + 1) for part in parts)
        return sizes[id(each)]

    if count(value, 0) > _MOST_NODES:
        raise JobError(f"{source} grows beyond all bounds by its YAML aliases.", "Write it out.")


def read(paths: Iterable[str]) -> list[list[Document]]:
    """The objects in files, folders and `-` (stdin), in sets of what belongs together.

    A folder with a kustomization is built with kubectl and is a set of its own; all the rest is one.
    """
    loose: list[Document] = []
    sets = [loose]
    for path in paths:
        if path == "-":
            loose += parse(_decoded(sys.stdin.buffer.read(_MOST_BYTES), "stdin"), "stdin")
            continue
        for source in _sources(Path(path)):
            if source.is_dir():
                sets.append(parse(_kustomized(source), str(source)))
            else:
                loose += parse(_decoded(_bytes(source), str(source)), str(source))
    return [each for each in sets if each]


def _sources(path: Path) -> Iterator[Path]:
    """The files of a folder; a kustomization stands for all that is under it."""
    if not path.is_dir():
        yield path
        return
    if _has_kustomization(path):
        yield path
        return
    sources = list(_under(path))
    if not sources:
        raise JobError(f"The folder {path} holds no manifests.", "Manifests are *.yaml, *.yml or *.json.")
    yield from sources


def _under(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and _has_kustomization(path):
            # A component is part of those that name it, and is built with them.
            if not _is_component(path):
                yield path
        elif path.is_dir() and not path.is_symlink():
            yield from _under(path)
        elif path.suffix in _SUFFIXES:
            yield path


def _has_kustomization(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _KUSTOMIZATIONS)


def _is_component(folder: Path) -> bool:
    files = [folder / name for name in _KUSTOMIZATIONS if (folder / name).is_file()]
    lines = [line for path in files for line in path.read_text(errors="replace").splitlines()]
    return any(line.split() == ["kind:", "Component"] for line in lines)


def _bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise JobError(f"{path} is larger than {_MOST_BYTES >> 20} MiB.", "Manifests are not.")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise JobError(f"There is no file {path}.", "Name a manifest, a folder, or - for stdin.") from error
    except OSError as error:
        raise JobError(f"{path} cannot be read: {error.strerror or error}.", "Name a manifest.") from error


def _decoded(data: bytes, source: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise JobError(f"{source} is not text in UTF-8.", "Name a manifest.") from error
    if "\0" in text:
        raise JobError(f"{source} is not text.", "Name a manifest.")
    return text


def _kustomized(folder: Path) -> str:
    """What a kustomization builds."""
    # Also beside the interpreter, where pip puts it.
    places = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    kubectl = shutil.which("kubectl", path=places)
    if not kubectl:
        raise JobError(
            f"{folder} is a kustomization, and kubectl is not there to build it.",
            f"Install kubectl, or pipe: kustomize build {folder} | rayft k8s lint -",
        )
    try:
        done = subprocess.run(
            [kubectl, "kustomize", str(folder)], capture_output=True, text=True, timeout=120, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise JobError(
            f"kubectl did not build {folder} within 120 s.", "Does it name bases elsewhere?"
        ) from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1].removeprefix("error: ")
        raise JobError(f"kubectl does not build {folder}: {reason}.", "Mend the kustomization.")
    return done.stdout
