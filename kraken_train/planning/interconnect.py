"""The time of a collective on a named interconnect: latency plus bytes over bus bandwidth.

Bus bandwidth is defined as in nccl-tests (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md): by the
bytes that each link carries, so it is about the same for every number of ranks. An all-reduce of S bytes over N ranks
moves 2 (N - 1) / N of S over each link, an all-gather of S bytes in all (N - 1) / N.

A one-shot all-reduce is a single kernel in which each rank reads the values of all others: (N - 1) S over each link,
but no steps that wait for one another. Where an interconnect has figures of it, the faster of both counts for each
size, as a library that chooses by size has it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import yaml

from kraken_train.common.cli import CONF_DIR
from kraken_train.common.errors import ConfigError
from kraken_train.common.validation import require_at_least, require_positive


@dataclass(frozen=True)
class Interconnect:
    """One file of `conf/interconnect`."""

    name: str  # file of conf/interconnect
    latency_us: float  # microseconds of a collective of few bytes
    bus_bandwidth: float | None  # bus bandwidth as in nccl-tests, in GB/s (1e9 bytes per second); null: unlimited
    source: str  # where the figures are from
    one_shot_latency_us: float | None = None  # microseconds of a one-shot all-reduce of few bytes; null: there is none
    one_shot_bandwidth: float | None = None  # at which a rank reads the others' values, in GB/s; null: unlimited

    def validate(self) -> None:
        """Raises ConfigError."""
        require_at_least("interconnect.latency_us", self.latency_us, 0)
        if self.latency_us > 1e6:
            raise ConfigError(
                f"interconnect.latency_us={self.latency_us:g} is more than a second; it is in microseconds"
            )
        for name in ("bus_bandwidth", "one_shot_bandwidth"):
            if getattr(self, name) is not None:
                require_positive(f"interconnect.{name}", getattr(self, name))
        if self.one_shot_latency_us is not None:
            require_at_least("interconnect.one_shot_latency_us", self.one_shot_latency_us, 0)

    @property
    def is_free(self) -> bool:
        return self.latency_us == 0 and self.bus_bandwidth is None

    def all_reduce_seconds(self, size: int, ranks: int) -> float:
        """Seconds to sum `size` bytes over `ranks`."""
        return self.faster(all_reduce_bytes(size, ranks), size * (ranks - 1))

    def all_gather_seconds(self, size: int, ranks: int) -> float:
        """Seconds until every one of `ranks` has all `size` bytes, of which each had its share."""
        moved = all_gather_bytes(size, ranks)
        return self.faster(moved, moved)

    def faster(self, in_steps: float, at_once: float) -> float:
        """Seconds of a collective that moves so many bytes over each link in steps, or by one-shot so many at once."""
        if self.one_shot_latency_us is None:
            return self.seconds(in_steps)
        one_shot = replace(self, latency_us=self.one_shot_latency_us, bus_bandwidth=self.one_shot_bandwidth)
        return min(self.seconds(in_steps), one_shot.seconds(at_once))

    def seconds(self, moved: float) -> float:
        return self.latency_us * 1e-6 + (moved / (self.bus_bandwidth * 1e9) if self.bus_bandwidth else 0.0)

    @property
    def is_overridden(self) -> bool:
        """Whether the figures differ from those in the file of this name; `source` does not hold for them then."""
        path = CONF_DIR / "interconnect" / f"{self.name}.yaml"
        if not path.is_file():
            return True
        return Interconnect(**yaml.safe_load(path.read_text(encoding="utf-8"))) != self

    def __str__(self) -> str:
        bandwidth = "unlimited" if self.bus_bandwidth is None else f"{self.bus_bandwidth:g} GB/s"
        one_shot = "" if self.one_shot_latency_us is None else f", one-shot {self.one_shot_latency_us:g} us"
        changed = " (changed)" if self.is_overridden else ""
        return f"{self.name}{changed}: {self.latency_us:g} us, {bandwidth}{one_shot}"


def all_reduce_bytes(size: int, ranks: int) -> float:
    """Bytes that each rank sends, and receives, to sum `size` bytes in steps."""
    return size * 2 * (ranks - 1) / ranks


def all_gather_bytes(size: int, ranks: int) -> float:
    """Bytes that each rank receives until it has all `size` bytes."""
    return size * (ranks - 1) / ranks
