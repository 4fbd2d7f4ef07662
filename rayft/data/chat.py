"""Chat templates: from a row to texts and the spans of them that are trained.

What is trained in an assistant turn is what the model has to generate at inference: the text between
`render(messages before it, prompt=True)` and the end of the turn. Where the template marks turns with
`{% generation %}`, the mark says where a turn begins.

A template may render an earlier turn differently once later messages follow (Qwen3 strips the thinking). No single
text then shows every turn as the model will see and write it, so such a conversation becomes several documents, each
with the turns that are exact in it; usually it stays one.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from jinja2 import TemplateError

from rayft.data.formats import Conversation, PromptCompletion, Row, Text
from rayft.errors import DataError, JobError

LossOn = Literal["assistant", "completion", "all"]
Span = tuple[int, int]
Message = dict[str, Any]
Tools = list[dict[str, Any]] | None

#: Templates that print today's date get this one: tokens must not depend on the day they were made.
FIXED_DATE = datetime.date(2024, 7, 26)

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Document:
    """A text and the character spans of it that are trained, in order.

    `turns`: each span is an assistant turn and must end with a turn-end token. `plain`: the text has seen no chat
    template, so that begin and end of text are still to be added.
    """

    text: str
    spans: list[Span]
    turns: bool = False
    plain: bool = False


@dataclass(frozen=True)
class _Rendered:
    text: str
    marks: list[Span]


class ChatTemplate:
    """A tokenizer's chat template and the rule for what carries loss."""

    def __init__(self, tokenizer: Any, loss_on: LossOn) -> None:
        self._tokenizer = tokenizer
        self._loss_on = loss_on
        special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        self._special = tuple(special)

    def prompt(self, messages: Sequence[Message], tools: Tools = None) -> str:
        """The text that inference starts from: the messages and the generation prompt. Raises jinja2's TemplateError."""
        return self._render(messages, tools, prompt=True).text

    def documents(self, row: Row, where: str) -> list[Document]:
        """The texts of a row. Raises DataError naming `where` if nothing is trained or the template cannot show it."""
        if isinstance(row, Text):
            if not row.text.strip():
                raise DataError(f"{where}: the text is empty.", "Drop the row.")
            return [Document(row.text, [(0, len(row.text))], plain=True)]
        if isinstance(row, PromptCompletion):
            start = 0 if self._loss_on == "all" else len(row.prompt)
            text = row.prompt + row.completion
            return [Document(text, [(start, len(text))], plain=True)]
        try:
            return self._everything(row, where) if self._loss_on == "all" else self._turns(row, where)
        except TemplateError as error:
            raise DataError(
                f"{where}: the chat template refuses the conversation: {error}.",
                "Correct or drop the row, or set model.chat_template.",
            ) from None

    def _render(self, messages: Sequence[Message], tools: Tools, *, prompt: bool = False) -> _Rendered:
        from transformers.utils.chat_template_utils import render_jinja_template

        if not self._tokenizer.chat_template:
            raise JobError(
                "The tokenizer has no chat template, which rows with messages need.",
                "Set model.chat_template to a Jinja file, or use an instruction-tuned model.",
            )
        template = self._tokenizer.get_chat_template(tools=tools)
        try:
            rendered: Any = render_jinja_template(
                conversations=[list(messages)],
                tools=list(tools) if tools else None,
                chat_template=template,
                return_assistant_tokens_mask=bool(_GENERATION.search(template)),
                add_generation_prompt=prompt,
                strftime_now=FIXED_DATE.strftime,
                **self._tokenizer.special_tokens_map,
            )
        except (
            Exception
        ) as error:  # a template is a program: besides its own refusals it raises what Python raises
            raise TemplateError(str(error) or type(error).__name__) from None
        texts, marks = rendered
        return _Rendered(texts[0], marks[0] if marks else [])

    def _everything(self, row: Conversation, where: str) -> list[Document]:
        """The whole text trained, but for messages that say `train: false`."""
        text = self._render(row.messages, row.tools).text
        spans, start = [], 0
        for i in (i for i, flag in enumerate(row.train) if flag is False):
            before = self._render(row.messages[:i], row.tools).text if i else ""
            after = self._render(row.messages[: i + 1], row.tools).text
            if not (text.startswith(after) and after.startswith(before)):
                raise DataError(
                    f"{where}: message {i + 1} says `train: false`, but the chat template gives it no fixed place.",
                    "Use `data.loss_on: assistant`, or leave `train` out.",
                )
            spans.append((start, len(before)))
            start = len(after)
        return [Document(text, [*spans, (start, len(text))])]

    def _turns(self, row: Conversation, where: str) -> list[Document]:
        missing = self._trained_turns(row, where)
        upto = {i: self._turn(row, i) for i in missing}
        starts = {i: self._turn_start(row, i, upto[i], where) for i in missing}
        last = len(row.messages) - 1
        text = (upto[last] if last in upto else self._turn(row, last)).text
        documents = []
        while missing:
            exact = [i for i in missing if text.startswith(upto[i].text)]
            if exact:
                spans = [(starts[i], len(upto[i].text.rstrip())) for i in exact]
                documents.append(Document(text, spans, turns=True))
                missing = [i for i in missing if i not in exact]
            if missing:
                text = upto[missing[-1]].text
        return documents[::-1]

    def _trained_turns(self, row: Conversation, where: str) -> list[int]:
        """Indices of the messages that are trained."""
        turns = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
        if row.completion_from is not None:
            turns = [i for i in turns if i >= row.completion_from]
        elif self._loss_on == "completion":
            turns = turns[-1:]
        turns = [i for i in turns if row.train[i] is not False]
        if not turns:
            raise DataError(
                f"{where}: no token of the row is trained.",
                "It needs an assistant message that is not `train: false`; drop the row otherwise.",
            )
        return turns

    def _turn_start(self, row: Conversation, i: int, upto: _Rendered, where: str) -> int:
        """Character at which turn i begins in the text of the messages up to it.

        Raises DataError if inference would begin it differently, or if what the message says is not in it: templates
        of vision models silently leave out content that is a string, older ones tool calls.
        """
        start = self._generation_start(row, i, upto)
        if start is None:
            raise DataError(
                f"{where}: the chat template renders message {i + 1} (assistant) differently from what its generation "
                "prompt leads to, so training would not match inference.",
                "Set model.chat_template to one whose generation prompt is how an assistant turn begins.",
            )
        message, turn = row.messages[i], upto.text[start:]
        calls = [call["function"]["name"] for call in message.get("tool_calls", ())]
        said = {"content": [message["content"].rpartition("</think>")[2].strip()], "tool calls": calls}
        for what, parts in said.items():
            if not all(part in turn for part in parts):
                raise DataError(
                    f"{where}: the chat template leaves out the {what} of message {i + 1} (assistant).",
                    "Set model.chat_template to one that renders it.",
                )
        return start

    def _generation_start(self, row: Conversation, i: int, upto: _Rendered) -> int | None:
        if upto.marks and len(upto.marks) == sum(m["role"] == "assistant" for m in row.messages[: i + 1]):
            return upto.marks[-1][0]
        if i > 0:
            prompt = self.prompt(row.messages[:i], row.tools)
            if upto.text.startswith(prompt):
                return len(prompt)
        elif (header := self._generation_prompt) and header in upto.text:
            # A conversation that the assistant opens: templates cannot render the empty prompt before it.
            return upto.text.index(header) + len(header)
        return None

    def _turn(self, row: Conversation, i: int) -> _Rendered:
        """The text up to and including message i, as it stands when more messages follow."""
        rendered = self._render(row.messages[: i + 1], row.tools)
        text = rendered.text.removesuffix(self._closing)
        ended = text.rstrip().endswith(self._special)
        return _Rendered(text, rendered.marks) if ended else rendered

    @cached_property
    def _probe(self) -> tuple[str, str]:
        """A lone question with and without the generation prompt; empty where the template takes none."""
        question = [{"role": "user", "content": "x"}]
        try:
            return self.prompt(question), self._render(question, None).text
        except TemplateError:
            return "", ""  # a template that wants more than a question

    @cached_property
    def _closing(self) -> str:
        """The token that the template puts after the last message, whoever it is from (Phi-3 does); often none."""
        with_prompt, without = self._probe
        if with_prompt.startswith(without):
            return ""
        ends = [token for token in self._special if without.endswith(token)]
        return next((token for token in ends if with_prompt.startswith(without.removesuffix(token))), "")

    @cached_property
    def _generation_prompt(self) -> str:
        with_prompt, without = self._probe
        return with_prompt.removeprefix(without.removesuffix(self._closing))
