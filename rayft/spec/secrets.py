"""What a secret looks like: it must not stand in a job or a profile, which are stored in plain text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

#: Shapes of well-known tokens: AWS key ids, hub, GitHub, GitLab, Slack, Google and OpenAI tokens, JWTs, private keys.
TOKEN = re.compile(
    r"\b(AKIA|ASIA)[0-9A-Z]{16}\b|\bhf_[A-Za-z0-9]{20,}|\bgh[opsu]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}"
    r"|\bxox[abprs]-[-0-9A-Za-z]{10,}|\bsk-[-A-Za-z0-9_]{20,}|\bglpat-[-\w]{18,}|\bAIza[-\w]{35}"
    r"|\beyJ[-\w]{10,}\.eyJ[-\w]{10,}\.|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_SECRET_NAME = re.compile(
    r"(^|_)(SECRET|PASSWORD|PASSWD|TOKEN|CREDENTIALS?|API_?KEY|ACCESS_KEY(_ID)?|PRIVATE_KEY)(_|$)"
)
#: `scheme://user:password@host`
CREDENTIALS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/\s:@]*:[^/\s@]+@")


def secret_in(text: str) -> tuple[str, int] | None:
    """What secret a text holds, in words, and where in it; None where it holds none."""
    for pattern, what in ((TOKEN, "a token or key"), (CREDENTIALS, "a URL with a password")):
        if found := pattern.search(text):
            return what, found.start()
    return None


def texts_of(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a value of mappings and lists, keys among them, each with its place (`a.b.0`)."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield place, str(key)
            yield from texts_of(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from texts_of(inner, f"{place}.{index}" if place else str(index))


def looks_secret(name: str, value: str) -> bool:
    """Whether a variable is one that holds a secret, by its name or by what it holds."""
    named = _SECRET_NAME.search(name.upper()) and not name.upper().endswith(
        ("_PATH", "_FILE", "_DIR", "_URL")
    )
    return bool(named or TOKEN.search(value) or CREDENTIALS.search(value))
