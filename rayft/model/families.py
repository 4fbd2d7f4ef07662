"""Model families that are proven: their packed logits and gradients equal the unpacked ones, their loss head is ours.

`tests/unit/test_model_families.py` proves each on tiny random models. A family that is not listed trains unpacked and
with whole logits: layers that carry state over the row (state-space, linear attention, convolutions) would leak
between documents, and its forward may do something to the logits that `rayft.model.head` does not know.
"""

from __future__ import annotations

from typing import Any

#: `config.model_type` of proven families.
PROVEN = frozenset(
    {
        "llama",
        "qwen2",
        "qwen3",
        "mistral",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gpt_neox",
        "mixtral",
        "qwen3_moe",
    }
)


def can_pack(config: Any) -> tuple[bool, str]:
    """Whether models of this (transformers) config may be trained on packs, and why not."""
    if config.model_type not in PROVEN:
        return (
            False,
            f"model family {config.model_type!r} is not proven for packing (proven: {', '.join(sorted(PROVEN))})",
        )
    if getattr(config, "attention_dropout", 0.0):
        return (
            False,
            f"config.attention_dropout is {config.attention_dropout}; attention per document has no dropout",
        )
    if getattr(config, "use_bidirectional_attention", False):
        return False, "config.use_bidirectional_attention is set; packs are for causal attention"
    return True, ""
