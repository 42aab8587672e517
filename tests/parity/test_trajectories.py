"""Every grid of ranks trains as one process does, whatever else is switched on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from parity.common import END_OF_DOCUMENT, MODELS, Z_LOSS, plain_training
from parity.conftest import GRIDS, SLOW_RANKS
from parity.trajectories import SHORT, STEPS

CASES = [
    pytest.param(ranks, case, marks=[pytest.mark.slow] * (ranks == SLOW_RANKS))
    for ranks, checks in GRIDS.items()
    for check in checks
    if check.startswith("trajectories:")
    for case in check.removeprefix("trajectories:").split(",")
]


@pytest.fixture(scope="module")
def twins() -> dict[str, list[tuple[float, float]]]:
    plain = {name: plain_training(config, range(STEPS)) for name, config in MODELS.items()}
    kraken = MODELS["kraken-4"]
    return plain | {
        "kraken-4 z-loss": plain_training(kraken, range(SHORT), Z_LOSS),
        "kraken-4 apart": plain_training(kraken, range(SHORT), end_of_document=END_OF_DOCUMENT),
    }


@pytest.mark.parametrize(("ranks", "case"), CASES)
def test_same_losses_and_norms(
    launched: Callable[..., dict[str, Any]], twins: dict[str, list[tuple[float, float]]], ranks: int, case: str
) -> None:
    model, _, variant = case.split("/")
    steps = launched(ranks)["trajectories"][case]
    loss_tolerance, norm_tolerance = (5e-3, 2e-2) if "bf16" in variant else (1e-5, 1e-5)
    assert len(steps) == (STEPS if variant == "plain" else SHORT)
    twin = next((twins[f"{model} {part}"] for part in ("z-loss", "apart") if part in variant), twins[model])
    for (loss, norm, applied), (expected_loss, expected_norm) in zip(steps, twin, strict=False):
        assert applied
        assert loss == pytest.approx(expected_loss, rel=loss_tolerance)
        assert norm == pytest.approx(expected_norm, rel=norm_tolerance)


def test_the_twins_learn(twins: dict[str, list[tuple[float, float]]]) -> None:
    for name in MODELS:
        assert twins[name][-1][0] < twins[name][0][0] - 0.3


@pytest.mark.parametrize("what", ["z-loss", "apart"])
def test_it_changes_the_training(twins: dict[str, list[tuple[float, float]]], what: str) -> None:
    """By more than the tolerance above."""
    last, last_with = twins["kraken-4"][SHORT - 1], twins[f"kraken-4 {what}"][-1]
    assert all(abs(found - without) > 1e-4 * without for found, without in zip(last_with, last, strict=True)), last_with
