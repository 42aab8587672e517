"""Which of several data sets gives each sample of a run, so that their shares hold exactly all along the run.

The j-th sample of a set with weight w (a fraction of 1) has to come within the samples floor((j - 1) / w) to
ceil(j / w) - 1 of the run; then after any k samples the set has given more than w k - 1 and fewer than w k + 1.
Taking the set whose time runs out first always succeeds (the Pfair schedule of Baruah et al., "Proportionate
progress", 1996). With weights in the ratio of whole numbers this repeats after as many samples as they sum up to, so
one period is all that is stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray


class Blend:
    """Sets with `shares`, positive whole numbers in the ratio of their weights; memory and time grow with their sum."""

    def __init__(self, shares: Sequence[int]) -> None:
        divisor = math.gcd(*shares)
        self.shares = np.array(shares, np.int64) // divisor  # samples of each set in a period
        self.period = int(self.shares.sum())
        self._set_of = earliest_deadline_first(self.shares.tolist())  # (period,) which set gives each sample
        self._before = np.empty(self.period, np.int64)  # (period,) samples of that set earlier in the period
        for number, share in enumerate(self.shares):
            self._before[self._set_of == number] = np.arange(share)

    def locate(self, k: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(n,) samples of the run -> (n,) the set of each, and (n,) how many of that set come before it."""
        periods, slot = np.divmod(k, self.period)
        sets = self._set_of[slot]
        return sets, periods * self.shares[sets] + self._before[slot]

    def counts(self, k: int) -> list[int]:
        """Samples that each set gives among the first `k`."""
        periods, rest = divmod(k, self.period)
        counts: list[int] = (
            periods * self.shares + np.bincount(self._set_of[:rest], minlength=len(self.shares))
        ).tolist()
        return counts


def earliest_deadline_first(shares: Sequence[int]) -> NDArray[np.int64]:
    """(sum(shares),) the set of each sample of a period."""
    period = sum(shares)
    given = [0] * len(shares)
    waiting = [(0, number) for number in range(len(shares))]  # (first slot that may be taken, set)
    ready: list[tuple[int, int]] = []  # (last slot that may be taken, set)
    slots = np.empty(period, np.int64)
    for slot in range(period):
        while waiting and waiting[0][0] <= slot:
            number = heappop(waiting)[1]
            heappush(ready, (-(-(given[number] + 1) * period // shares[number]) - 1, number))
        number = heappop(ready)[1]
        slots[slot] = number
        given[number] += 1
        heappush(waiting, (given[number] * period // shares[number], number))
    return slots
