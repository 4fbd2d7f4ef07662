"""The CEL rules that schemas carry under `x-kubernetes-validations`, by Google's own engine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from rayft.fleet.lint.findings import Found, structural

CEL = structural(
    "cel",
    reason="The API server refuses the object",
    source="x-kubernetes-validations of the schemas of KubeRay and Kueue (--schemas)",
)

#: A rule that compares with the object before the change says nothing of an object on its own.
_TRANSITION = re.compile(r"\boldSelf\b")

INSTALL = "pip install 'rayft[k8s]'"


def transition(rule: dict[str, Any]) -> bool:
    """Whether a rule compares with an older state of the object."""
    return bool(_TRANSITION.search(str(rule.get("rule", ""))))


@cache
def available() -> bool:
    """Whether the engine is installed."""
    try:
        import cel_expr_python  # noqa: F401
    except ImportError:
        return False
    return True


@cache
def _compiled(expression: str) -> Any:
    from cel_expr_python import cel

    return cel.NewEnv(variables={"self": cel.Type.DYN}).compile(expression)


def check(rules: list[tuple[str, dict[str, Any], Any]]) -> Iterator[Found]:
    """Rules that do not hold; each comes with its path and the value it speaks of."""
    for path, rule, value in rules:
        if transition(rule):
            continue
        expression = str(rule.get("rule", "")).strip()
        message = str(rule.get("message") or expression).rstrip(".")
        try:
            result = _compiled(expression).eval(data={"self": value}).value()
        except (RuntimeError, TypeError, ValueError) as error:
            yield Found(path, f"{message} (the rule cannot be evaluated: {_short(error)})", "Correct it")
            continue
        if result is not True:
            # An expression that fails, as on a field that is absent, counts as false with the API server too.
            reason = "" if result is False else f" ({_short(result)})"
            yield Found(path, f"{message}{reason}", f"The rule: {' '.join(expression.split())}")


def _short(value: object) -> str:
    return str(value).splitlines()[0][:120]
