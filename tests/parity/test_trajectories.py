"""Every grid of ranks trains as one process does, whatever else is switched on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from parity.common import MODELS, plain_training
from parity.conftest import GRIDS, SLOW_RANKS
from parity.trajectories import STEPS

CASES = [
    pytest.param(ranks, case, marks=[pytest.mark.slow] * (ranks == SLOW_RANKS))
    for ranks, checks in GRIDS.items()
    for check in checks
    if check.startswith("trajectories:")
    for case in check.removeprefix("trajectories:").split(",")
]


@pytest.fixture(scope="module")
def twins() -> dict[str, list[tuple[float, float]]]:
    return {name: plain_training(config, range(STEPS)) for name, config in MODELS.items()}


@pytest.mark.parametrize(("ranks", "case"), CASES)
def test_same_losses_and_norms(
    launched: Callable[..., dict[str, Any]], twins: dict[str, list[tuple[float, float]]], ranks: int, case: str
) -> None:
    model, _, variant = case.split("/")
    steps = launched(ranks)["trajectories"][case]
    loss_tolerance, norm_tolerance = (5e-3, 2e-2) if "bf16" in variant else (1e-5, 1e-5)
    assert len(steps) == (STEPS if variant == "plain" else 6)
    for (loss, norm, applied), (expected_loss, expected_norm) in zip(steps, twins[model], strict=False):
        assert applied
        assert loss == pytest.approx(expected_loss, rel=loss_tolerance)
        assert norm == pytest.approx(expected_norm, rel=norm_tolerance)


def test_the_twins_learn(twins: dict[str, list[tuple[float, float]]]) -> None:
    for twin in twins.values():
        assert twin[-1][0] < twin[0][0] - 0.3
