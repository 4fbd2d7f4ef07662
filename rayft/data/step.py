"""The plan of one optimizer step: which documents, and which rank computes which of them when.

Which documents a step has follows from the position alone. How they are laid out into micro-batches also depends on
the number of ranks: packed documents do not see each other and a pack has no padding, so the layout changes nothing
but the rounding, and filling packs to the brim before dealing them out would leave ranks without work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rayft.data.corpus import Corpus
from rayft.data.order import Order
from rayft.data.packing import pack, spread
from rayft.errors import DataError
from rayft.spec import Data, Train

#: A micro-batch is a list of rows of the tensor, a row a list of document ids (one where documents are not packed).
MicroBatch = list[list[int]]

_READ_AHEAD = 64


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step over all ranks. Counts are global.

    `rows` were read and kept; `documents`, `tokens` and `trained_tokens` are what they hold; `computed_tokens` counts
    padding too. `row_documents` are the documents of each row, in the order of reading. `micro_batches[rank]` has the same length for all ranks; an empty micro-batch fills up.
    """

    position: int
    next_position: int
    rows: int
    documents: int
    tokens: int
    trained_tokens: int
    computed_tokens: int
    row_documents: list[range]
    micro_batches: list[list[MicroBatch]]

    @property
    def padding(self) -> float:
        """Share of the computed tokens that is padding."""
        return 1.0 - self.tokens / self.computed_tokens if self.computed_tokens else 0.0


def plan_step(
    corpus: Corpus,
    order: Order,
    position: int,
    *,
    data: Data,
    train: Train,
    packed: bool,
    world_size: int,
    end: int | None = None,
    together: bool = False,
) -> StepPlan:
    """Plan the step that begins at `position`; positions from `end` on are not read. Waits for the shards it needs.

    A step takes `global_batch_size` rows, or rows while `tokens_per_step` holds (always one). Dropped rows are passed
    over. With `together` all documents of a row are in one micro-batch. With no rows left before `end` the plan has
    `rows` 0. Raises DataError if a whole epoch holds no usable row.
    """
    rows, next_position = _take_rows(corpus, order, position, train, end)
    documents = [document for row in rows for document in row]
    # What is never divided: a row, or a document.
    units = [list(row) for row in rows] if together else [[document] for document in documents]
    sizes = [[corpus.length(document) for document in unit] for unit in units]
    weight, layout = (sum, packed_layout) if packed else (max, padded_layout)
    slots = (
        layout([weight(own) for own in sizes], data.max_length, train.micro_batch_size, world_size)
        if units
        else []
    )
    loads = [sum(sum(sizes[i]) for row in slot for i in row) for slot in slots]
    tokens = sum(map(sum, sizes))
    return StepPlan(
        position=position,
        next_position=next_position,
        rows=len(rows),
        documents=len(documents),
        tokens=tokens,
        trained_tokens=sum(map(corpus.trained_count, documents)),
        computed_tokens=tokens if packed else sum(padded_size(slot, sizes) for slot in slots),
        row_documents=rows,
        micro_batches=[
            [_tensor_rows(slot, units, packed) for slot in own] for own in deal(slots, loads, world_size)
        ],
    )


def _tensor_rows(slot: list[list[int]], units: list[list[int]], packed: bool) -> MicroBatch:
    """Documents of each row of the tensor: all of a pack in one, else one in each."""
    documents = [document for row in slot for i in row for document in units[i]]
    if packed:
        return [documents] if documents else []
    return [[document] for document in documents]


def deal(slots: Sequence[MicroBatch], loads: Sequence[int], world_size: int) -> list[list[MicroBatch]]:
    """Slots (a multiple of world_size) to ranks: heaviest first, there and back, so that ranks are equally loaded at
    every micro-batch and in total."""
    heaviest = sorted(range(len(slots)), key=lambda i: (-loads[i], i))
    ranks: list[list[MicroBatch]] = [[] for _ in range(world_size)]
    for turn, start in enumerate(range(0, len(slots), world_size)):
        group = heaviest[start : start + world_size]
        for rank, i in enumerate(group if turn % 2 == 0 else reversed(group)):
            ranks[rank].append(slots[i])
    return ranks


def _take_rows(
    corpus: Corpus, order: Order, position: int, train: Train, end: int | None
) -> tuple[list[range], int]:
    """Documents of each kept row of the step, and the position after the last row it read."""
    rows: list[range] = []
    tokens = 0
    start, give_up = position, position + order.epoch_rows()
    while end is None or position < end:
        count = _READ_AHEAD if end is None else min(_READ_AHEAD, end - position)
        for row in order.ids(position, count):
            documents = corpus.documents(int(row))
            if train.tokens_per_step:
                tokens += sum(map(corpus.length, documents))
                if rows and tokens > train.tokens_per_step:
                    return rows, position
            position += 1
            if len(documents):
                rows.append(documents)
            if len(rows) == train.global_batch_size:
                return rows, position
        if not rows and position >= give_up:
            raise DataError(
                f"No row from position {start} on fits into data.max_length: an epoch holds nothing to train on.",
                "Raise data.max_length, or set data.too_long to truncate.",
            )
    return rows, position


def packed_layout(
    lengths: list[int], max_length: int, micro_batch_size: int, world_size: int
) -> list[MicroBatch]:
    """Micro-batches of one flat row each: as few per rank as capacity allows, as equally full as possible.

    A pack grows for a unit (answers that stay together) that is longer than the capacity.
    """
    capacity = max(max_length * micro_batch_size, *lengths)
    bins = pack(lengths, capacity)
    count = -(-len(bins) // world_size) * world_size
    even = spread(lengths, count, capacity) or bins + [[] for _ in range(count - len(bins))]
    return [[slot] if slot else [] for slot in even]


def padded_layout(lengths: list[int], _: int, micro_batch_size: int, world_size: int) -> list[MicroBatch]:
    """Micro-batches of documents of like length, one per row of the tensor."""
    longest = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    count = -(-len(lengths) // (micro_batch_size * world_size)) * world_size
    size, larger = divmod(len(lengths), count)
    slots, start = [], 0
    for number in range(count):
        stop = start + size + (number < larger)
        slots.append([[i] for i in longest[start:stop]])
        start = stop
    return slots


def padded_size(slot: MicroBatch, sizes: list[list[int]]) -> int:
    """Tokens of an unpacked micro-batch with its padding. `sizes`: lengths of the documents of each unit."""
    lengths = [length for row in slot for i in row for length in sizes[i]]
    return len(lengths) * max(lengths, default=0)
