"""The time of a collective on a named interconnect: latency plus bytes over bus bandwidth.

Bus bandwidth is defined as in nccl-tests (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md): by the
bytes that each link carries, so it is about the same for every number of ranks. An all-reduce of S bytes over N ranks
moves 2 (N - 1) / N of S over each link, an all-gather of S bytes in all (N - 1) / N.
"""

from __future__ import annotations

from dataclasses import dataclass

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

    def validate(self) -> None:
        """Raises ConfigError."""
        require_at_least("interconnect.latency_us", self.latency_us, 0)
        if self.latency_us > 1e6:
            raise ConfigError(
                f"interconnect.latency_us={self.latency_us:g} is more than a second; it is in microseconds"
            )
        if self.bus_bandwidth is not None:
            require_positive("interconnect.bus_bandwidth", self.bus_bandwidth)

    @property
    def is_free(self) -> bool:
        return self.latency_us == 0 and self.bus_bandwidth is None

    def all_reduce_seconds(self, size: int, ranks: int) -> float:
        """Seconds to sum `size` bytes over `ranks`."""
        return self.seconds(size * 2 * (ranks - 1) / ranks)

    def all_gather_seconds(self, size: int, ranks: int) -> float:
        """Seconds until every one of `ranks` has all `size` bytes, of which each had its share."""
        return self.seconds(size * (ranks - 1) / ranks)

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
        return f"{self.name}{' (changed)' if self.is_overridden else ''}: {self.latency_us:g} us, {bandwidth}"
