"""Activations of one micro-batch: what the forward pass keeps for the backward pass.

Bytes per token of a layer, with b bytes an element, hidden size h, query width q, key width k, feed-forward width f
(of all experts a token passes through, e of them):

    norms         its input (b h where rayft fuses the norm, else 4h, and its normalised form where it is trained: b h,
                  Gemma's in fp32), and the output that goes into a matrix product (b h, twice a layer)
    attention     b (2q + 2k) + 4 per head: queries, keys, values, output, the softmax's log-sum; rayft's attention
                  on CPU also keeps the probabilities of documents up to 256 tokens
    feed-forward  b 3f where rayft fuses it: gate, up, their product; else b 4f with the gate's activation, and b 2f
                  where there is no gate
    experts       b 2 e h: every expert's input and output

A LoRA on stacked experts keeps the update of every expert whole, as large as the experts themselves.
With gradient checkpointing a layer keeps its input (b h), and one layer at a time is whole.
"""

from __future__ import annotations

import math

from rayft.plan.architecture import Architecture
from rayft.plan.trainable import adapted_stacks
from rayft.spec import Job

#: Longest document of which rayft's attention on CPU keeps the probabilities.
KEPT_PROBABILITIES = 256

#: Families whose norms and feed-forwards rayft replaces by fused equals that keep less.
FUSED = frozenset({"llama", "qwen2", "qwen3", "mistral", "mixtral", "qwen3_moe"})
GEMMA = ("gemma", "gemma2", "gemma3_text")


def activation_bytes(job: Job, architecture: Architecture, element: int) -> int:
    """Activations of the largest micro-batch of a rank at the start of the backward pass, without logits."""
    tokens = micro_batch_tokens(job)
    layer = layer_bytes_per_token(architecture, element, norms_trained=job.adapter.type == "none")
    layer += architecture.heads * _score_bytes(job, element)
    if job.train.gradient_checkpointing:
        kept = architecture.layers * element * architecture.hidden + layer
    else:
        kept = architecture.layers * layer
    updates = element * sum(math.prod(shape) for shape in adapted_stacks(job.adapter, architecture).values())
    if job.train.gradient_checkpointing:
        updates //= architecture.layers
    # gradients on their way through one layer, and the final norm
    moving = element * (2 * architecture.intermediate + 2 * architecture.hidden)
    return tokens * (kept + moving + (4 + 2 * element) * architecture.hidden) + updates


def micro_batch_tokens(job: Job) -> int:
    """Tokens of the largest micro-batch: answers that are compared stay together, two of a pair (more of a ranked list)."""
    tokens = job.train.micro_batch_size * job.data.max_length
    if job.method == "sft" or job.reinforced or (job.method == "dpo" and job.dpo.loss == "kto"):
        return tokens
    packed = job.data.packing is not False and job.model.attention in ("auto", "documents")
    return max(tokens, 2 * job.data.max_length) if packed else 2 * tokens


def layer_bytes_per_token(architecture: Architecture, element: int, *, norms_trained: bool = True) -> int:
    """Bytes that one layer keeps per token."""
    family, hidden, heads = architecture.family, architecture.hidden, architecture.heads
    queries, keys = heads * architecture.head_dim, architecture.kv_heads * architecture.head_dim
    norm = _norm_bytes(family, element, norms_trained)
    width = (4 if family in ("gemma2", "gemma3_text") else 2) * hidden
    if family in ("qwen3", "qwen3_moe", "gemma3_text"):
        width += queries + keys  # queries and keys are normalised too
    attention = element * (2 * queries + 2 * keys) + 4 * heads
    if family == "gpt_neox":
        attention += element * (queries + keys)  # the values are a view that keeps the fused projection
    feed_forward = element * _feed_forward_tensors(architecture) * architecture.intermediate
    experts = element * 2 * architecture.experts_per_token * hidden
    return norm * width + 2 * element * hidden + attention + feed_forward + experts


def logits_bytes(job: Job, architecture: Architecture, element: int) -> int:
    """One chunk of logits and, where the output embedding is trained, its gradient being summed over chunks.

    The chunk exists in the compute dtype, and in fp32 on a GPU (a CPU takes it in tiles that fit its cache).
    """
    if job.method == "reward":
        return 0  # a score is one number
    tokens = micro_batch_tokens(job)
    chunk = min(job.train.logits_chunk, tokens)
    on_gpu = job.cluster.gpus_per_worker > 0
    logits = chunk * architecture.vocabulary * (element + (4 if on_gpu else 0))
    trained = job.adapter.type == "none" or "lm_head" in job.adapter.modules_to_save
    summed = 4 if tokens > chunk else element
    gradient = architecture.vocabulary * architecture.hidden * (summed + element) if trained else 0
    return logits + gradient


def _score_bytes(job: Job, element: int) -> int:
    """Bytes per token and head of attention scores that are kept."""
    if job.model.attention == "eager":
        return job.data.max_length * (2 * element + 4)  # in the compute dtype, in fp32, and cast back
    if job.model.attention in ("auto", "documents") and job.cluster.gpus_per_worker == 0:
        return min(job.data.max_length, KEPT_PROBABILITIES) * element
    return 0


def _norm_bytes(family: str, element: int, trained: bool) -> int:
    """Bytes that a norm keeps per element of its width, besides its output."""
    if family in FUSED or family == "gpt_neox":
        return element
    return 4 + (0 if not trained else 4 if family in GEMMA else element)


def _feed_forward_tensors(architecture: Architecture) -> int:
    """How many tensors of the feed-forward's width are kept; experts are not fused."""
    if architecture.family == "gpt_neox":
        return 2
    return 3 if architecture.family in FUSED and not architecture.experts_per_token else 4
