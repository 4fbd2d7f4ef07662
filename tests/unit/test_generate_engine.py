"""The transformers engine gives what transformers gives, for every family, batch and number of ranks."""

from __future__ import annotations

import pytest
import torch

from rayft.errors import DataError
from rayft.generate.attention import NAME, packed_generation
from rayft.generate.decode import rows_of_seed, sampling
from rayft.generate.hf import TransformersEngine, in_step
from tests.ranks import run_ranks
from tests.tiny import FAMILIES, tiny_model, tiny_tokenizer

torch.set_num_threads(1)

PROMPTS = [list(range(40, 40 + n)) for n in (3, 17, 9, 1, 12)]


def engine(
    family: str = "llama", *, stop: set[int] | None = None, batch_size: int = 2, **model: object
) -> TransformersEngine:
    made = TransformersEngine(tiny_model(family, **model), tiny_tokenizer(), batch_size=batch_size)  # type: ignore[arg-type]
    made.stop_ids = frozenset(made.stop_ids if stop is None else stop)
    return made


@pytest.mark.parametrize("family", [*FAMILIES, "capped"])
def test_greedy_equals_transformers(family: str) -> None:
    capped = {"attn_logit_softcapping": 0.1} if family == "capped" else {}
    ours = engine("gemma2" if capped else family, stop=set(), **capped)
    answers = ours.generate(PROMPTS, max_new_tokens=14)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        whole = ours.model.generate(
            torch.tensor([prompt]), max_new_tokens=14, min_new_tokens=14, do_sample=False, pad_token_id=256
        )
        assert answer == whole[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_cannot_pack_generate_and_score_all_the_same(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = [(ids, [False] + [True] * (len(ids) - 1)) for ids in PROMPTS]
    packed = engine(family, stop=set())
    answers, scores = packed.generate(PROMPTS, max_new_tokens=8), packed.score(sequences)
    monkeypatch.setattr("rayft.generate.attention.can_pack", lambda config: (False, "for the test"))
    padded = engine(family, stop=set())
    assert padded.generate(PROMPTS, max_new_tokens=8) == answers
    for one, other in zip(padded.score(sequences), scores, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_attention_is_swapped_only_while_it_works() -> None:
    model = tiny_model()
    with packed_generation(model) as packed:
        assert packed
        assert model.config._attn_implementation == NAME
    assert model.config._attn_implementation == "eager"


def test_an_answer_ends_with_the_stop_token_and_leaves_the_others_alone() -> None:
    free = engine(stop=set(), batch_size=5).generate(PROMPTS, max_new_tokens=20)
    stop = free[1][4]
    stopped = engine(stop={stop}, batch_size=5).generate(PROMPTS, max_new_tokens=20)
    for whole, cut in zip(free, stopped, strict=True):
        end = whole.index(stop) + 1 if stop in whole else 20
        assert cut == whole[:end]
    assert 0 < len(stopped[1]) <= 5


def test_sampling_depends_on_seed_and_row_alone() -> None:
    settings = {"max_new_tokens": 12, "temperature": 0.8, "top_p": 0.9}
    one = engine(batch_size=1).generate(PROMPTS, seed=3, **settings)  # type: ignore[arg-type]
    assert engine(batch_size=5).generate(PROMPTS, seed=3, **settings) == one  # type: ignore[arg-type]
    assert engine(batch_size=5).generate(PROMPTS, seed=4, **settings) != one  # type: ignore[arg-type]


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_drawn_log_probabilities_are_the_trainers(top_p: float) -> None:
    """At the temperature, before the nucleus was cut out; and what ended by itself is told from what was cut off."""
    made = engine(stop={70, 71, 72, 73, 74}, batch_size=3)
    seeds = [11, 12, 13, 14, 15]
    drawn = made.draw(PROMPTS, seeds, max_new_tokens=30, temperature=0.7, top_p=top_p)
    for prompt, answer in zip(PROMPTS, drawn, strict=True):
        with torch.no_grad():
            logits = made.model(torch.tensor([prompt + answer.ids])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / 0.7).log_softmax(-1).gather(-1, torch.tensor(answer.ids)[:, None])[:, 0]
        assert answer.logprobs == pytest.approx(expected.tolist(), abs=1e-5)
        assert answer.ended == (answer.ids[-1] in made.stop_ids)
        assert answer.ended or len(answer.ids) == 30
    assert {answer.ended for answer in drawn} == {True, False}


def test_what_is_drawn_again_is_the_same_to_the_last_bit() -> None:
    settings = {"max_new_tokens": 12, "temperature": 0.9}
    first = engine(batch_size=3).draw(PROMPTS, [5, 4, 3, 2, 1], **settings)  # type: ignore[arg-type]
    assert engine(batch_size=3).draw(PROMPTS, [5, 4, 3, 2, 1], **settings) == first  # type: ignore[arg-type]
    other = engine(batch_size=3).draw(PROMPTS, [5, 4, 3, 2, 9], **settings)  # type: ignore[arg-type]
    assert [answer.ids for answer in other[:4]] == [answer.ids for answer in first[:4]]
    assert other[4].ids != first[4].ids


def test_sampling_follows_the_distribution_and_its_nucleus() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, 4)
    counts = torch.bincount(sampling(1.0, 1.0, rows_of_seed(0))(logits, range(4000)), minlength=4) / 4000
    assert counts.tolist() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    counts = torch.bincount(sampling(1.0, 0.7, rows_of_seed(0))(logits, range(4000)), minlength=4) / 4000
    assert counts.tolist() == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)


@pytest.mark.parametrize("family", FAMILIES)
def test_score_equals_a_whole_forward(family: str) -> None:
    ours = engine(family)
    sequences = [(ids, [False] + [i % 3 != 0 for i in range(1, len(ids))]) for ids in PROMPTS]
    for (ids, counted), (total, tokens) in zip(sequences, ours.score(sequences), strict=True):
        with torch.no_grad():
            logits = ours.model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        expected = sum(float(logits[t - 1, ids[t]]) for t in range(1, len(ids)) if counted[t])
        assert total == pytest.approx(expected, abs=1e-4)
        assert tokens == sum(counted)


def test_score_of_the_training_attention_is_the_same() -> None:
    from rayft.model.attention import register_documents_attention

    register_documents_attention()
    sequences = [(ids, [False] + [True] * (len(ids) - 1)) for ids in PROMPTS]
    ours = engine(attention="rayft_documents")
    for one, other in zip(ours.score(sequences), engine().score(sequences), strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-4)
    assert ours.generate(PROMPTS, max_new_tokens=4) == engine().generate(PROMPTS, max_new_tokens=4)
    assert ours.config._attn_implementation == "rayft_documents"


def test_the_model_is_left_as_it_was() -> None:
    ours = engine()
    ours.model.train()
    ours.generate(PROMPTS, max_new_tokens=2)
    ours.score([([1, 2], [False, True])])
    assert ours.model.training
    assert ours.config._attn_implementation == "eager"


def test_a_counted_first_token_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="first token"):
        engine().score([([1, 2], [True, True])])


def test_rows_that_do_not_fit_are_named() -> None:
    with pytest.raises(
        DataError, match=r"Row 2 has 500 tokens and 20 to be generated; the model's context is 512"
    ):
        engine().generate([[1], [1] * 500], max_new_tokens=20)
    with pytest.raises(DataError, match="Row 1 given to the model holds no token"):
        engine().generate([[]], max_new_tokens=1)


def test_stop_ids_come_from_model_tokenizer_and_template() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.generation_config.eos_token_id = [7, 8]
    assert TransformersEngine(model, tokenizer).stop_ids == {7, 8, 258}
    tokenizer.eos_token = "<|endoftext|>"
    assert TransformersEngine(model, tokenizer).stop_ids == {7, 8, 256, 258}


def test_in_step_fills_up_with_empty_batches() -> None:
    assert list(in_step([[1], [2]], None)) == [[1], [2]]
    more = iter([1, 1, 1, 0])
    assert list(in_step([[1]], lambda _: next(more))) == [[1], [], []]


#: Answers end early, each at its own time.
OFTEN = set(range(0, 264, 4))
LONG_FIRST = sorted(PROMPTS, key=len, reverse=True)
SAMPLED = {"max_new_tokens": 24, "temperature": 1.0, "seed": 5}


def _uneven() -> dict[str, list[object]]:
    """Greedy and scored: rank 0 has all the rows. Sampled: both have some, with answers of uneven lengths.

    Every forward meets the other rank's in an all-reduce.
    """
    import torch.distributed as dist

    rank, forwards = dist.get_rank(), torch.zeros(1)

    def largest(number: int) -> int:
        value = torch.tensor(number)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value)

    def together(*_: object) -> None:
        dist.all_reduce(torch.ones(1))
        forwards.add_(1)

    model = tiny_model()
    model.base_model.register_forward_pre_hook(together)
    ours = TransformersEngine(model, tiny_tokenizer(), batch_size=2, sync=largest)
    mine = PROMPTS if rank == 0 else []
    greedy = ours.generate(mine, max_new_tokens=6)
    scores = ours.score([(ids, [False] + [True] * (len(ids) - 1)) for ids in mine])
    ours.stop_ids = frozenset(OFTEN)
    sampled = ours.generate(LONG_FIRST[rank::2], **SAMPLED)  # type: ignore[arg-type]
    return {"greedy": greedy, "scores": scores, "sampled": sampled, "forwards": [int(forwards)]}  # type: ignore[dict-item]


def test_ranks_of_a_sharded_model_run_equally_many_forwards() -> None:
    first, second = run_ranks(_uneven, 2, timeout_s=120)
    assert first["forwards"] == second["forwards"]
    assert first["greedy"] == engine().generate(PROMPTS, max_new_tokens=6)
    assert [tokens for _, tokens in first["scores"]] == [len(ids) - 1 for ids in PROMPTS]
    assert second["greedy"] == second["scores"] == []
    for rank, found in enumerate((first, second)):
        assert found["sampled"] == engine(stop=OFTEN).generate(LONG_FIRST[rank::2], **SAMPLED)  # type: ignore[arg-type]
    lengths = [len(answer) for answer in first["sampled"] + second["sampled"]]
    assert len(set(lengths)) > 2


def test_texts_end_answers() -> None:
    """An answer ends with the token that completes one of them, others go on as if nothing were."""
    ours = engine(stop=set(), batch_size=4)
    draw = {"max_new_tokens": 24, "temperature": 1.0}
    free = ours.draw(PROMPTS, [1, 2, 3, 4, 5], **draw)  # type: ignore[arg-type]
    text = str(tiny_tokenizer().decode(free[0].ids[4:6], skip_special_tokens=True))
    stopped = ours.draw(PROMPTS, [1, 2, 3, 4, 5], **draw, stop=["nowhere", text])  # type: ignore[arg-type]
    assert stopped[0].ids == free[0].ids[: len(stopped[0].ids)]
    assert len(stopped[0].ids) <= 6
    assert stopped[0].ended
    for one, other in zip(stopped, free, strict=True):
        if text not in tiny_tokenizer().decode(other.ids):
            assert one.ids == other.ids
            assert not one.ended


def test_top_k_leaves_so_many_tokens() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(2000, 4)
    counts = (
        torch.bincount(sampling(1.0, 1.0, rows_of_seed(0), top_k=2)(logits, range(2000)), minlength=4) / 2000
    )
    expected = torch.tensor([2.0, 1.0]).softmax(0)
    assert counts[2:].sum() == 0
    assert torch.allclose(counts[:2], expected, atol=0.03)


def test_answers_to_one_prompt_are_those_of_the_prompt_alone() -> None:
    """They share the reading of it, and nothing else."""
    shared = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0], PROMPTS[1]]
    made = engine(batch_size=5)
    together = made.draw(shared, [1, 2, 3, 4, 5], max_new_tokens=12, temperature=1.0)
    for seed, (prompt, answer) in enumerate(zip(shared, together, strict=True), 1):
        [alone] = made.draw([prompt], [seed], max_new_tokens=12, temperature=1.0)
        assert answer.ids == alone.ids
        assert answer.logprobs == pytest.approx(alone.logprobs, abs=1e-5)
    read = []
    hook = made.model.get_input_embeddings().register_forward_hook(
        lambda _, ids, __: read.append(ids[0].numel())
    )  # type: ignore[operator]
    made.draw(shared, [1, 2, 3, 4, 5], max_new_tokens=1, temperature=1.0)
    hook.remove()
    assert read[0] == len(PROMPTS[0]) + len(PROMPTS[1])
