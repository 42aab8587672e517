"""One configuration of the memory benchmark: a row of its table, figure and file."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class MemoryRow:
    """One device's memory, in bytes; of unequal shares, that of the largest."""

    architecture: str
    size: str
    attention: str
    kv_heads: int  # of a sub-layer, or of the standard layer
    heads_per_kv_head: int  # that share one; what grouped-query attention comes to
    degree: int
    context: int
    batch_size: int
    weights: int
    cache: int
    measured_weights: int | None = None  # None: not measured
    measured_cache: int | None = None

    @property
    def total(self) -> int:
        return self.weights + self.cache
