from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kraken_train.common.errors import ConfigError
from kraken_train.data.blend import Blend
from kraken_train.data.shares import whole_shares

SHARES = st.lists(st.integers(1, 400), min_size=1, max_size=8)


@settings(max_examples=60)
@given(SHARES)
def test_shares_hold_all_along_the_run(shares: list[int]) -> None:
    blend = Blend(shares)
    sets, before = blend.locate(np.arange(2 * blend.period + 7))
    counts = np.cumsum(sets[:, None] == np.arange(len(shares)), axis=0)  # (k, set) after k + 1 samples
    exact = np.arange(1, len(sets) + 1)[:, None] * np.array(shares)  # in units of 1 / sum(shares)
    assert (np.abs(counts * sum(shares) - exact) < sum(shares)).all()  # less than one sample
    assert np.array_equal(before, counts[np.arange(len(sets)), sets] - 1)
    assert blend.counts(len(sets)) == counts[-1].tolist()
    assert blend.counts(0) == [0] * len(shares)


@settings(max_examples=30)
@given(SHARES, st.integers(0, 10**12))
def test_far_along_it_is_the_same(shares: list[int], k: int) -> None:
    blend = Blend(shares)
    sets, before = blend.locate(np.arange(k, k + 5))
    counts = blend.counts(k)
    for number, index in zip(sets.tolist(), before.tolist(), strict=True):
        assert index == counts[number]
        assert abs(counts[number] - Fraction(k * shares[number], sum(shares))) < 5
        counts[number] += 1


def test_one_set_gives_all() -> None:
    sets, before = Blend([7]).locate(np.arange(9))
    assert not sets.any()
    assert before.tolist() == list(range(9))


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ({"a": 0.7, "b": 0.3}, [7, 3]),
        ({"a": 1, "b": 1, "c": 1}, [1, 1, 1]),
        ({"a": 0.333333, "b": 0.666667}, [333333, 666667]),
        ({"a": 2.5, "b": 1e-3}, [2500, 1]),
        ({"a": 12}, [1]),
    ],
)
def test_weights_are_what_was_typed(weights: dict[str, float], shares: list[int]) -> None:
    assert list(whole_shares(weights).values()) == shares
    assert list(whole_shares(weights)) == [Path(name) for name in weights]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 0.5, "b": 0}, "data_dir: the weight 0 of b must be a number greater than 0"),
        ({"a": True, "b": 1}, "data_dir: the weight True of a must be"),
        ({"a": float("nan")}, "data_dir: the weight nan of a must be"),
        ({"a": "half", "b": 1}, "data_dir: the weight half of a must be"),
        ({"a": 1, "b": 1e-7}, "ratio 10000000:1, but the numbers may sum up to 1000000 at most .*; round the weights"),
        ({"a": 1, "./a": 2}, "data_dir names a folder twice"),
    ],
)
def test_weights_that_cannot_be(weights: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        whole_shares(weights)
