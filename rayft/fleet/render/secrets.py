"""No secret leaves in a manifest: it is stored in plain text in the cluster, in the run folder, and often in git."""

from __future__ import annotations

import os
import re
from typing import Any

from rayft.errors import JobError
from rayft.spec.secrets import looks_secret, secret_in, texts_of

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
    for place, text in texts_of(value, where):
        if found := secret_in(text):
            raise _error(place, text, found[1], found[0])
        flat = _plain(text)
        for secret, name in own.items():
            if secret in flat:
                raise _error(place, flat, flat.index(secret), f"what this shell's {name} holds")


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
