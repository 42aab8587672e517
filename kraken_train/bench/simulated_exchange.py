"""One rank's exchange without the other ranks: the data stay, the time passes.

The rank computes its real share of the work; a collective takes as long as the interconnect says that one of this
size takes among so many ranks. As with a real one, `start` leaves the rank free to compute meanwhile.

Shapes: n sub-layers here, B batch, T tokens, D hidden size, v rows of the vocabulary
here, P ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from kraken_train.interconnect import Interconnect
from kraken_train.placement import ModelRank

ALL_REDUCE, ALL_GATHER = "all_reduce", "all_gather"
Wait = Callable[[], None]


class Link(Protocol):
    """What lets the time of a transfer pass; one transfer after the other."""

    def begin(self, collective: str, seconds: float) -> Wait:
        """Begin a transfer beside the computation; calling what this returns waits for its end."""
        ...

    def transfer(self, collective: str, seconds: float) -> None:
        """A transfer that the computation waits for."""
        ...


class ThreadLink:
    """On the CPU: a thread that sleeps. The profiler sees it as `all_reduce_wire` and `all_gather_wire`."""

    def __init__(self) -> None:
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="link")
        self.free_at = 0.0  # in the time of perf_counter

    def begin(self, collective: str, seconds: float) -> Wait:
        # The end is fixed here, so that neither the thread's start nor a sleep that lasts too long adds up.
        self.free_at = max(time.perf_counter(), self.free_at) + seconds
        return self.worker.submit(occupy_until, self.free_at, f"{collective}_wire").result

    def transfer(self, collective: str, seconds: float) -> None:
        self.begin(collective, seconds)()


def occupy_until(moment: float, name: str) -> None:
    with record_function(name):
        time.sleep(max(0.0, moment - time.perf_counter()))


def make_link(device: torch.device, blocks: int) -> Link:
    """The link for a device; on a GPU each transfer occupies `blocks` multiprocessors."""
    if device.type == "cuda":
        from kraken_train.bench.spin_link import SpinLink  # noqa: PLC0415 (needs Triton, which CPU builds lack)

        return SpinLink(device, blocks)
    return ThreadLink()


@dataclass
class Traffic:
    """What has been asked of the interconnect."""

    all_reduces: int = 0
    all_gathers: int = 0
    num_bytes: int = 0  # of the tensors that are summed, and of those that are put together
    seconds: float = 0.0  # that these take on the interconnect, one after the other


@dataclass
class Pending:
    total: Tensor
    wait: Wait | None


class SimulatedExchange:
    """A `kraken_train.exchange.Exchange` for inference: it has no backward pass.

    Without a link nothing is issued and collectives cost nothing, but `traffic` still counts them. With
    `overlap=False`, `start` waits at once.
    """

    def __init__(
        self, interconnect: Interconnect, model_rank: ModelRank, link: Link | None, overlap: bool = True
    ) -> None:
        self.interconnect = interconnect
        self.model_rank = model_rank
        self.link = link
        self.overlap = overlap
        self.traffic = Traffic()

    def broadcast(self, shared: Tensor) -> Tensor:
        return shared

    def reduce(self, partial: Tensor) -> Tensor:
        self.transfer(ALL_REDUCE, self.all_reduce_seconds(partial))
        return partial

    def start(self, streams: Tensor) -> Pending:
        total = streams.sum(dim=0)  # of a single stream a copy, which the real all-reduce would overwrite
        seconds = self.all_reduce_seconds(total)
        if self.link is None or seconds == 0 or not self.overlap:
            self.transfer(ALL_REDUCE, seconds)
            return Pending(total, wait=None)
        return Pending(total, self.link.begin(ALL_REDUCE, seconds))

    def finish(self, handle: Pending) -> Tensor:
        if handle.wait is not None:
            handle.wait()
        return handle.total

    def maximum(self, values: Tensor) -> Tensor:
        self.transfer(ALL_REDUCE, self.all_reduce_seconds(values))
        return values.detach()

    def gather(self, part: Tensor) -> Tensor:
        """(..., v) -> (..., P v): this rank's part, again and again."""
        ranks = self.model_rank.size
        size = part.nbytes * ranks
        seconds = self.interconnect.all_gather_seconds(size, ranks)
        self.traffic.all_gathers += 1
        self.count(size, seconds)
        self.transfer(ALL_GATHER, seconds)
        return part.detach().repeat(*[1] * (part.dim() - 1), ranks)

    def all_reduce_seconds(self, tensor: Tensor) -> float:
        seconds = self.interconnect.all_reduce_seconds(tensor.nbytes, self.model_rank.size)
        self.traffic.all_reduces += 1
        self.count(tensor.nbytes, seconds)
        return seconds

    def count(self, size: int, seconds: float) -> None:
        self.traffic.num_bytes += size
        self.traffic.seconds += seconds

    def transfer(self, collective: str, seconds: float) -> None:
        if self.link is not None and seconds > 0:
            self.link.transfer(collective, seconds)
