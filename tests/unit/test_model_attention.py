"""Attention per document against a masked softmax written out: lengths, windows, caps, grouped heads, gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayft.model.attention import NAME, Documents, documents_mask, register_documents_attention
from rayft.model.attention_products import documents_products, group_documents
from tests.tiny import tiny_model


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    prefixes: list[int | None] | None = None,
) -> torch.Tensor:
    """The definition: one T x T mask over the whole pack, keys repeated for every query head."""
    fold = query.shape[1] // key.shape[1]
    before = prefixes or [None] * len(lengths)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    prefix = torch.tensor([-1 if n is None else n for n in before])[document]
    at = torch.cat(
        [torch.arange(n) + (0 if b is None else lengths[b]) for n, b in zip(lengths, before, strict=True)]
    )
    seen = (document[:, None] == document[None]) & (at[:, None] >= at[None])
    seen |= prefix[:, None] == document[None]
    if window is not None:
        seen &= at[:, None] - at[None] < window
    scores = torch.einsum("shd,thd->hst", query, key.repeat_interleave(fold, 1)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hst,thd->shd", weights, value.repeat_interleave(fold, 1))


def tensors(
    tokens: int, heads: int, key_heads: int, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, heads, 8), (tokens, key_heads, 8), (tokens, key_heads, 8)]
    return [torch.randn(s, generator=generator, dtype=dtype, requires_grad=True) for s in shapes]


def check(
    lengths: list[int],
    heads: int,
    key_heads: int,
    window: int | None,
    softcap: float | None,
    prefixes: list[int | None] | None = None,
) -> None:
    inputs = tensors(sum(lengths), heads, key_heads)
    ours = documents_products(*inputs, lengths, 0.3, window, softcap, prefixes or ())
    theirs = reference(*inputs, lengths, 0.3, window, softcap, prefixes)
    assert torch.allclose(ours, theirs, atol=1e-12)
    weights = torch.randn(theirs.shape, dtype=theirs.dtype)
    for ours_grad, theirs_grad in zip(
        torch.autograd.grad(ours, inputs, weights), torch.autograd.grad(theirs, inputs, weights), strict=True
    ):
        # Sums over blocks of queries are kept in fp32.
        assert torch.allclose(ours_grad, theirs_grad, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=6),
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    window=st.sampled_from([None, 1, 8, 64]),
    softcap=st.sampled_from([None, 2.0]),
)
def test_equals_the_definition(
    lengths: list[int], heads: tuple[int, int], window: int | None, softcap: float | None
) -> None:
    check(lengths, *heads, window, softcap)


@settings(max_examples=30, deadline=None)
@given(
    prompts=st.lists(
        st.tuples(st.integers(1, 40), st.lists(st.integers(1, 50), min_size=1, max_size=4)),
        min_size=1,
        max_size=3,
    ),
    heads=st.sampled_from([(4, 2), (3, 1)]),
    window=st.sampled_from([None, 1, 8, 64]),
    softcap=st.sampled_from([None, 2.0]),
)
def test_answers_see_all_of_their_prompt(
    prompts: list[tuple[int, list[int]]],
    heads: tuple[int, int],
    window: int | None,
    softcap: float | None,
) -> None:
    """Documents that go on from another one, beside one that does not."""
    lengths, prefixes = [7], [None]
    for prompt, answers in prompts:
        head = len(lengths)
        lengths += [prompt, *answers]
        prefixes += [None, *[head] * len(answers)]
    check(lengths, *heads, window, softcap, prefixes)


@pytest.mark.parametrize("window", [None, 100, 300])
def test_long_answers_to_a_long_prompt_go_in_blocks(window: int | None) -> None:
    check([300, 520, 3, 257], 2, 1, window, None, [None, 0, 0, 0])


@pytest.mark.parametrize("window", [None, 100, 300])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_long_documents_go_in_blocks(window: int | None, softcap: float | None) -> None:
    check([600, 3, 257, 256], 2, 1, window, softcap)


def test_bf16_is_as_good_as_transformers_eager_attention() -> None:
    lengths = [180, 200, 350]
    exact = tensors(sum(lengths), 4, 2, torch.float64)
    expected = reference(*exact, lengths, 0.3)
    rounded = [x.detach().bfloat16() for x in exact]
    ours = documents_products(*rounded, lengths, 0.3).double()
    eager = reference(*rounded, lengths, 0.3).double()
    assert (ours - expected).norm() <= 1.1 * (eager - expected).norm()


def test_documents_of_like_length_share_a_product() -> None:
    groups = group_documents([200, 198, 30, 1, 199, 400])
    assert [sorted(g.lengths) for g in groups] == [[400], [198, 199, 200], [1, 30]]
    assert sum(len(g.starts) for g in groups) == 6
    spans = sorted((span.start, span.stop) for g in groups for _, span, _ in g.spans())
    assert spans == [(0, 200), (200, 398), (398, 428), (428, 429), (429, 628), (628, 1028)]


def test_no_mask_is_built() -> None:
    assert documents_mask(1, 8, 8) is None
    right = torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert documents_mask(2, 3, 3, attention_mask=right) is None


def test_left_padding_and_caches_are_refused() -> None:
    with pytest.raises(ValueError, match="padded on the right"):
        documents_mask(2, 3, 3, attention_mask=torch.tensor([[1, 1, 1], [0, 1, 1]]))
    with pytest.raises(ValueError, match="no cache"):
        documents_mask(1, 1, 5, q_offset=4)


def test_a_pack_without_documents_is_refused() -> None:
    """Positions that restart without `documents` would mean attention across documents."""
    register_documents_attention()
    model = tiny_model("llama", attention=NAME)
    ids = torch.zeros(1, 6, dtype=torch.long)
    with pytest.raises(ValueError, match="documents"):
        model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=False)
    documents = Documents(torch.tensor([0, 3, 6]))
    model(
        input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), documents=documents, use_cache=False
    )


def test_gradient_checkpointing_recomputes_the_same() -> None:
    register_documents_attention()
    model = tiny_model("llama", attention=NAME).train()
    ids = torch.arange(40)[None]
    arguments = {"input_ids": ids, "use_cache": False, "documents": Documents(torch.tensor([0, 15, 40]))}
    arguments["position_ids"] = torch.cat([torch.arange(15), torch.arange(25)])[None]

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(**arguments).logits.square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for a, b in zip(plain, gradients(), strict=True):
        assert torch.equal(a, b)
