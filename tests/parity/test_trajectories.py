"""Every grid of ranks trains as one process does, whatever else is switched on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from kraken_train.recipe.parametrization import parametrization_of
from parity.common import END_OF_DOCUMENT, MODELS, Z_LOSS, plain_training, settings
from parity.conftest import LAUNCHES, SLOW, SLOW_RANKS
from parity.trajectories import SHORT, STEPS

CASES = [
    (launch, case)
    for launch, (_, checks) in LAUNCHES.items()
    for check in checks
    if check.startswith("trajectories:")
    for case in check.removeprefix("trajectories:").split(",")
]
FAST = [(launch, case) for launch, case in CASES if launch not in (SLOW_RANKS, *SLOW)]
Twin = list[tuple[float, float]]  # loss and gradient norm of each step
# Of losses and norms, by the number format. Muon computes in bf16 in any case, which makes more of differences.
TOLERANCES = {"fp32": (1e-5, 1e-5), "bf16": (5e-3, 2e-2), "muon": (1e-4, 1e-3)}


def kind_of(case: str) -> tuple[str, str]:
    """The model of a case, and which plain training it must equal."""
    model, _, variant = case.split("/")
    return model, next((kind for kind in ("muon", "mup", "z-loss", "apart") if kind in variant), "plain")


@cache
def twin(model: str, kind: str) -> Twin:
    """In one process, with plain PyTorch."""
    config, steps = MODELS[model], range(STEPS if kind == "plain" else SHORT)
    if kind == "mup":
        return plain_training(config, steps, parametrization=parametrization_of(settings(mup=True).optim, config))
    if kind == "apart":
        return plain_training(config, steps, end_of_document=END_OF_DOCUMENT)
    return plain_training(config, steps, Z_LOSS if kind == "z-loss" else 0.0, muon=kind == "muon")


@pytest.mark.parametrize(
    ("launch", "case"), [pytest.param(*case, marks=[] if case in FAST else [pytest.mark.slow]) for case in CASES]
)
def test_same_losses_and_norms(launched: Callable[..., dict[str, Any]], launch: int | str, case: str) -> None:
    (model, kind), variant = kind_of(case), case.rpartition("/")[2]
    steps = launched(launch)["trajectories"][case]
    loss_tolerance, norm_tolerance = TOLERANCES["bf16" if "bf16" in variant else "muon" if kind == "muon" else "fp32"]
    assert len(steps) == (STEPS if variant == "plain" else SHORT)
    for (loss, norm, applied), (expected_loss, expected_norm) in zip(steps, twin(model, kind), strict=False):
        assert applied
        assert loss == pytest.approx(expected_loss, rel=loss_tolerance)
        assert norm == pytest.approx(expected_norm, rel=norm_tolerance)


@pytest.mark.parametrize(("model", "kind"), sorted({kind_of(case) for _, case in FAST}))
def test_a_twin_learns(model: str, kind: str) -> None:
    steps = twin(model, kind)
    assert steps[-1][0] < steps[0][0] - (0.3 if kind == "plain" else 0.05)


@pytest.mark.parametrize("kind", ["z-loss", "apart", "mup"])
def test_it_changes_the_training(kind: str) -> None:
    """By more than the tolerance above."""
    last, last_with = twin("kraken-4", "plain")[SHORT - 1], twin("kraken-4", kind)[-1]
    assert all(abs(found - without) > 1e-4 * without for found, without in zip(last_with, last, strict=True)), last_with
