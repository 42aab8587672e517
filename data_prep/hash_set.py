"""A set of 64-bit hashes in little memory: 11 to 15 bytes for each, about twice that while it grows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FULLEST = 0.75
GROWTH = 1.4
SMALLEST = 1 << 12  # slots


class SeenHashes:
    """An open-addressing hash table. Two texts share a hash by chance once in 2^64: with 8 million documents, the odds
    that any is taken for a duplicate without being one are 1 in 500,000."""

    def __init__(self) -> None:
        self.count = 0
        self._slots = np.zeros(SMALLEST, np.uint64)  # 0 is free

    def add(self, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Add (n,) hashes; (n,) which of them are new, of equal ones the first."""
        hashes = np.maximum(hashes, np.uint64(1))  # 0 means free, so it shares the place of 1
        new = np.zeros(len(hashes), np.bool_)
        distinct, first = np.unique(hashes, return_index=True)
        while self.count + len(distinct) > FULLEST * len(self._slots):
            self._grow(self.count + len(distinct))
        inserted = self._insert(distinct)
        new[first[inserted]] = True
        self.count += int(inserted.sum())
        return new

    def _insert(self, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which of the (n,) distinct hashes were not there yet."""
        size = len(self._slots)
        slots = (hashes % np.uint64(size)).astype(np.int64)
        new = np.zeros(len(hashes), np.bool_)
        pending = np.arange(len(hashes))
        while len(pending):
            there = self._slots[slots[pending]]
            free = pending[there == 0]
            self._slots[slots[free]] = hashes[free]  # of several for one slot, the last stays
            won = free[self._slots[slots[free]] == hashes[free]]
            new[won] = True
            pending = pending[(there != hashes[pending]) & ~new[pending]]
            slots[pending] = (slots[pending] + 1) % size
        return new

    def _grow(self, count: int) -> None:
        old = self._slots
        self._slots = np.zeros(max(int(len(old) * GROWTH), int(count / FULLEST) + 1), np.uint64)
        for start in range(0, len(old), 1 << 16):
            part = old[start : start + (1 << 16)]
            self._insert(part[part != 0])
