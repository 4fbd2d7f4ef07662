"""No secret leaves in a manifest: it is stored in plain text in the cluster, in the run folder, and often in git."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from rayft.errors import JobError
from rayft.spec.kubernetes import CREDENTIALS, TOKEN, looks_secret

#: A shorter value is a word that may stand anywhere.
SHORTEST = 8


def refuse_secrets(value: Any, where: str) -> None:
    """Raise JobError if any text in `value` holds a well-known token, a password in a URL, or the value of one of this process's
    own secret variables. The error says where, and not what."""
    own = {
        _plain(text): name
        for name, text in sorted(os.environ.items())
        if len(text) >= SHORTEST and looks_secret(name, "")
    }
    for place, text in _texts(value, where):
        for pattern, what in ((TOKEN, "a token or key"), (CREDENTIALS, "a URL with a password")):
            if found := pattern.search(text):
                raise _error(place, text, found.start(), what)
        flat = _plain(text)
        for secret, name in own.items():
            if secret in flat:
                raise _error(place, flat, flat.index(secret), f"what this shell's {name} holds")


def _texts(value: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield where, str(key)
            yield from _texts(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _texts(inner, f"{where}.{index}")


def _plain(text: str) -> str:
    """One space where there is any: YAML folds lines."""
    return " ".join(text.split())


def _error(place: str, text: str, position: int, what: str) -> JobError:
    keys = re.findall(r"(?<![^\s,{-])([A-Za-z_][\w-]*): ", text[:position])
    near = f", near {keys[-1]!r}" if keys else ""
    return JobError(
        f"The manifest would carry {what} ({place}{near}).",
        "Take it out of job and profile; a profile names the Secret that holds it (`secrets`).",
    )
