"""Every grid of ranks trains as one process does, whatever else is switched on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kraken_train.recipe.parametrization import parametrization_of
from parity.common import END_OF_DOCUMENT, MODELS, Z_LOSS, plain_training, settings
from parity.conftest import LAUNCHES, SLOW, SLOW_RANKS
from parity.trajectories import SHORT, STEPS

CASES = [
    pytest.param(launch, case, marks=[pytest.mark.slow] * (launch in (SLOW_RANKS, *SLOW)))
    for launch, (_, checks) in LAUNCHES.items()
    for check in checks
    if check.startswith("trajectories:")
    for case in check.removeprefix("trajectories:").split(",")
]


Twins = dict[tuple[str, str], list[tuple[float, float]]]
# Of losses and norms, by the number format. Muon computes in bf16 in any case, which makes more of differences.
TOLERANCES = {"fp32": (1e-5, 1e-5), "bf16": (5e-3, 2e-2), "muon": (1e-4, 1e-3)}


@pytest.fixture(scope="module")
def twins() -> Twins:
    """By model and kind of training."""
    plain = {(name, "plain"): plain_training(config, range(STEPS)) for name, config in MODELS.items()}
    muon = {(name, "muon"): plain_training(config, range(SHORT), muon=True) for name, config in MODELS.items()}
    kraken = MODELS["kraken-4"]
    return {
        **plain,
        **muon,
        ("kraken-4", "z-loss"): plain_training(kraken, range(SHORT), Z_LOSS),
        ("kraken-4", "mup"): plain_training(
            kraken, range(SHORT), parametrization=parametrization_of(settings(mup=True).optim, kraken)
        ),
        ("kraken-4", "apart"): plain_training(kraken, range(SHORT), end_of_document=END_OF_DOCUMENT),
    }


@pytest.mark.parametrize(("launch", "case"), CASES)
def test_same_losses_and_norms(
    launched: Callable[..., dict[str, Any]], twins: Twins, launch: int | str, case: str
) -> None:
    model, _, variant = case.split("/")
    steps = launched(launch)["trajectories"][case]
    kind = next((kind for kind in ("muon", "mup", "z-loss", "apart") if kind in variant), "plain")
    loss_tolerance, norm_tolerance = TOLERANCES["bf16" if "bf16" in variant else "muon" if kind == "muon" else "fp32"]
    assert len(steps) == (STEPS if variant == "plain" else SHORT)
    for (loss, norm, applied), (expected_loss, expected_norm) in zip(steps, twins[model, kind], strict=False):
        assert applied
        assert loss == pytest.approx(expected_loss, rel=loss_tolerance)
        assert norm == pytest.approx(expected_norm, rel=norm_tolerance)


def test_the_twins_learn(twins: Twins) -> None:
    for (_, kind), twin in twins.items():
        assert twin[-1][0] < twin[0][0] - (0.3 if kind == "plain" else 0.05)


@pytest.mark.parametrize("kind", ["z-loss", "apart", "mup"])
def test_it_changes_the_training(twins: Twins, kind: str) -> None:
    """By more than the tolerance above."""
    last, last_with = twins["kraken-4", "plain"][SHORT - 1], twins["kraken-4", kind][-1]
    assert all(abs(found - without) > 1e-4 * without for found, without in zip(last_with, last, strict=True)), last_with
