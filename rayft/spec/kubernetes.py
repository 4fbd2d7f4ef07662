"""Names and values as Kubernetes takes them, so that a profile is refused here and not by a cluster."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated

from pydantic import AfterValidator

_LABEL = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_DNS = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_SUBDOMAIN = rf"{_DNS}(\.{_DNS})*"
_IMAGE = r"[a-z0-9][-a-z0-9._:/]*(:[A-Za-z0-9_][-A-Za-z0-9_.]{0,127}|@sha256:[0-9a-f]{64})"


def _matching(pattern: str, what: str, longest: int = 253) -> Callable[[str], str]:
    compiled = re.compile(pattern)

    def check(value: str) -> str:
        if len(value) > longest or not compiled.fullmatch(value):
            raise ValueError(f"{value!r} is no {what}")
        return value

    return check


def _qualified(value: str) -> str:
    prefix, slash, name = value.rpartition("/")
    if not re.fullmatch(_LABEL, name) or (slash and not re.fullmatch(_SUBDOMAIN, prefix)):
        raise ValueError(f"{value!r} is no label or resource name, such as example.com/pool")
    return value


def _group(value: str) -> str:
    if value == "head":
        raise ValueError("'head' is the name of the head's group; call the node type something else")
    return _matching(r"[a-z]([-a-z0-9]{0,13}[a-z0-9])?", "name of a node type (a-z, 0-9, -; at most 15)")(
        value
    )


#: A label's value, as pods carry it.
Label = Annotated[
    str, AfterValidator(_matching(_LABEL, "label value (letters, digits, - _ . inside; at most 63)", 63))
]
LabelKey = Annotated[str, AfterValidator(_qualified)]
LabelMap = dict[LabelKey, Label]
Namespace = Annotated[str, AfterValidator(_matching(_DNS, "namespace (a-z, 0-9, - inside; at most 63)", 63))]
ObjectName = Annotated[str, AfterValidator(_matching(_SUBDOMAIN, "object name (a-z, 0-9, - and . inside)"))]
GroupName = Annotated[str, AfterValidator(_group)]
Version = Annotated[str, AfterValidator(_matching(r"\d+\.\d+\.\d+", "version such as 2.60.0"))]
EnvName = Annotated[str, AfterValidator(_matching(r"[A-Za-z_][A-Za-z0-9_]*", "name of a variable"))]
Image = Annotated[
    str,
    AfterValidator(_matching(_IMAGE, "image with a tag or digest, such as registry/rayft:0.1.0-gpu", 500)),
]
