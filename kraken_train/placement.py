"""Which sub-layers live here: pure arithmetic, no communication."""

from __future__ import annotations

from dataclasses import dataclass

from kraken_train.errors import ConfigError


@dataclass(frozen=True)
class Placement:
    """A contiguous range of global sub-layer ids, out of `num_sub_layers`."""

    num_sub_layers: int
    first: int
    count: int

    @property
    def sub_layer_ids(self) -> range:
        return range(self.first, self.first + self.count)


def place_all(num_sub_layers: int) -> Placement:
    """All sub-layers in one process."""
    return Placement(num_sub_layers, first=0, count=num_sub_layers)


def place_evenly(num_sub_layers: int, num_ranks: int, rank: int) -> Placement:
    """The sub-layers of `rank` out of the `num_ranks` that share one model copy. Raises ConfigError."""
    if num_ranks < 1 or num_sub_layers % num_ranks:
        divisors = [str(d) for d in range(1, num_sub_layers + 1) if num_sub_layers % d == 0]
        raise ConfigError(
            f"parallel.sub_layer_parallel_size={num_ranks} does not divide model.num_sub_layers={num_sub_layers}; "
            f"use {', '.join(divisors)}"
        )
    count = num_sub_layers // num_ranks
    return Placement(num_sub_layers, first=rank * count, count=count)
