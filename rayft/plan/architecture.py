"""What a model's config.json says about its size: every parameter's shape, without building the model.

Parameter names are those of the transformers modules, so that adapters and tests can name them.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rayft.errors import JobError

Shape = tuple[int, ...]

#: Values that a config.json may leave out, where the family's default differs from "hidden / heads" and "not tied".
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 256, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 256, "tie_word_embeddings": True},
    "gemma3_text": {"head_dim": 256, "tie_word_embeddings": True},
    "gpt_neox": {"attention_bias": True},
    "llama": {},
    "mistral": {},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2": {"qkv_bias": True},
    "qwen2_moe": {"qkv_bias": True, "num_experts_per_tok": 4},
    "qwen3": {"head_dim": 128},
    "qwen3_moe": {"num_experts_per_tok": 8},
}


@dataclass(frozen=True)
class Architecture:
    """A causal language model by its sizes. `intermediate` is the feed-forward width that one token passes through."""

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    experts_per_token: int
    vocabulary: int
    tied: bool
    parameters: Mapping[str, Shape]
    active: int

    @property
    def total(self) -> int:
        """Number of parameters, tied ones counted once."""
        return sum(math.prod(shape) for shape in self.parameters.values())

    @property
    def largest_layer(self) -> int:
        """Parameters of the largest block that ZeRO-3 gathers whole: a layer, or the embedding."""
        sizes: dict[str, int] = {}
        for name, shape in self.parameters.items():
            sizes[_block(name)] = sizes.get(_block(name), 0) + math.prod(shape)
        return max(sizes.values())

    def linears(self) -> dict[str, tuple[int, int]]:
        """Modules that `all-linear` adapts, name to (inputs, outputs): no embedding, head, router or stacked experts."""
        skipped = ("embed_tokens", "embed_in", "lm_head", "mlp.gate", "block_sparse_moe.gate")
        return {
            module: size
            for module, size in self.matrices().items()
            if not module.endswith(skipped) and ".experts." not in module
        }

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Modules with a two-dimensional weight, name to (inputs, outputs)."""
        return {
            name.removesuffix(".weight"): (shape[1], shape[0])
            for name, shape in self.parameters.items()
            if name.endswith(".weight") and len(shape) == 2
        }


def read_architecture(config: Mapping[str, Any], shapes: Mapping[str, Shape] | None = None) -> Architecture:
    """Sizes and parameters from a parsed config.json.

    `shapes` are the shapes in the weights' own headers (`headers.py`): they count exactly what is there, and are
    needed for a family that this module does not know. Raises JobError for such a family without them, and for a
    config that lacks a size.
    """
    config = config.get("text_config", config)
    family = config.get("model_type", "")
    if family not in FAMILY_DEFAULTS and shapes is None:
        near = difflib.get_close_matches(family, FAMILY_DEFAULTS, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise JobError(
            f"The memory plan does not know the model family {family!r} from its config alone.",
            f"{hint}Known are {', '.join(FAMILY_DEFAULTS)}; for others give a model whose weights are at hand.",
        )
    sizes = _Sizes({**FAMILY_DEFAULTS.get(family, {}), **{k: v for k, v in config.items() if v is not None}})
    parameters = dict(shapes) if shapes is not None else dict(_parameters(sizes))
    if sizes.tied:
        parameters.pop("lm_head.weight", None)
    total = sum(math.prod(shape) for shape in parameters.values())
    return Architecture(
        family=family,
        hidden=sizes.hidden,
        layers=sizes.layers,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        intermediate=sizes.active_intermediate,
        experts_per_token=sizes.experts_per_token if sizes.experts else 0,
        vocabulary=sizes.vocabulary,
        tied=sizes.tied,
        parameters=parameters,
        active=total - sizes.idle_expert_parameters,
    )


class _Sizes:
    """A config's sizes under one name each."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.family = config.get("model_type", "")
        self.hidden = self._size("hidden_size")
        self.layers = self._size("num_hidden_layers")
        self.heads = self._size("num_attention_heads")
        self.vocabulary = self._size("vocab_size")
        self.dense_intermediate = self._size("intermediate_size")
        self.kv_heads = (
            self.heads if self.family == "gpt_neox" else config.get("num_key_value_heads", self.heads)
        )
        self.head_dim = config.get("head_dim", self.hidden // self.heads)
        self.tied = config.get("tie_word_embeddings", False)
        self.experts = config.get("num_local_experts", config.get("num_experts", 0))
        self.experts_per_token = config.get("num_experts_per_tok", 0)
        self.expert_intermediate = config.get("moe_intermediate_size", self.dense_intermediate)
        self.shared_intermediate = config.get("shared_expert_intermediate_size", 0)

    def has_experts(self, layer: int) -> bool:
        """Whether a layer is sparse: Qwen's configs can name dense ones among them."""
        if not self.experts or layer in self.config.get("mlp_only_layers", ()):
            return False
        return (layer + 1) % self.config.get("decoder_sparse_step", 1) == 0

    @property
    def active_intermediate(self) -> int:
        if not self.experts:
            return self.dense_intermediate
        return self.experts_per_token * self.expert_intermediate + self.shared_intermediate

    @property
    def idle_expert_parameters(self) -> int:
        """Parameters of the experts that a token does not pass through."""
        sparse = sum(self.has_experts(layer) for layer in range(self.layers))
        return (
            sparse
            * max(0, self.experts - self.experts_per_token)
            * 3
            * self.expert_intermediate
            * self.hidden
        )

    def _size(self, key: str) -> int:
        value = self.config.get(key)
        if not isinstance(value, int) or value <= 0:
            raise JobError(
                f"The model's config.json gives {key} as {value!r}, which is no size.",
                "Is it the config of a causal language model?",
            )
        return value


def _parameters(sizes: _Sizes) -> Iterator[tuple[str, Shape]]:
    hidden, vocabulary = sizes.hidden, sizes.vocabulary
    if sizes.family == "gpt_neox":
        yield "gpt_neox.embed_in.weight", (vocabulary, hidden)
        for layer in range(sizes.layers):
            yield from _prefixed(f"gpt_neox.layers.{layer}.", _neox_layer(sizes))
        yield from _prefixed("gpt_neox.final_layer_norm.", _norm_with_bias(hidden))
    else:
        yield "model.embed_tokens.weight", (vocabulary, hidden)
        for layer in range(sizes.layers):
            yield from _prefixed(f"model.layers.{layer}.", _layer(sizes, sizes.has_experts(layer)))
        yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def _layer(sizes: _Sizes, sparse: bool) -> Iterator[tuple[str, Shape]]:
    """One layer of the Llama line: grouped-query attention, gated feed-forward or experts, RMS norms."""
    hidden, family = sizes.hidden, sizes.family
    heads, kv_heads = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    all_biased = sizes.config.get("attention_bias", False)
    qkv_biased = all_biased or sizes.config.get("qkv_bias", False)
    for name, outputs in (("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads)):
        yield from _linear(f"self_attn.{name}", hidden, outputs, qkv_biased)
    yield from _linear("self_attn.o_proj", heads, hidden, all_biased)
    if family in ("qwen3", "qwen3_moe", "gemma3_text"):
        yield "self_attn.q_norm.weight", (sizes.head_dim,)
        yield "self_attn.k_norm.weight", (sizes.head_dim,)
    if sparse:
        yield from _prefixed("mlp.", _experts(sizes))
    else:
        yield from _gated("mlp.", hidden, sizes.dense_intermediate, sizes.config.get("mlp_bias", False))
    norms = ["input_layernorm", "post_attention_layernorm"]
    if family in ("gemma2", "gemma3_text"):
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for norm in norms:
        yield f"{norm}.weight", (hidden,)


def _experts(sizes: _Sizes) -> Iterator[tuple[str, Shape]]:
    hidden, experts, width = sizes.hidden, sizes.experts, sizes.expert_intermediate
    yield "gate.weight", (experts, hidden)
    yield "experts.gate_up_proj", (experts, 2 * width, hidden)
    yield "experts.down_proj", (experts, hidden, width)
    if sizes.shared_intermediate:
        yield from _gated("shared_expert.", hidden, sizes.shared_intermediate, False)
        yield "shared_expert_gate.weight", (1, hidden)


def _neox_layer(sizes: _Sizes) -> Iterator[tuple[str, Shape]]:
    hidden, width = sizes.hidden, sizes.dense_intermediate
    yield from _prefixed("input_layernorm.", _norm_with_bias(hidden))
    yield from _prefixed("post_attention_layernorm.", _norm_with_bias(hidden))
    biased = sizes.config["attention_bias"]
    yield from _linear("attention.query_key_value", hidden, 3 * hidden, biased)
    yield from _linear("attention.dense", hidden, hidden, biased)
    yield from _linear("mlp.dense_h_to_4h", hidden, width, True)
    yield from _linear("mlp.dense_4h_to_h", width, hidden, True)


def _gated(prefix: str, hidden: int, width: int, biased: bool) -> Iterator[tuple[str, Shape]]:
    yield from _linear(f"{prefix}gate_proj", hidden, width, biased)
    yield from _linear(f"{prefix}up_proj", hidden, width, biased)
    yield from _linear(f"{prefix}down_proj", width, hidden, biased)


def _linear(name: str, inputs: int, outputs: int, biased: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (outputs, inputs)
    if biased:
        yield f"{name}.bias", (outputs,)


def _norm_with_bias(hidden: int) -> list[tuple[str, Shape]]:
    return [("weight", (hidden,)), ("bias", (hidden,))]


def _prefixed(prefix: str, parameters: Any) -> Iterator[tuple[str, Shape]]:
    for name, shape in parameters:
        yield prefix + name, shape


def _block(name: str) -> str:
    """`model.layers.3` for a parameter in a layer, its own name otherwise."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else name
