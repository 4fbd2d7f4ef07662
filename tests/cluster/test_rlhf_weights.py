"""Weights through the object store: every byte arrives, whatever the sizes of the tensors."""

from __future__ import annotations

import numpy as np
import pytest
import ray
import torch
from torch import nn

from rayft.rlhf.engines import Held
from rayft.rlhf.group import Group
from rayft.rlhf.pool import EnginePool
from rayft.rlhf.weights import PIECE, WHOLE, Shipment, Shipped, pieces_of, receive, ship, unpack, whole
from tests.runs import wait_until

#: Elements of bf16 (2 bytes): around the sizes at which a tensor is cut into pieces, and where it is not any more.
SIZES = (1, PIECE // 2 - 1, PIECE // 2, PIECE // 2 + 1, 3 * PIECE // 2, WHOLE // 2 - 1, WHOLE // 2)


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    module = nn.Module()
    for number, size in enumerate(SIZES):
        module.register_parameter(f"p{number}", nn.Parameter(torch.randn(size).bfloat16()))
    module.register_parameter("matrix", nn.Parameter(torch.randn(700, 900)))
    module.register_parameter("scalar", nn.Parameter(torch.randn(())))
    module.register_parameter("none", nn.Parameter(torch.randn(0, 3)))
    return module


def test_every_byte_arrives(local_ray: None) -> None:
    sent, held = model(0), model(1)
    named = [(name, p.data) for name, p in sent.named_parameters()]
    shipped = [ship([named[:4], named[4:]], rank, 2) for rank in (0, 1)]
    shipments = [shipment for own in shipped for shipment in own.shipments]
    assert [len(own.shipments) for own in shipped] == [1, 1]
    wanted = [shipment.checksum for shipment in shipments]
    assert receive(held, shipments)[0] == wanted
    for (name, tensor), there in zip(named, held.parameters(), strict=True):
        assert torch.equal(there, tensor), name
    unpacked, found, _ = unpack(shipments)
    assert found == wanted
    assert all(
        torch.equal(a, b) and a.dtype == b.dtype for (_, a), (_, b) in zip(unpacked, named, strict=True)
    )
    # The tensor of many pieces was not put together: it lies in the object store, where nobody may write.
    large = dict(unpacked)[f"p{SIZES.index(WHOLE // 2 - 1)}"]
    pieces = [piece for own in shipments for piece in ray.get(own.ref)[0]]
    assert any(piece.__array_interface__["data"][0] == large.data_ptr() for piece in pieces)


@ray.remote(num_cpus=0)
class Policy:
    """Sends its weights as a policy's rank does."""

    def ship(self) -> Shipped:
        return ship([[("p", torch.ones(PIECE))]], 0, 1)


@ray.remote(num_cpus=0)
class Engine:
    """Takes weights in as an engine does."""

    def take_weights(self, version: int, shipments: list[Shipment]) -> Held:
        module = nn.Module()
        module.register_parameter("p", nn.Parameter(torch.zeros(PIECE)))
        return Held(version, *receive(module, shipments))


def test_a_version_whose_answers_are_drawn_is_given_up(local_ray: None) -> None:
    policy = Group("policy", lambda _: Policy.remote(), 1)
    engines = Group("rollout", lambda _: Engine.remote(), 2)
    pool = EnginePool(engines, timeout_s=60)
    references = ray._private.worker.global_worker.core_worker.get_all_reference_counts
    try:
        before = set(references())
        assert pool.send(1, policy)["bytes"] == 4 * PIECE
        kept = set(references()) - before
        assert kept
        assert pool.version == 1
        pool.forget()
        assert pool.version is None, "the next sync would be left out"
        wait_until("the version is given up", lambda: not kept & set(references()), timeout_s=30)
    finally:
        policy.kill()
        engines.kill()


def test_pieces_that_lie_apart_are_put_together() -> None:
    values = np.arange(64, dtype=np.uint8)
    beside, apart, turned = [values[:32], values[32:]], [values[:16], values[32:]], [values[32:], values[:32]]
    assert whole(beside).__array_interface__["data"][0] == values.__array_interface__["data"][0]
    for pieces in (beside, apart, turned, [values]):
        assert np.array_equal(whole(pieces), np.concatenate(pieces))


@pytest.mark.parametrize("size", [2 * size for size in SIZES])
def test_buffers_are_small_or_large(size: int) -> None:
    """None of a size that Ray copies slowly."""
    pieces = pieces_of(torch.zeros(size, dtype=torch.uint8).numpy())
    assert sum(piece.nbytes for piece in pieces) == size
    assert all(piece.nbytes <= PIECE or piece.nbytes >= WHOLE for piece in pieces)
