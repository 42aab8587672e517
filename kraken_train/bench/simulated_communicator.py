"""A communicator for one rank without the other ranks: collectives take time, and what they sum stays as it is.

The rank computes its real share of the work; a collective takes as long as the interconnect takes for its size and
number of ranks, and on a GPU reads and writes as much memory as a rank sends and receives. As with a real one, the rank
computes between `start_all_reduce` and `wait`.

Shapes: n sub-layers here, B batch, T tokens, D hidden size, v rows of the vocabulary here, P ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kraken_train.bench.link import ALL_GATHER, ALL_REDUCE, Link, ThreadLink, Wait
from kraken_train.parallel.sharding import ModelRank
from kraken_train.planning.interconnect import Interconnect, all_gather_bytes, all_reduce_bytes


def make_link(device: torch.device, blocks: int) -> Link:
    """The link for a device; on a GPU each transfer occupies `blocks` multiprocessors."""
    if device.type == "cuda":
        from kraken_train.bench.spin_link import SpinLink  # noqa: PLC0415 (needs Triton, which CPU builds lack)

        return SpinLink(device, blocks)
    return ThreadLink()


@dataclass
class Traffic:
    """The collectives that were requested of the interconnect."""

    all_reduces: int = 0
    all_gathers: int = 0
    num_bytes: int = 0  # of the tensors that are summed, and of those that are gathered
    seconds: float = 0.0  # of all of them, one after the other


@dataclass
class Pending:
    total: Tensor
    wait: Wait | None


class SimulatedCommunicator:
    """A `kraken_train.parallel.communicator.Communicator` for inference: it has no backward pass.

    Without a link collectives take no time, but `traffic` still counts them. With
    `overlap=False`, `start_all_reduce` waits at once.
    """

    def __init__(
        self, interconnect: Interconnect, model_rank: ModelRank, link: Link | None, overlap: bool = True
    ) -> None:
        self.interconnect = interconnect
        self.model_rank = model_rank
        self.link = link
        self.overlap = overlap
        self.traffic = Traffic()

    def copy_to_ranks(self, shared: Tensor) -> Tensor:
        return shared

    def all_reduce(self, partial: Tensor) -> Tensor:
        self.transfer(ALL_REDUCE, *self.cost_of_sum(partial))
        return partial

    def start_all_reduce(self, streams: Tensor) -> Pending:
        total = streams.sum(dim=0)  # of a single stream a copy, which the real all-reduce would overwrite
        seconds, moved = self.cost_of_sum(total)
        if self.link is None or seconds == 0 or not self.overlap:
            self.transfer(ALL_REDUCE, seconds, moved)
            return Pending(total, wait=None)
        return Pending(total, self.link.begin(ALL_REDUCE, seconds, moved))

    def wait(self, handle: Pending) -> Tensor:
        if handle.wait is not None:
            handle.wait()
        return handle.total

    def reduction_dtype(self, tensor: Tensor) -> torch.dtype:
        return tensor.dtype

    def maximum(self, values: Tensor) -> Tensor:
        self.transfer(ALL_REDUCE, *self.cost_of_sum(values))
        return values.detach()

    def gather(self, part: Tensor) -> Tensor:
        """(..., v) -> (..., P v): this rank's part, P times."""
        ranks = self.model_rank.size
        size = part.nbytes * ranks
        seconds = self.interconnect.all_gather_seconds(size, ranks)
        self.traffic.all_gathers += 1
        self.count(size, seconds)
        self.transfer(ALL_GATHER, seconds, all_gather_bytes(size, ranks))
        return part.detach().repeat(*[1] * (part.dim() - 1), ranks)

    def cost_of_sum(self, tensor: Tensor) -> tuple[float, float]:
        """Seconds, and bytes of memory that are read and written."""
        ranks = self.model_rank.size
        seconds = self.interconnect.all_reduce_seconds(tensor.nbytes, ranks)
        self.traffic.all_reduces += 1
        self.count(tensor.nbytes, seconds)
        return seconds, all_reduce_bytes(tensor.nbytes, ranks)

    def count(self, size: int, seconds: float) -> None:
        self.traffic.num_bytes += size
        self.traffic.seconds += seconds

    def transfer(self, collective: str, seconds: float, moved: float) -> None:
        if self.link is not None and seconds > 0:
            self.link.transfer(collective, seconds, moved)
