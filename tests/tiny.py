"""Tiny random models of every family rayft trains, and a byte-level tokenizer with a ChatML template.

Made from configs alone, in milliseconds, so that tests run the real transformers code without a hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
#: 256 bytes and the special tokens, rounded up.
VOCAB_SIZE = 264

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "pad_token_id": 256,
}
_GEMMA_LAYERS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}

#: Family (`config.model_type`) -> what its config says beyond, or other than, `_LLAMA_LIKE`.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 8},
    "gemma2": {"tie_word_embeddings": True, "query_pre_attn_scalar": 8, **_GEMMA_LAYERS},
    "gemma3_text": {"tie_word_embeddings": True, "query_pre_attn_scalar": 8, **_GEMMA_LAYERS},
    "gpt_neox": {"rotary_pct": 0.5, "attention_dropout": 0.0, "hidden_dropout": 0.0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


def tiny_config(family: str = "llama", **overrides: Any) -> PretrainedConfig:
    """Config of a two-layer model of one of `FAMILIES`; `overrides` replace single values."""
    values = {**_LLAMA_LIKE, **FAMILIES[family], **overrides}
    if family == "gpt_neox":
        values = {k: v for k, v in values.items() if k not in ("num_key_value_heads", "head_dim")}
    return AutoConfig.for_model(family, **values)


def tiny_model(
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attention: str = "eager",
    **overrides: Any,
) -> PreTrainedModel:
    """A two-layer model with seeded random weights, in evaluation mode.

    Norm weights and biases are made random too, so that a test sees it when they get lost.
    """
    config = tiny_config(family, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level tokenizer (ids 0..255 are bytes) with ChatML: `<|im_end|>` is eos, `<|endoftext|>` pads."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    fast.chat_template = CHATML
    return fast


def save_tiny(folder: Path, family: str = "llama", **model_arguments: Any) -> Path:
    """Write a tiny model with its tokenizer in Hugging Face format to `folder`, and return the folder."""
    tiny_model(family, **model_arguments).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
