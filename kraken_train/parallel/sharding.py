"""Which part of a model is on a rank: arithmetic only, no communication.

A model copy is sharded along units that have global numbers: sub-layers, attention heads, rows of the vocabulary. A
rank holds a contiguous range of them. Names, seeds and checkpoints use the global numbers, never a rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class UnitRange:
    """The `count` units from `first` on, out of `total`."""

    total: int
    first: int
    count: int

    @property
    def ids(self) -> range:
        return range(self.first, self.first + self.count)

    @property
    def is_whole(self) -> bool:
        return self.count == self.total

    def in_units_of(self, size: int) -> UnitRange:
        """The same range where each unit consists of `size` smaller ones, as a head of its columns."""
        return UnitRange(self.total * size, self.first * size, self.count * size)

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(index among the units here, or 0; whether it is here) of global ids, of any shape each."""
        local = ids - self.first
        here = (local >= 0) & (local < self.count)
        return local * here, here


@dataclass(frozen=True)
class ShardedDim:
    """How a parameter is sharded: its `axis` runs over `units`."""

    units: UnitRange
    axis: int

    def whole_shape(self, shape: torch.Size) -> torch.Size:
        """The shape of the whole parameter, given that of the part here."""
        return torch.Size([*shape[: self.axis], self.units.total, *shape[self.axis + 1 :]])

    def take(self, whole: Tensor) -> Tensor:
        """The part of `whole` that is here, a view."""
        return whole.narrow(self.axis, self.units.first, self.units.count)

    def read(self, stored: Any) -> Tensor:
        """The part of a stored weight that is here; `stored` is a slice of an open safetensors file."""
        here = slice(self.units.first, self.units.first + self.units.count)
        return cast(Tensor, stored[(slice(None),) * self.axis + (here,)])


@dataclass(frozen=True)
class KVGroupsDim(ShardedDim):
    """The first axis of a weight (G, (H / G + 2) K, D): key-value heads, each behind the H / G heads that it serves.

    For inference there may be more units than key-value heads. Each key-value head then has copies, which are adjacent
    units and serve an equal part of its heads each.
    """

    head_size: int

    def read(self, stored: Any) -> Tensor:
        groups, rows, _ = stored.get_shape()
        copies = self.units.total // groups
        if copies == 1:
            return super().read(stored)
        all_queries = rows - 2 * self.head_size
        queries = all_queries // copies
        parts = []
        for unit in self.units.ids:
            group, number = divmod(unit, copies)
            own = stored[group, number * queries : (number + 1) * queries]
            parts.append(torch.cat([own, stored[group, all_queries:]]))
        return torch.stack(parts)


@dataclass(frozen=True)
class ModelRank:
    """This process is number `rank` of the `size` that share one copy of a model."""

    rank: int = 0
    size: int = 1

    def unit_range(self, total: int) -> UnitRange:
        """This rank's even share of `total` units. Raises ValueError where the ranks do not divide them."""
        if total % self.size:
            raise ValueError(f"{total} units cannot be shared evenly by {self.size} ranks")
        count = total // self.size
        return UnitRange(total, first=self.rank * count, count=count)

    def row_range(self, total: int) -> UnitRange:
        """This rank's share of `total` rows, of which the ranks may have different numbers.

        It is that of `torch.chunk`, as DTensor expects: total / P rows each, rounded up, and on the last ranks what is
        left. Raises ValueError where some rank would have none.
        """
        most = -(-total // self.size)
        if (self.size - 1) * most >= total:
            raise ValueError(f"{total} rows are too few to be shared by {self.size} ranks")
        first = self.rank * most
        return UnitRange(total, first, count=min(most, total - first))


def share_units(total: int, speeds: Sequence[float]) -> list[UnitRange]:
    """Contiguous shares of `total` units for devices of these relative speeds, at least one unit each.

    The shares minimize the largest count / speed, so that the last device finishes as early as possible. Each further
    unit goes to the device that would finish it first, or the first of those: 6 units on 4 equal ones are 2, 2, 1, 1.
    Raises ValueError where there are more devices than units, or a speed is not positive and finite.
    """
    if not 1 <= len(speeds) <= total or not all(0 < speed < math.inf for speed in speeds):
        raise ValueError(f"{total} units cannot be shared by devices of the speeds {list(speeds)}")
    counts = [1] * len(speeds)
    for _ in range(total - len(speeds)):
        fastest = min(range(len(speeds)), key=lambda device: (counts[device] + 1) / speeds[device])
        counts[fastest] += 1
    firsts = accumulate(counts, initial=0)
    return [UnitRange(total, first, count) for first, count in zip(firsts, counts, strict=False)]


def all_units(total: int) -> UnitRange:
    """All units in one process."""
    return UnitRange(total, first=0, count=total)


def sharded_dims(model: nn.Module) -> dict[str, ShardedDim | None]:
    """How each parameter of a model is sharded; None: all of it is on every rank (a shared parameter).

    Modules that hold a part of a weight say so with an attribute `sharded_dim`.
    """
    return {
        f"{prefix}.{name}" if prefix else name: getattr(module, "sharded_dim", None)
        for prefix, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }
