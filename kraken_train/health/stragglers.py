"""Stragglers: ranks that the others wait for, since their own part of a step takes longer."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

WINDOW = 8  # logged steps
LEAST_SECONDS = 0.02  # above the median; smaller differences are noise

Record = dict[str, float | int]


@dataclass(frozen=True)
class Change:
    """A rank has become a straggler, or is no longer one."""

    rank: int
    factor: float  # its seconds divided by those of the median rank
    slow: bool


class Stragglers:
    """Watches the seconds that each rank needs for its own part of a step.

    A straggler is a rank whose time, in the median of the last WINDOW logged steps, is more than `factor` times that of
    the median rank. 0: no rank is a straggler.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.window: deque[list[float]] = deque(maxlen=WINDOW)
        self.slow: set[int] = set()

    def observe(self, seconds: Sequence[float]) -> list[Change]:
        """Add the `seconds` of each rank in one step; return which ranks become or stop being stragglers."""
        self.window.append(list(seconds))
        if not self.factor or len(self.window) < WINDOW:
            return []
        usual = statistics.median(middle(ranks) for ranks in self.window)
        changes = []
        for rank, times in enumerate(zip(*self.window, strict=True)):
            own = statistics.median(times)
            factor = own / max(usual, 1e-9)
            slow = factor > self.factor and own - usual > LEAST_SECONDS
            if slow != (rank in self.slow):
                self.slow ^= {rank}
                changes.append(Change(rank, factor, slow))
        return changes


def describe_change(change: Change, host: str) -> str:
    what = "holds the others up" if change.slow else "no longer holds the others up"
    return (
        f"rank {change.rank} on {host} {what}: it takes {change.factor:.1f} times as long as the median rank for its "
        "own part of a step"
    )


def describe_ranks(seconds: Sequence[float]) -> Record:
    """Metrics of a step: the longest and the median time of all ranks, and the slowest rank."""
    slowest = max(range(len(seconds)), key=lambda rank: seconds[rank])
    return {
        "rank_seconds_max": seconds[slowest],
        "rank_seconds_median": middle(seconds),
        "slowest_rank": slowest,
    }


def middle(seconds: Sequence[float]) -> float:
    """The median; for an even number of ranks the lower one, so that one of two ranks can be slower than it."""
    return statistics.median_low(seconds)
