"""What the columns of a row mean, and what is said about those that mean nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rayft.data.formats import Conversation, PromptCompletion, Text, detect_format, normalise
from rayft.errors import DataError
from rayft.spec import Source


def row_of(row: dict[str, Any], **source: Any) -> Any:
    made = Source(path="x.jsonl", **source)
    layout = detect_format([made_name(name, made) for name in row], "x.jsonl line 1")
    return normalise(row, layout, made, "x.jsonl line 1")


def made_name(column: str, source: Source) -> str:
    return next((field for field, name in source.columns.items() if name == column), column)


def test_text_and_strings_of_prompt_and_completion() -> None:
    assert row_of({"id": 1, "text": "abc"}) == Text("abc")
    assert row_of({"prompt": "a", "completion": "b"}) == PromptCompletion("a", "b")


def test_messages_with_tools_and_flags() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            "name": None,
        },
        {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0},
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
        {"role": "assistant", "content": "done", "reasoning_content": "hm", "train": True},
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = row_of({"messages": messages, "tools": json.dumps(tools)})
    assert row.train == [None, False, None, True]
    assert row.tools == tools
    assert row.messages == [
        {"role": "user", "content": "ab"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"type": "function", "id": "c1", "function": {"name": "f", "arguments": {"x": 1}}}
            ],
        },
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
        {"role": "assistant", "content": "done", "reasoning_content": "hm"},
    ]


def test_a_conversational_prompt_with_a_string_completion() -> None:
    row = row_of(
        {"prompt": [{"role": "user", "content": "q"}], "solution": "a"}, columns={"completion": "solution"}
    )
    assert [m["content"] for m in row.messages] == ["q", "a"]
    assert row.completion_from == 1


def test_a_system_message_is_put_before_conversations_that_have_none() -> None:
    prompt = [{"role": "user", "content": "q"}]
    row = row_of({"prompt": prompt, "completion": [{"role": "assistant", "content": "a"}]}, system="Be kind.")
    assert row.messages[0] == {"role": "system", "content": "Be kind."}
    assert row.completion_from == 2
    own = row_of({"messages": [{"role": "system", "content": "Own."}, *prompt]}, system="Be kind.")
    assert [m["content"] for m in own.messages] == ["Own.", "q"]


def test_alpaca() -> None:
    row = row_of(
        {"instruction": "Add.", "input": "1 2", "output": "3", "system": "S", "history": [["q", "a"]]}
    )
    assert [(m["role"], m["content"]) for m in row.messages] == [
        ("system", "S"),
        ("user", "q"),
        ("assistant", "a"),
        ("user", "Add.\n\n1 2"),
        ("assistant", "3"),
    ]
    plain = row_of({"instruction": "Add.", "input": "", "output": "3"})
    assert [m["content"] for m in plain.messages] == ["Add.", "3"]


def test_sharegpt_with_a_function_call() -> None:
    turns = [
        {"from": "human", "value": "weather?"},
        {"from": "function_call", "value": '{"name": "get", "arguments": {"city": "X"}}'},
        {"from": "observation", "value": "rain"},
        {"from": "gpt", "value": "Rain.", "weight": 0},
    ]
    row = row_of({"conversations": turns, "tools": "", "system": "S"})
    assert [m["role"] for m in row.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert row.messages[2]["tool_calls"][0]["function"] == {"name": "get", "arguments": {"city": "X"}}
    assert row.train == [None, None, None, None, False]
    assert isinstance(row, Conversation)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "q", "reply": "r"}, r"columns \(question, reply\) fit no known layout.*`columns`"),
        ({"text": "t", "prompt": "p", "completion": "c"}, r"fit text and prompt_completion.*`format`"),
        ({"text": 3}, "column 'text' is a number"),
        ({"text": None}, "column 'text' is missing or null"),
        ({"prompt": "p", "completion": ""}, "the completion is empty"),
        ({"prompt": "p", "completion": 4}, "'completion' is a number.*string or a list of messages"),
        ({"messages": []}, "non-empty list"),
        ({"messages": "hello"}, "'messages' is text that is not valid JSON"),
        ({"messages": ["hello"]}, "message 1 is not an object"),
        (
            {"messages": [{"role": "robot", "content": "x"}]},
            "message 1 has the role 'robot'.*Roles are: system",
        ),
        ({"messages": [{"role": "user"}]}, "message 1 has no 'content'"),
        ({"messages": [{"role": "user", "content": 5}]}, "'content' is not a string"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content of type image"),
        (
            {"messages": [{"role": "user", "content": "x", "train": True}]},
            "asks to be trained but its role is user",
        ),
        ({"messages": [{"role": "assistant", "content": "x", "train": 0.5}]}, "is 0.5.*true or false"),
        ({"messages": [{"role": "assistant", "content": "x", "train": True, "weight": 0}]}, "contradict"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "only assistant messages"),
        ({"messages": [{"role": "assistant", "tool_calls": {}}]}, "'tool_calls' must be a list"),
        ({"messages": [{"role": "assistant", "tool_calls": ["f"]}]}, "tool call must be an object"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, "no function name"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]},
            "arguments of tool call 'f' are not valid JSON",
        ),
        ({"messages": [{"role": "user", "content": "x"}], "tools": ["f"]}, "'tools' must be a list"),
        ({"conversations": [{"value": "x"}]}, "turn 1 of 'conversations' has no 'from'"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "turn 1 comes from 'narrator'"),
        ({"conversations": []}, "'conversations' is an empty list"),
        ({"instruction": "i", "output": ["o"]}, "column 'output' is a list"),
        ({"instruction": "i", "output": "o", "history": [["q"]]}, "'history' must be a list"),
    ],
)
def test_wrong_rows_are_named(row: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=rf"x\.jsonl line 1.*{words}") as error:
        row_of(row)
    assert error.value.code == 3


def test_a_column_to_rename_must_be_there() -> None:
    with pytest.raises(DataError, match=r"no column 'solution', which `columns` maps to 'completion'"):
        normalise(
            {"prompt": "p"},
            "prompt_completion",
            Source(path="x", columns={"completion": "solution"}),
            "x row 1",
        )
