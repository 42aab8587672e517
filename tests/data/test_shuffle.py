from __future__ import annotations

import itertools
import tracemalloc
from collections import Counter
from math import factorial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kraken_train.common.errors import ConfigError
from kraken_train.data.shuffle import ShuffledOrder

FROZEN_ORDER = [0, 7, 3, 1, 4, 6, 5, 2, 8, 9, 0, 4, 3, 1, 2, 8, 5, 9, 7, 6]
FROZEN_IN_LARGE = 680156


def test_order_is_frozen() -> None:
    """These values must never change: a run resumes in the order in which it was started."""
    order = ShuffledOrder(10, seed=1234)
    assert [order[k] for k in range(20)] == FROZEN_ORDER
    assert ShuffledOrder(1_000_000, seed=0)[123_456] == FROZEN_IN_LARGE


@settings(max_examples=60)
@given(st.integers(1, 3000), st.integers(0, 2**32 - 1), st.integers(0, 9), st.integers(0, 10**9))
def test_each_epoch_reads_each_sample_once(num_samples: int, seed: int, stream: int, epoch: int) -> None:
    k = np.arange(num_samples * epoch, num_samples * (epoch + 1))
    indices = ShuffledOrder(num_samples, seed, stream).indices(k)
    assert np.array_equal(np.sort(indices), np.arange(num_samples))


def test_epochs_seeds_and_sets_differ() -> None:
    k = np.arange(50)
    orders = [
        ShuffledOrder(50, seed, stream).indices(k + 50 * epoch).tolist()
        for seed in (0, 1, 3)
        for stream in (0, 1)
        for epoch in (0, 1, 2)
    ]
    assert len(set(map(tuple, orders))) == len(orders)


@pytest.mark.parametrize("num_samples", [2, 3, 4, 5])
@pytest.mark.parametrize("over", ["epochs", "seeds"])
def test_all_orders_are_equally_likely(num_samples: int, over: str) -> None:
    draws = 4800 if over == "epochs" else 1200
    if over == "epochs":
        orders = ShuffledOrder(num_samples, 1).indices(np.arange(draws * num_samples)).reshape(draws, num_samples)
    else:
        orders = np.stack([ShuffledOrder(num_samples, seed).indices(np.arange(num_samples)) for seed in range(draws)])
    counts = Counter(map(tuple, orders.tolist()))
    expected = draws / factorial(num_samples)
    chi_squared = sum(
        (counts[order] - expected) ** 2 / expected for order in itertools.permutations(range(num_samples))
    )
    freedom = factorial(num_samples) - 1
    assert chi_squared < freedom + 5 * (2 * freedom) ** 0.5


def test_large_order_looks_random() -> None:
    """Against what independent uniform numbers do, within five standard deviations."""
    size, n = 9_000_000, 400_000
    read = ShuffledOrder(size, 0).indices(np.arange(n)) / size
    assert abs(read.mean() - 0.5) < 5 / (12 * n) ** 0.5
    for other in (read[1:], read[2:], read[64:], ShuffledOrder(size, 1).indices(np.arange(n)) / size, np.arange(n) / n):
        assert abs(np.corrcoef(read[: len(other)], other)[0, 1]) < 5 / len(other) ** 0.5
    cells = np.histogram2d(read[:-1], read[1:], bins=64, range=[[0, 1], [0, 1]])[0]  # neighbours in the order
    chi_squared = ((cells - n / 4096) ** 2 / (n / 4096)).sum()
    assert abs(chi_squared - 4095) < 5 * (2 * 4095) ** 0.5


def test_any_sample_is_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it is, in a few passes of the network over a single cell."""
    passes: list[int] = []
    permute = ShuffledOrder._permute

    def counted(self: ShuffledOrder, cell: NDArray[np.uint64], epoch: NDArray[np.uint64]) -> NDArray[np.uint64]:
        passes.append(cell.size)
        return permute(self, cell, epoch)

    monkeypatch.setattr(ShuffledOrder, "_permute", counted)
    tracemalloc.start()
    for num_samples in (9_000_000, 10**12):
        order = ShuffledOrder(num_samples, 7)
        assert all(0 <= order[k] < num_samples for k in (0, 10**9, 10**15))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert set(passes) == {1}
    assert len(passes) <= 2 * 6
    assert peak < 100_000  # bytes


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_out_of_range(seed: int) -> None:
    with pytest.raises(ConfigError, match=f"seed={seed} must be from 0 to 4294967295"):
        ShuffledOrder(10, seed)
