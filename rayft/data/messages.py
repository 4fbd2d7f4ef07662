"""Validation of `messages` and `tools` in the shape of the OpenAI API and TRL.

Tool-call arguments that are JSON text (as the OpenAI API gives them) become objects, which is what chat templates
expect; `train` (true/false) and `weight` (0/1) of a message become its training flag.
"""

from __future__ import annotations

import json
from typing import Any

from rayft.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")


def check_messages(messages: Any, where: str) -> tuple[list[dict[str, Any]], list[bool | None]]:
    """Messages ready for a chat template and their training flags. Raises DataError naming the message."""
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f"{where}: 'messages' must be a non-empty list of {{role, content}} objects.",
            "Correct or drop the row.",
        )
    checked, train = [], []
    for number, message in enumerate(messages, 1):
        clean, flag = _check_message(message, f"{where}, message {number}")
        checked.append(clean)
        train.append(flag)
    return checked, train


def check_tools(tools: Any, where: str) -> list[dict[str, Any]] | None:
    """Tool schemas as a list of objects; None where there are none."""
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where}: 'tools' must be a list of JSON schemas.", "Correct or drop the column.")
    return tools


def _check_message(message: Any, where: str) -> tuple[dict[str, Any], bool | None]:
    if not isinstance(message, dict) or "role" not in message:
        raise DataError(f"{where} is not an object with 'role' and 'content'.", "Correct or drop the row.")
    # Tables fill absent keys with null; to a template, a null key is not the same as no key.
    clean = {k: v for k, v in message.items() if v is not None and k not in ("train", "weight")}
    role = clean.get("role")
    if role not in ROLES:
        raise DataError(f"{where} has the role {role!r}.", f"Roles are: {', '.join(ROLES)}.")
    if "tool_calls" in clean:
        if role != "assistant":
            raise DataError(f"{where}: only assistant messages have 'tool_calls', not {role}.")
        clean["tool_calls"] = [_check_call(call, where) for call in _list(clean["tool_calls"], where)]
    if "content" not in clean and not clean.get("tool_calls"):
        raise DataError(f"{where} has no 'content'.", "Correct or drop the row.")
    clean["content"] = _text(clean.get("content", ""), where)
    return clean, _flag(message, role, where)


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(p, dict) and "type" in p for p in content):
        other = {p["type"] for p in content if p["type"] != "text"}
        if other:
            raise DataError(
                f"{where} has content of type {', '.join(sorted(other))}.", "rayft trains on text alone."
            )
        return "".join(str(p.get("text", "")) for p in content)
    raise DataError(f"{where}: 'content' is not a string.", "Correct or drop the row.")


def _flag(message: dict[str, Any], role: str, where: str) -> bool | None:
    values = [message[k] for k in ("train", "weight") if message.get(k) is not None]
    if not values:
        return None
    if len(values) == 2 and bool(values[0]) != bool(values[1]):
        raise DataError(f"{where}: 'train' and 'weight' contradict each other.", "Keep one of them.")
    if values[0] not in (0, 1):
        raise DataError(f"{where}: 'train' (or 'weight') is {values[0]!r}.", "It must be true or false.")
    if values[0] and role != "assistant":
        raise DataError(
            f"{where} asks to be trained but its role is {role}.",
            "Only assistant messages carry loss; `data.loss_on: all` trains on everything.",
        )
    return bool(values[0])


def _check_call(call: Any, where: str) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise DataError(f"{where}: a tool call must be an object with a 'function'.")
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{where}: a tool call has no function name.", "Correct or drop the row.")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: the arguments of tool call {function['name']!r} are not valid JSON: {error}."
            ) from None
    rest = {k: v for k, v in call.items() if k != "function" and v is not None} if "function" in call else {}
    return {"type": "function", **rest, "function": {"name": function["name"], "arguments": arguments}}


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{where}: 'tool_calls' must be a list.", "Correct or drop the row.")
    return value
