"""The communicator of training without the other ranks: its collectives take time, forward and backward.

As `kraken_train.bench.simulated_communicator`, which has no backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor

from kraken_train.bench.link import ALL_GATHER, ALL_REDUCE, Link, Wait
from kraken_train.parallel.distributed import DistributedCommunicator
from kraken_train.parallel.sharding import ModelRank
from kraken_train.planning.interconnect import Interconnect, all_gather_bytes, all_reduce_bytes


@dataclass(frozen=True)
class SimulatedGroup:
    """Stands for the process group of a first rank."""

    ranks: int

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return self.ranks


@dataclass(frozen=True)
class SimulatedWork:
    """Stands for a collective under way."""

    wait: Wait


class SimulatedTrainingCommunicator(DistributedCommunicator):
    """What is summed stays as it is, and takes as long as on the interconnect; without a link it takes no time.

    With `overlap=False` nothing is computed meanwhile.
    """

    def __init__(
        self, interconnect: Interconnect, model_rank: ModelRank, link: Link | None, overlap: bool = True
    ) -> None:
        group = cast(dist.ProcessGroup, SimulatedGroup(model_rank.size))
        super().__init__(group, collective=self.simulated_all_reduce)
        self.interconnect = interconnect
        self.link = link
        self.overlap = overlap

    def simulated_all_reduce(self, buffer: Tensor, async_op: bool = False, **_: Any) -> SimulatedWork:
        ranks = self.group.size()
        seconds = self.interconnect.all_reduce_seconds(buffer.nbytes, ranks)
        moved = all_reduce_bytes(buffer.nbytes, ranks)
        if self.link is None:
            return SimulatedWork(lambda: None)
        if async_op and self.overlap:
            return SimulatedWork(self.link.begin(ALL_REDUCE, seconds, moved))
        self.link.transfer(ALL_REDUCE, seconds, moved)
        return SimulatedWork(lambda: None)

    def broadcast(self, size: int) -> None:
        """Takes the time of a broadcast of `size` bytes."""
        if self.link is not None:
            self.link.transfer(ALL_REDUCE, self.interconnect.seconds(size), size)

    def gather(self, part: Tensor) -> Tensor:
        """(..., v) -> (..., P v): this rank's part, P times."""
        ranks = self.group.size()
        size = part.nbytes * ranks
        if self.link is not None:
            self.link.transfer(
                ALL_GATHER, self.interconnect.all_gather_seconds(size, ranks), all_gather_bytes(size, ranks)
            )
        return part.detach().repeat(*[1] * (part.dim() - 1), ranks)
