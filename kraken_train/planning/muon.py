"""What Muon adds to an optimizer step: working memory, from the real optimizer on fake tensors, traffic and work."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kraken_train.parallel.matrices import MatrixPart
from kraken_train.parallel.matrix_exchange import MatrixExchange
from kraken_train.parallel.mesh import Place
from kraken_train.planning.live_bytes import LiveBytes
from kraken_train.training.muon import MATRICES, Muon

NS_STEPS = 5  # as in conf/optim/muon.yaml

Parts = tuple[MatrixPart, ...]


@lru_cache(maxsize=1024)
def exchange_of(parts: Parts, elements: int, copies: int, ranks: int) -> MatrixExchange:
    """That of the first device for a group of weights of which each copy updates `elements`."""
    return MatrixExchange(parts, elements, Place(0, copies, 0, ranks), all_to_all=no_collective)


def no_collective(*_: Any, **__: Any) -> None:
    """In place of an all-to-all, which takes no memory of PyTorch's allocator."""


@lru_cache(maxsize=1024)
def working_bytes(parts: Parts, elements: int, copies: int, ranks: int) -> int:
    """To update such a group, beside its weights, gradients and momentum."""
    with FakeTensorMode():
        weights = nn.Parameter(torch.empty(elements))
        exchange = partial(exchange_of, parts, copies=copies, ranks=ranks)
        optimizer = Muon([{"params": [weights], MATRICES: exchange}], momentum=0.9, ns_steps=NS_STEPS)
        weights.grad = torch.empty(elements)
        optimizer.step()  # makes the state
        kept = (weights, weights.grad, *optimizer.state[weights].values())
        live = LiveBytes(kept)
        with live:
            optimizer.step()
    return live.peak


@lru_cache(maxsize=1024)
def moved_bytes(parts: Parts, elements: int, copies: int, ranks: int) -> tuple[int, int]:
    """What the first device gets from others as momentum, and as results; (0, 0) where nothing moves anywhere."""
    exchange = exchange_of(parts, elements, copies, ranks)
    width = torch.bfloat16.itemsize
    if not exchange.moves:
        return 0, 0
    return width * sum(exchange.received[1:]), width * sum(exchange.sent[1:])


def owned_shapes(parts: Parts, elements: int, copies: int, ranks: int) -> list[tuple[int, int]]:
    """The matrices that the first device works on."""
    exchange = exchange_of(parts, elements, copies, ranks)
    return [exchange.parts[number].whole_shape(ranks) for number in exchange.owned]
