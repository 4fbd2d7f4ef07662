"""The order is a function of the position: exact epochs, exact shares, the same however it is asked for."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayft.data.order import MAX_BLOCK, Order, block_shares, permutation

SHARDS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=3)
SEEDS = st.integers(0, 2**40)


def unweighted(seed: int | None, shards: list[list[int]], window: int = 2) -> Order:
    return Order(seed, shards, weights=[None] * len(shards), window=window)


@given(SEEDS, SHARDS, st.integers(1, 4), st.integers(0, 3))
def test_an_epoch_reads_every_row_once(seed: int, shards: list[list[int]], window: int, epoch: int) -> None:
    order = unweighted(seed, shards, window)
    rows = order.epoch_rows()
    assert rows == sum(map(sum, shards))
    assert sorted(order.ids(epoch * rows, rows)) == list(range(rows))


@given(SEEDS, SHARDS, st.lists(st.integers(0, 60), max_size=6), st.booleans())
def test_the_order_does_not_depend_on_how_it_is_asked_for(
    seed: int, shards: list[list[int]], cuts: list[int], weighted: bool
) -> None:
    weights = [0.5 + s for s in range(len(shards))] if weighted else [None] * len(shards)
    order = Order(seed, shards, weights=weights, window=2)
    whole = order.ids(0, 60)
    edges = sorted({0, 60, *cuts})
    pieces = [order.ids(start, end - start) for start, end in reversed(list(pairwise(edges)))]
    assert np.array_equal(np.concatenate(pieces[::-1]), whole)
    assert np.array_equal(Order(seed, shards, weights=weights, window=2).ids(17, 20), whole[17:37])


@given(SEEDS, st.lists(st.integers(1, 20), min_size=2, max_size=4), st.integers(0, 5))
def test_every_block_has_the_exact_shares(seed: int, weights: list[int], block: int) -> None:
    order = Order(seed, [[50]] * len(weights), weights=[float(w) for w in weights])
    shares = block_shares([float(w) for w in weights])
    length = sum(shares)
    sources = order.ids(block * length, length) // 50
    assert [int((sources == s).sum()) for s in range(len(weights))] == shares
    assert [s * sum(weights) for s in shares] == [w * length for w in weights]


@given(
    SEEDS,
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
)
def test_each_source_of_a_mixture_has_exact_epochs_of_its_own(
    seed: int, one: list[int], two: list[int]
) -> None:
    order = Order(seed, [one, two], weights=[3, 1], window=2)
    ids = order.ids(0, 4 * max(sum(one), sum(two)) + 4)
    for size, own in ((sum(one), ids[ids < sum(one)]), (sum(two), ids[ids >= sum(one)] - sum(one))):
        for start in range(0, len(own) - size + 1, size):
            assert sorted(own[start : start + size]) == list(range(size))


def test_weights_of_a_ratio_that_needs_a_long_block_are_rounded() -> None:
    assert block_shares([0.9, 0.1]) == [9, 1]
    assert block_shares([1 / 3, 2 / 3]) == [1, 2]
    assert block_shares([0.33333, 0.66667]) == [333, 667]
    shares = block_shares([0.99999, 0.000007, 0.000003])
    assert shares == [998, 1, 1]
    assert sum(shares) == MAX_BLOCK


def test_an_epoch_counts_the_sources_that_are_not_replay() -> None:
    order = Order(0, [[90], [5000]], weights=[0.9, 0.1], replay=[False, True])
    assert order.epoch_rows() == 100
    ids = order.ids(0, 100)
    assert sorted(ids[ids < 90]) == list(range(90))
    assert Order(0, [[30], [60]], weights=[1, 1]).epoch_rows() == 90


def test_epochs_and_seeds_differ() -> None:
    order = unweighted(3, [[40, 40], [40]])
    first, second = order.ids(0, 120), order.ids(120, 120)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, unweighted(4, [[40, 40], [40]]).ids(0, 120))


def test_up_to_a_window_all_rows_are_shuffled_together() -> None:
    ids = Order(0, [[500, 500], [1000]], weights=[None, None]).ids(0, 2000)
    thirds = [Counter((part // 500).tolist()) for part in np.split(ids, 4)]
    assert all(80 < count[shard] < 170 for count in thirds for shard in range(4))


@given(SEEDS, SHARDS, st.integers(1, 3), st.booleans())
def test_shards_are_needed_in_the_order_that_is_announced(
    seed: int, shards: list[list[int]], window: int, weighted: bool
) -> None:
    weights = [1.0 + s for s in range(len(shards))] if weighted else [None] * len(shards)
    order = Order(seed, shards, weights=weights, window=window)
    sizes = [rows for source in shards for rows in source]
    firsts = [0, *accumulate(sizes)][:-1]
    announced = order.first_shards()
    assert sorted(announced) == firsts
    rank = {first: r for r, first in enumerate(announced)}
    streams = len(shards) if weighted else 1
    seen = -1
    for row in order.ids(0, sum(sizes)):
        first = max(f for f in firsts if f <= row)
        # A stream needs one window of shards at a time; streams differ by rounding to blocks.
        assert rank[first] <= seen + streams * (window + 1) * 3
        seen = max(seen, rank[first])


def test_without_a_seed_rows_come_once_and_in_order() -> None:
    assert unweighted(None, [[3, 4], [2]]).ids(0, 9).tolist() == list(range(9))
    assert Order(None, [[3], [2]], weights=[1, 5]).ids(0, 5).tolist() == list(range(5))


def test_the_order_is_fixed_for_ever() -> None:
    """Checkpoints name positions: the order must not change with a version of Python or numpy."""
    assert permutation(10, 0, "x", 1).tolist() == [8, 6, 0, 1, 9, 4, 5, 3, 2, 7]
    assert unweighted(7, [[4, 3], [5]]).ids(0, 12).tolist() == [8, 1, 0, 2, 10, 11, 7, 3, 9, 4, 5, 6]


def test_permutations_are_uniform() -> None:
    """Each of the six orders of three, and each value at each place of ten, about equally often."""
    orders = Counter(tuple(permutation(3, seed)) for seed in range(6000))
    assert len(orders) == 6
    assert all(850 < count < 1150 for count in orders.values())
    places = np.stack([permutation(10, 0, epoch) for epoch in range(5000)])
    counts = np.stack([np.bincount(places[:, i], minlength=10) for i in range(10)])
    assert abs(counts - 500).max() < 110  # five standard deviations


def test_weights_for_some_sources_only_are_a_bug() -> None:
    with pytest.raises(ValueError, match="all sources or for none"):
        Order(0, [[1], [1]], weights=[1, None])
