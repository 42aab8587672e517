"""Sums without NCCL: which algorithm takes which, and on GPUs that each is the sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import launch_ranks
from parallel import symmetric_ranks
from torch import Tensor

from kraken_train.common.errors import ConfigError
from kraken_train.inference import ranks
from kraken_train.inference.ranks import connect
from kraken_train.parallel import symmetric
from kraken_train.parallel.communicator import LocalCommunicator
from kraken_train.parallel.distributed import DistributedCommunicator
from kraken_train.parallel.ranks import Runtime
from kraken_train.parallel.symmetric import (
    GPU,
    LIBRARY,
    MULTIMEM,
    ONE_SHOT,
    Links,
    SymmetricCommunicator,
    SymmetricExchange,
    algorithm_for,
    links_of,
)

KIB = 1024
SWITCHED, PLAIN = Links(4, multicast=True), Links(4, multicast=False)
EIGHT = [GPU("node", index, 9, True, tuple(other for other in range(8) if other != index)) for index in range(8)]


def values(size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(size // dtype.itemsize, dtype=dtype, device="meta")


@pytest.mark.parametrize(("size", "links", "expected"), [
    (4, SWITCHED, ONE_SHOT), (512 * KIB, SWITCHED, ONE_SHOT), (512 * KIB + 4, SWITCHED, MULTIMEM),
    (512 * KIB + 4, PLAIN, LIBRARY), (32 * KIB * KIB, SWITCHED, MULTIMEM), (32 * KIB * KIB + 4, SWITCHED, LIBRARY),
    (512 * KIB, Links(8, True), MULTIMEM), (256 * KIB, Links(5, False), ONE_SHOT), (2, SWITCHED, LIBRARY),
    (0, SWITCHED, LIBRARY),
])  # fmt: skip
def test_algorithm_by_size(size: int, links: Links, expected: str) -> None:
    assert algorithm_for(values(size), links) == expected


def test_algorithm_by_type() -> None:
    assert algorithm_for(values(64, torch.float32), SWITCHED) == ONE_SHOT
    for dtype in (torch.float64, torch.int64, torch.float16):
        assert algorithm_for(values(64, dtype), SWITCHED) == LIBRARY
    assert algorithm_for(values(64).view(4, 8).t(), SWITCHED) == LIBRARY


def test_links() -> None:
    assert links_of(list(EIGHT)) == Links(8, multicast=True)
    assert links_of(list(EIGHT[:2])) == Links(2, multicast=True)
    assert links_of([replace(gpu, capability=8, multicast=False) for gpu in EIGHT]) == Links(8, multicast=False)
    assert links_of([*EIGHT[:7], replace(EIGHT[7], multicast=False)]) == Links(8, multicast=False)
    for last in (
        None,
        replace(EIGHT[7], host="another"),
        replace(EIGHT[7], index=0),  # as where each rank sees its own GPU only
        replace(EIGHT[7], reads=(0, 1)),
        replace(EIGHT[7], capability=7),
    ):
        assert links_of([*EIGHT[:7], last]) is None
    assert links_of([EIGHT[0]]) is None


class Noted:
    def __init__(self, name: str, calls: list[tuple[Any, ...]]) -> None:
        self.name, self.calls = name, calls

    def sum(self, tensor: Tensor, algorithm: str) -> None:
        self.calls.append((self.name, algorithm))

    def begin(self, work: Callable[[], None]) -> str:
        self.calls.append((self.name,))
        work()
        return "work"


def test_what_the_exchange_calls() -> None:
    """A sum that is waited for, one under way, and what the library does: another operation, and large ones."""
    calls: list[tuple[Any, ...]] = []

    def library(tensor: Tensor, **options: Any) -> str:
        calls.append(("library", options["op"], options["async_op"]))
        return "theirs"

    exchange = SymmetricExchange(
        PLAIN, Noted("waited", calls), Noted("overlapped", calls), Noted("lane", calls), library
    )
    small, large = values(64), values(512 * KIB + 4)
    assert exchange(small) is None
    assert exchange(small, async_op=True) == "work"
    assert exchange(small, op=dist.ReduceOp.MAX) == exchange(large, async_op=True) == "theirs"
    assert calls == [
        ("waited", ONE_SHOT), ("lane",), ("overlapped", ONE_SHOT),
        ("library", dist.ReduceOp.MAX, False), ("library", dist.ReduceOp.SUM, True),
    ]  # fmt: skip


@pytest.mark.parametrize(("links", "collectives", "expected"), [
    (None, "auto", DistributedCommunicator), (PLAIN, "auto", DistributedCommunicator),
    (PLAIN, "symmetric", SymmetricCommunicator), (SWITCHED, "auto", SymmetricCommunicator),
    (SWITCHED, "library", DistributedCommunicator),
])  # fmt: skip
def test_choice_by_hardware(
    links: Links | None, collectives: str, expected: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = Runtime(0, 0, 4, 4, group="group")  # type: ignore[arg-type]
    monkeypatch.setattr(ranks, "find_links", lambda _: links)
    monkeypatch.setattr(ranks, "open_exchange", lambda group, device, found: SymmetricExchange(found, *[None] * 3))  # type: ignore[arg-type]
    assert type(connect(runtime, collectives)) is expected


def test_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "find_links", lambda _: None)
    with pytest.raises(ConfigError, match="collectives=symmetric needs 2 to 8 GPUs of one machine"):
        connect(Runtime(0, 0, 4, 4, group="group"), "symmetric")  # type: ignore[arg-type]
    assert isinstance(connect(Runtime(0, 0, 1, 1), "symmetric"), LocalCommunicator)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_sums_on_gpus() -> None:
    launch_ranks(min(torch.cuda.device_count(), 8), str(symmetric_ranks.__file__), device="cuda")


def test_limits_fit_the_buffers() -> None:
    assert max(symmetric.ONE_SHOT_BYTES.values()) < symmetric.MULTIMEM_BYTES
