"""Every proven family: packed equals unpacked, and the loss head equals the model's own logits, with gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rayft.data.tensors import IGNORE
from rayft.model.attention import NAME, register_documents_attention
from rayft.model.families import PROVEN, can_pack
from rayft.model.head import forward_logprobs, forward_nll, install_nll_head
from tests import tiny

#: Longer than the tiny models' sliding window of 8, one of a single token, two of one length.
LENGTHS = [13, 30, 1, 13, 21]

_ALIKE = {"qwen2": "qwen3", "gemma": "gemma2"}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model_of(family: str, attention: str, **overrides: object) -> PreTrainedModel:
    """A tiny model; families that `tests.tiny` lacks get the values of a like one."""
    register_documents_attention()
    if family not in _ALIKE:
        return tiny.tiny_model(family, attention=attention, **overrides)
    known = tiny.tiny_config(_ALIKE[family])
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += (
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "tie_word_embeddings",
        "initializer_range",
    )
    config = AutoConfig.for_model(family, **{name: getattr(known, name) for name in names}, pad_token_id=0)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()


def documents(lengths: list[int] = LENGTHS, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Token ids and shifted targets of documents, about half of the tokens trained."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(0, tiny.VOCAB_SIZE, (length,), generator=generator)
        trained = torch.rand(length, generator=generator) < 0.5
        targets = torch.full((length,), IGNORE)
        targets[:-1] = torch.where(trained[1:], ids[1:], IGNORE)
        made.append({"ids": ids, "targets": targets})
    return made


def pack(documents: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    lengths = torch.tensor([0, *(len(d["ids"]) for d in documents)])
    return {
        "input_ids": torch.cat([d["ids"] for d in documents])[None],
        "targets": torch.cat([d["targets"] for d in documents])[None],
        "position_ids": torch.cat([torch.arange(len(d["ids"])) for d in documents])[None],
        "cu_seqlens": lengths.cumsum(0).to(torch.int32),
    }


def pad(documents: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    longest = max(len(d["ids"]) for d in documents)
    shape = (len(documents), longest)
    ids, targets, mask = (
        torch.zeros(shape, dtype=torch.long),
        torch.full(shape, IGNORE),
        torch.zeros(shape).long(),
    )
    for row, d in enumerate(documents):
        n = len(d["ids"])
        ids[row, :n], targets[row, :n], mask[row, :n] = d["ids"], d["targets"], 1
    positions = torch.arange(longest).expand(shape)
    return {"input_ids": ids, "targets": targets, "position_ids": positions, "attention_mask": mask}


def alone(model: PreTrainedModel, docs: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [T, V] and summed loss of every document run by itself through the model's own forward."""
    logits = torch.cat([model(input_ids=d["ids"][None], use_cache=False).logits[0] for d in docs])
    targets = torch.cat([d["targets"] for d in docs])
    return logits, torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


def gradients(model: PreTrainedModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float
) -> None:
    assert ours.keys() == theirs.keys()
    norm = torch.stack([g.norm() for g in theirs.values()]).norm()
    for name, grad in theirs.items():
        assert (ours[name] - grad).norm() <= tolerance * norm, name


@pytest.mark.parametrize("family", sorted(PROVEN))
def test_packed_equals_each_document_alone(family: str) -> None:
    """Against eager attention of transformers: logits to 1e-5 of the largest, loss and gradients alike."""
    reference, model = model_of(family, "eager"), model_of(family, NAME)
    docs = documents()
    logits, loss = alone(reference, docs)
    install_nll_head(model, chunk=7)
    batch = pack(docs)
    from rayft.model.attention import Documents

    packed = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        documents=Documents(batch["cu_seqlens"]),
        use_cache=False,
    ).logits[0]
    assert (packed - logits).abs().max() <= 1e-5 * logits.abs().max()
    ours = forward_nll(model, batch)
    assert torch.allclose(ours, loss, rtol=1e-6)
    assert_same_gradients(gradients(model, ours), gradients(reference, loss), 1e-5)


@pytest.mark.parametrize("family", sorted(PROVEN))
def test_padded_rows_equal_each_document_alone(family: str) -> None:
    reference, model = model_of(family, "eager"), model_of(family, NAME)
    docs = documents()
    _, loss = alone(reference, docs)
    install_nll_head(model, chunk=1024)
    ours = forward_nll(model, pad(docs))
    assert torch.allclose(ours, loss, rtol=1e-6)
    assert_same_gradients(gradients(model, ours), gradients(reference, loss), 1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packing_is_right_with_transformers_own_attention(attention: str) -> None:
    model, docs = model_of("llama", attention), documents()
    _, loss = alone(model, docs)
    install_nll_head(model, chunk=1024)
    assert torch.allclose(forward_nll(model, pack(docs)), loss, rtol=1e-6)


def test_a_document_does_not_depend_on_its_neighbours() -> None:
    """Change one document of a pack: log-probabilities of the others stay bit for bit."""
    model = model_of("gemma3_text", NAME)
    install_nll_head(model, chunk=1024)
    docs = documents()
    trained = [int((d["targets"] != IGNORE).sum()) for d in docs]
    before = forward_logprobs(model, pack(docs)).split(trained)
    docs[1] = documents([30], seed=9)[0]
    trained[1] = int((docs[1]["targets"] != IGNORE).sum())
    after = forward_logprobs(model, pack(docs)).split(trained)
    for i in (0, 2, 3, 4):
        assert torch.equal(before[i], after[i])


def test_unproven_family_is_refused_by_name() -> None:
    ok, reason = can_pack(AutoConfig.for_model("mamba"))
    assert not ok
    assert "'mamba'" in reason


def test_attention_dropout_is_refused_for_packing() -> None:
    ok, reason = can_pack(tiny.tiny_config("llama", attention_dropout=0.1))
    assert not ok
    assert "attention_dropout" in reason


def test_unproven_family_trains_unpacked_with_whole_logits() -> None:
    config = AutoConfig.for_model(
        "cohere",
        vocab_size=tiny.VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        logit_scale=0.25,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    docs = documents()
    _, loss = alone(model, docs)
    install_nll_head(model, chunk=8)
    assert torch.allclose(forward_nll(model, pad(docs)), loss, rtol=1e-5)
