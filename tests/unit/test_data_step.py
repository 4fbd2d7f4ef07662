"""The plan of a step: the same documents on any number of ranks, nothing lost, nothing over capacity."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayft.data.corpus import Corpus
from rayft.data.order import Order
from rayft.data.packing import efficiency, pack, spread
from rayft.data.step import StepPlan, deal, plan_step
from rayft.errors import DataError
from rayft.spec import Data, Source, Train
from tests.tiny_data import chat_rows, corpus_of, family_tokenizer, write_jsonl

LENGTHS = st.lists(st.integers(1, 100), max_size=60)


@given(LENGTHS, st.integers(100, 300))
def test_packs_hold_every_document_once_and_whole(lengths: list[int], capacity: int) -> None:
    bins = pack(lengths, capacity)
    assert sorted(chain(*bins)) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in own) <= capacity for own in bins)
    assert bins == pack(list(lengths), capacity)
    # Any two bins together are over capacity, or best fit would have joined them: at most twice the optimum.
    loads = sorted(sum(lengths[i] for i in own) for own in bins)
    assert len(loads) < 2 or loads[0] + loads[1] > capacity


@given(LENGTHS, st.integers(1, 9), st.integers(100, 400))
def test_spreading_is_even_or_says_that_it_does_not_fit(
    lengths: list[int], count: int, capacity: int
) -> None:
    bins = spread(lengths, count, capacity)
    if bins is None:
        assert sum(lengths) > (capacity - max(lengths)) * count
        return
    assert len(bins) == count
    assert sorted(chain(*bins)) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in own) for own in bins]
    assert max(loads) <= capacity
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_packing_figures() -> None:
    assert pack([5, 4, 3, 3, 2], 9) == [[0, 1], [2, 3, 4]]
    assert efficiency([5, 4, 3, 3, 2], [[0, 1], [2, 3, 4]], 9) == 17 / 18
    with pytest.raises(ValueError, match="length 10 over capacity 9"):
        pack([10], 9)


def test_dealing_goes_there_and_back() -> None:
    slots = [[[i]] for i in range(6)]
    assert deal(slots, [1, 6, 2, 5, 3, 4], 2) == [[[[1]], [[4]], [[2]]], [[[3]], [[5]], [[0]]]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Data, Corpus]:
    """60 rows, of which those with long answers are dropped."""
    folder = tmp_path_factory.mktemp("corpus")
    path = write_jsonl(folder / "a.jsonl", chat_rows(60))
    data = Data(train=[Source(path=str(path))], max_length=80, shard_rows=7)
    _, made = corpus_of(data, family_tokenizer("chatml"), folder)
    assert 5 < sum(not made.documents(row) for row in range(60)) < 30
    return data, made


def plan(data: Data, corpus: Corpus, position: int, **values: object) -> StepPlan:
    arguments = {"packed": True, "world_size": 2, "train": Train(global_batch_size=8)} | values
    return plan_step(corpus, Order.of(corpus.spec, 1, window=2), position, data=data, **arguments)  # type: ignore[arg-type]


def documents_of(step: StepPlan) -> list[int]:
    return sorted(d for own in step.micro_batches for micro in own for row in micro for d in row)


@given(
    st.integers(0, 200),
    st.sampled_from([Train(global_batch_size=8), Train(global_batch_size=1), Train(tokens_per_step=500)]),
    st.integers(1, 5),
    st.integers(1, 3),
    st.booleans(),
)
def test_a_step_is_the_same_on_any_number_of_ranks(
    corpus: tuple[Data, Corpus], position: int, train: Train, world_size: int, micro: int, packed: bool
) -> None:
    data, made = corpus
    train = train.model_copy(update={"micro_batch_size": micro})
    one = plan(data, made, position, world_size=1, packed=packed, train=train)
    step = plan(data, made, position, world_size=world_size, packed=packed, train=train)
    assert documents_of(step) == documents_of(one)
    for name in ("position", "next_position", "rows", "documents", "tokens", "trained_tokens"):
        assert getattr(step, name) == getattr(one, name)
    assert step == plan(data, made, position, world_size=world_size, packed=packed, train=train)
    assert len(step.micro_batches) == world_size
    assert len({len(own) for own in step.micro_batches}) == 1
    for micro_batch in chain(*step.micro_batches):
        if packed:
            assert len(micro_batch) <= 1
            assert sum(made.length(d) for row in micro_batch for d in row) <= micro * data.max_length
        else:
            assert len(micro_batch) <= micro
            assert all(len(row) == 1 for row in micro_batch)


def test_steps_read_every_kept_row_once_in_order(corpus: tuple[Data, Corpus]) -> None:
    data, made = corpus
    kept = [d for row in Order.of(made.spec, 1, window=2).ids(0, 60) for d in made.documents(int(row))]
    read: list[int] = []
    position, rows = 0, []
    while True:
        step = plan(data, made, position, end=60)
        if not step.rows:
            break
        read += documents_of(step)
        rows.append(step.rows)
        assert step.tokens == sum(map(made.length, documents_of(step)))
        assert step.trained_tokens == sum(map(made.trained_count, documents_of(step)))
        position = step.next_position
    assert sorted(read) == sorted(kept)
    assert sorted(read[:8]) == sorted(kept[:8])
    assert set(rows[:-1]) == {8}
    assert rows[-1] <= 8
    assert position == 60


def test_tokens_per_step_is_a_budget(corpus: tuple[Data, Corpus]) -> None:
    data, made = corpus
    train = Train(tokens_per_step=300)
    step = plan(data, made, 0, train=train)
    assert step.tokens <= 300
    following = plan(data, made, step.next_position, train=Train(global_batch_size=1))
    assert step.tokens + following.tokens > 300
    assert plan(data, made, 0, train=Train(tokens_per_step=1)).rows == 1


def test_ranks_are_balanced(corpus: tuple[Data, Corpus]) -> None:
    data, made = corpus
    for packed in (True, False):
        step = plan(data, made, 0, world_size=3, train=Train(global_batch_size=24), packed=packed)
        loads = [
            sum(made.length(d) for micro in own for row in micro for d in row) for own in step.micro_batches
        ]
        assert max(loads) - min(loads) < max(map(made.length, documents_of(step)))


def test_padding_is_counted(corpus: tuple[Data, Corpus]) -> None:
    data, made = corpus
    assert plan(data, made, 0).padding == 0
    step = plan(
        data, made, 0, packed=False, world_size=1, train=Train(global_batch_size=8, micro_batch_size=4)
    )
    sizes = [len(m) * max(made.length(d) for row in m for d in row) for m in step.micro_batches[0]]
    assert step.computed_tokens == sum(sizes)
    assert 0 < step.padding < 1


def test_more_ranks_than_rows_get_empty_micro_batches(corpus: tuple[Data, Corpus]) -> None:
    data, made = corpus
    step = plan(data, made, 0, world_size=4, train=Train(global_batch_size=2), packed=False)
    assert [len(own) for own in step.micro_batches] == [1, 1, 1, 1]
    assert sorted(len(own[0]) for own in step.micro_batches) == [0, 0, 1, 1]


def test_data_of_which_nothing_is_left_ends_the_run(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "y" * 60}] * 3)
    data = Data(train=[Source(path=str(path))], max_length=50)
    _, made = corpus_of(data, family_tokenizer("chatml"), tmp_path)
    with pytest.raises(DataError, match=r"No row from position 0 on fits into data\.max_length"):
        plan(data, made, 0)
    assert plan(data, made, 0, end=2).rows == 0
