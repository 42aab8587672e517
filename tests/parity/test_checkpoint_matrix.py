"""A checkpoint of any grid of ranks and ZeRO stage goes on at any other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from parity.checkpoint_matrix import MODES, MORE_MODES, MORE_STEPS, RIVALS

SAVED = [(4, "4x1"), (4, "2x2"), (1, "1x1")]  # ranks of the launch, ranks of a copy x copies
RESUMED = [(2, "2x1"), (2, "1x2"), (4, "2x2")]
RESUMED_SLOWLY = [*RESUMED, ("resume at 1", "1x1"), (4, "4x1")]
Launched = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(("precision", "zero_stage", "optimizer"), MODES)
@pytest.mark.parametrize(("resume_launch", "resumed"), RESUMED, ids=str)
@pytest.mark.parametrize(("save_launch", "saved"), SAVED, ids=str)
def test_resumed(
    launched: Launched,
    save_launch: int,
    saved: str,
    resume_launch: int,
    resumed: str,
    precision: str,
    zero_stage: int,
    optimizer: str,
) -> None:
    name = f"{saved}-{precision}-zero{zero_stage}-{optimizer}"
    uninterrupted = launched(save_launch)["save"][name]
    compare(
        launched(resume_launch)["resume"][f"{name} {resumed}"],
        uninterrupted,
        precision,
        optimizer,
        exact=saved == resumed,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "zero_stage", "optimizer"), MORE_MODES)
def test_resumed_in_other_modes(launched: Launched, precision: str, zero_stage: int, optimizer: str) -> None:
    for save_launch, saved in SAVED:
        name = f"{saved}-{precision}-zero{zero_stage}-{optimizer}"
        uninterrupted = launched(f"slow {save_launch}")["save-more"][name]
        for resume_launch, resumed in RESUMED_SLOWLY:
            continued = launched(f"slow {resume_launch}")["resume"][f"{name} {resumed}"]
            compare(continued, uninterrupted, precision, optimizer, exact=saved == resumed)


@pytest.mark.slow
@pytest.mark.parametrize("name", RIVALS)
def test_resumed_with_other_architectures(launched: Launched, name: str) -> None:
    found = launched("slow rivals")["other-architectures"][name]
    for size in ("1", "4"):
        assert len(found[size]) == len(found["2"]) == MORE_STEPS // 2
        for (loss, norm, applied), (expected_loss, expected_norm, _) in zip(found[size], found["2"], strict=True):
            assert applied
            assert loss == pytest.approx(expected_loss, rel=1e-5)
            assert norm == pytest.approx(expected_norm, rel=1e-5)


def compare(continued: list, uninterrupted: list, precision: str, optimizer: str, exact: bool) -> None:
    assert len(continued) == MORE_STEPS
    if exact:
        assert continued == uninterrupted
        return
    # Muon computes in bf16 in any case, which makes more of differences.
    tolerance, of_norms = (5e-3, 2e-2)
    if precision == "fp32":
        tolerance, of_norms = (1e-4, 1e-3) if optimizer == "muon" else (1e-5, 1e-5)
    for (loss, norm, applied), (expected_loss, expected_norm, _) in zip(continued, uninterrupted, strict=True):
        assert applied
        assert loss == pytest.approx(expected_loss, rel=tolerance)
        assert norm == pytest.approx(expected_norm, rel=of_norms)
