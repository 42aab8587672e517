"""The order in which the samples of a data set are read: a new permutation each epoch, computed and never stored.

The permutation is a Feistel network on a rectangle of `rows x columns >= num_samples` cells: rounds that alternately
shift the row by a function of the column and the column by one of the row, each of which can be undone. What ends
outside the samples is permuted again until it is inside (Black and Rogaway, "Ciphers with arbitrary finite domains",
2002), which happens about once in sqrt(num_samples) times. So the order costs no memory and no time at the start,
and sample k is found at once for any k.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from kraken_train.common.errors import ConfigError

ROUNDS = 16  # with 8, the orders of half a dozen samples are not equally likely
LARGEST_SEED = 2**32 - 1
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio: the step of SplitMix64


class ShuffledOrder:
    """Which sample of a data set is read k-th.

    `stream` tells apart the sets of one run, so that two of equal size are not read in the same order.
    It uses integer arithmetic alone, so the order is the same on any machine and under any NumPy.
    """

    def __init__(self, num_samples: int, seed: int, stream: int = 0) -> None:
        if not 0 <= seed <= LARGEST_SEED:
            raise ConfigError(f"seed={seed} must be from 0 to {LARGEST_SEED}")
        self.num_samples = num_samples
        rows = math.isqrt(num_samples - 1) + 1
        columns = -(-num_samples // rows)
        # An even number of columns, since in an odd rectangle the rounds reach the even permutations alone.
        self.rows, self.columns = np.uint64(rows), np.uint64(columns + columns % 2)
        self.key = scramble(np.array([seed << 32 | stream], np.uint64))

    def __getitem__(self, k: int) -> int:
        """Index into the data of the k-th sample that is read; k >= 0 may exceed one epoch."""
        return int(self.indices(np.array([k]))[0])

    def indices(self, k: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) numbers of samples in the order of reading -> (n,) indices into the data."""
        epoch, position = np.divmod(k.astype(np.uint64), np.uint64(self.num_samples))
        index = self._permute(position, epoch)
        while (outside := np.flatnonzero(index >= self.num_samples)).size:
            index[outside] = self._permute(index[outside], epoch[outside])
        return index.astype(np.int64)

    def _permute(self, cell: NDArray[np.uint64], epoch: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """One pass of the network over all cells of the rectangle."""
        row, column = np.divmod(cell, self.columns)
        key = self.key + epoch * np.uint64(ROUNDS) * GOLDEN
        for _ in range(ROUNDS // 2):
            key = key + GOLDEN
            row = (row + (scramble(scramble(key) + column) >> np.uint64(1))) % self.rows
            key = key + GOLDEN
            column = (column + (scramble(scramble(key) + row) >> np.uint64(1))) % self.columns
        place: NDArray[np.uint64] = row * self.columns + column
        return place


def scramble(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's bijection of 64-bit numbers, in which each bit of the input changes half of the output's bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed
