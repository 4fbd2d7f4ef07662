"""Messages to prompt ids, which tokens end an answer, and generated ids back to text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from rayft.data.template import ChatTokenizer
from rayft.errors import DataError

#: Stands where an assistant's words stand while looking for what the template puts after them.
PROBE = "rayft"


def chat_prompt(
    chat: ChatTokenizer,
    messages: Sequence[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    where: str = "the conversation",
) -> list[int]:
    """Token ids of the messages up to where the assistant begins to speak, as in training.

    Raises JobError when the tokenizer has no chat template, DataError when the template refuses the messages.
    """
    try:
        return chat.prompt_ids(messages, tools)
    except TemplateError as error:
        raise DataError(
            f"{where}: the chat template refuses the messages: {error}.",
            "Correct the roles and their order, or set model.chat_template.",
        ) from None


def text_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of plain text, after BOS where the tokenizer puts one before texts; no EOS."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    bos = tokenizer.bos_token_id
    return [bos, *ids] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else ids


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None
) -> frozenset[int]:
    """Tokens that end an answer: the model's and the tokenizer's EOS and what the chat template ends a turn with."""
    found: set[int] = set()
    configured = generation_config.eos_token_id if generation_config else None
    if configured is not None:
        found.update(configured if isinstance(configured, list) else [configured])
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": PROBE}, {"role": "assistant", "content": PROBE}]
        text: Any = tokenizer.apply_chat_template(messages, tokenize=False)
        after = tokenizer(text.rpartition(PROBE)[2].lstrip(), add_special_tokens=False)["input_ids"][:1]
        found.update(token for token in after if _special(tokenizer, token))
    return frozenset(found)


def _special(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    added = tokenizer.added_tokens_decoder.get(token)
    return added is not None and added.special


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Generated ids as text, without special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))
