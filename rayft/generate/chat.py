"""`rayft chat MODEL`: talk to a model in the terminal, answers appearing as they are generated."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from rayft.data.template import ChatTokenizer
from rayft.generate.hf import TransformersEngine
from rayft.generate.load import load_model
from rayft.generate.prompts import answer_text, chat_prompt

HELP = "An empty line or /exit ends, /new forgets the conversation, Ctrl-C stops an answer."


class Conversation:
    """Messages so far, and the engine that answers them."""

    def __init__(
        self,
        engine: TransformersEngine,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
    ) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.template = ChatTokenizer(tokenizer)
        self.settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        self.opening = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.opening)

    def forget(self) -> None:
        """Start anew, with the system message if there is one."""
        self.messages = list(self.opening)

    def ask(self, text: str) -> Iterator[str]:
        """Pieces of the answer as they come; what was yielded becomes part of the conversation.

        A conversation that has grown beyond the model's context loses its oldest exchanges. Raises DataError when
        the question alone is too long.
        """
        self.messages.append({"role": "user", "content": text})
        prompt = chat_prompt(self.template, self.messages)
        room = (self.engine.context or sys.maxsize) - self.settings["max_new_tokens"]
        while len(prompt) > room and len(self.messages) > len(self.opening) + 1:
            del self.messages[len(self.opening) : len(self.opening) + 2]
            prompt = chat_prompt(self.template, self.messages)
        answer = ""
        try:
            for piece in pieces(self.tokenizer, self.engine.stream(prompt, **self.settings)):
                answer += piece
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": answer})


def chat(
    model: str,
    *,
    prompt: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
) -> int:
    """Answer `prompt` and end, or talk until the input ends; returns the exit code.

    model: folder, hub id, run or adapter. temperature 0 is greedy. Raises JobError for a model that cannot be loaded.
    """
    loaded, tokenizer = load_model(model)
    engine = TransformersEngine(loaded, tokenizer)
    conversation = Conversation(
        engine, tokenizer, system=system, max_new_tokens=max_new_tokens, temperature=temperature
    )
    if prompt is not None:
        _show(conversation.ask(prompt))
        return 0
    print(HELP)
    while (line := _read()) not in ("", "/exit"):
        if line == "/new":
            conversation.forget()
            continue
        try:
            _show(conversation.ask(line))
        except KeyboardInterrupt:
            print()
    return 0


def pieces(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int]) -> Iterator[str]:
    """Text of the tokens as they come, never half a character."""
    ids: list[int] = []
    shown = ""
    for token in tokens:
        ids.append(token)
        text = answer_text(tokenizer, ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown) :]
            shown = text
    if rest := answer_text(tokenizer, ids)[len(shown) :]:
        yield rest


def _read() -> str:
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return ""


def _show(answer: Iterable[str]) -> None:
    for piece in answer:
        print(piece, end="", flush=True)
    print()
