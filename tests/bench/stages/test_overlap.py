"""How much of an all-reduce is hidden, in profiles that are made by hand."""

from __future__ import annotations

import pytest

from kraken_train.bench.breakdown import Interval
from kraken_train.bench.stages.overlap import hidden_shares

LAYERS = 3


def profile(hidden: float) -> list[Interval]:
    """Of a step of three layers: each sum lasts 10, a product hides `hidden` of it and attention half of that."""
    intervals, now = [], 0.0
    for number in range(2 * LAYERS + 1):
        of_a_layer = number not in (LAYERS - 1, 2 * LAYERS - 1, 2 * LAYERS)
        intervals.append(Interval("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", now, now + 10, thread=2))
        if of_a_layer:
            intervals.append(Interval("flash_fwd_kernel", now, now + hidden / 2, thread=1))
            intervals.append(Interval("nvjet_gemm", now + hidden / 2, now + hidden, thread=1))
        now += 20
    return intervals


@pytest.mark.parametrize("hidden", [0.0, 4.0, 10.0])
def test_share(hidden: float) -> None:
    """The sums of the conjunction, the embedding and the report are not hidden by anything and do not count."""
    assert hidden_shares(profile(hidden), LAYERS) == pytest.approx((hidden / 10, hidden / 20))


def test_other_collectives_neither_count_nor_hide() -> None:
    gathering = [Interval("ncclDevKernel_AllGather_RING_LL", i * 20.0, i * 20.0 + 10, thread=3) for i in range(6)]
    assert hidden_shares(profile(4.0) + gathering, LAYERS) == pytest.approx((0.4, 0.2))


def test_too_few_sums() -> None:
    with pytest.raises(ValueError, match="2 all-reduces, and a Kraken has 6"):
        hidden_shares(profile(4.0)[:4], LAYERS)
