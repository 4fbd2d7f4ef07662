"""Tokenizers with merges, chat templates with the structure of the well-known families, and caches in a folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rayft.data.cache import CacheSpec, plan_cache, prepare_shard
from rayft.data.corpus import Corpus
from rayft.data.formats import EXAMPLES, Format
from rayft.data.template import ChatTokenizer
from rayft.spec import Data
from rayft.storage import open_store

CHATML_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

#: Family -> (template, bos, eos, special tokens). The structure is that of the family, the wording is not.
FAMILIES: dict[str, tuple[str, str | None, str, list[str]]] = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        None,
        "<|im_end|>",
        ["<|im_start|>", "<|im_end|>"],
    ),
    "chatml_marked": (CHATML_MARKED, None, "<|im_end|>", ["<|im_start|>", "<|im_end|>"]),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n'"
        " + m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "<|begin_of_text|>",
        "<|end_of_text|>",
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    ),
    # Thinking of earlier turns goes; the last turn always shows a (perhaps empty) thought.
    "qwen3": (
        "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
        "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        None,
        "<|im_end|>",
        ["<|im_start|>", "<|im_end|>"],
    ),
    # The system message stands in the last user message, so history changes with every turn.
    "mistral": (
        "{% set system = messages[0].content if messages[0].role == 'system' else none %}"
        "{% set loop_messages = messages[1:] if system is not none else messages %}"
        "{{ bos_token }}{% for m in loop_messages %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
        "{% if m.role == 'user' %}{{ '[INST] ' }}"
        "{% if system is not none and loop.index0 >= loop_messages | length - 2 and loop.index0 % 2 == 0 %}"
        "{{ system + '\n\n' }}{% endif %}{{ m.content + '[/INST]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
        "<s>",
        "</s>",
        ["<s>", "</s>", "[INST]", "[/INST]"],
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim"
        " + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        "<bos>",
        "<eos>",
        ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
    ),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        "<s>",
        "</s>",
        ["<s>", "</s>"],
    ),
}

#: Merged by the byte-level tokenizer: two line ends, and a space with a letter or two.
_MERGES = [("Ċ", "Ċ"), ("Ġ", "a"), ("Ġ", "b"), ("t", "h"), ("Ġ", "th")]


def byte_tokenizer(
    template: str | None = None,
    *,
    bos: str | None = None,
    eos: str | None = "<|im_end|>",
    special: Iterable[str] = ("<|im_start|>", "<|im_end|>"),
    add_bos: bool = False,
    right_strip: bool = False,
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a few merges. `right_strip`: special tokens take in the white space after them."""
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in _MERGES)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(letters)}, merges=_MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, rstrip=right_strip) for t in special])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    fast.chat_template = template
    return fast


def family_tokenizer(family: str) -> ChatTokenizer:
    """A tokenizer with the chat template of one of `FAMILIES`."""
    template, bos, eos, special = FAMILIES[family]
    return ChatTokenizer(byte_tokenizer(template, bos=bos, eos=eos, special=special))


def space_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer in sentencepiece's manner: spaces are `▁`, and every text begins with one."""
    letters = ["▁", *map(chr, range(33, 127)), "\n", "▁a", "▁b"]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(letters)}, merges=[("▁", "a"), ("▁", "b")])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write rows as jsonl and return the path."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def chat_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Short conversations of different lengths, no two alike."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"question {seed}-{i} " + "u" * (i * 7 % 23)},
                {"role": "assistant", "content": f"answer {seed}-{i} " + "a" * (i * 5 % 31)},
            ]
        }
        for i in range(count)
    ]


def corpus_of(
    data: Data, tokenizer: ChatTokenizer, folder: Path, allowed: Sequence[Format] = EXAMPLES
) -> tuple[CacheSpec, Corpus]:
    """All shards of `data.train` prepared in `folder`, and the corpus that reads them."""
    spec = plan_cache(data.train, data, tokenizer, node_dir=folder / "node", allowed=allowed)
    cache = open_store(folder / "cache")
    for index in range(len(spec.shards)):
        prepare_shard(spec, index, cache, node_dir=folder / "node")
    return spec, Corpus(spec, cache, node_dir=folder / "node", wait_timeout_s=5)
