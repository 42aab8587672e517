"""DeepSpeed's modes against plain PyTorch in one process: losses, norms, clipping, batch sizes, resume, NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from parity import engine_modes
from parity.common import plain_training

RELATIVE_TOLERANCE = {("fp32", "adamw"): 1e-5, ("bf16", "adamw"): 5e-3, ("fp32", "muon"): 1e-4, ("bf16", "muon"): 5e-3}


@pytest.fixture(scope="module")
def twins() -> dict[str, list[tuple[float, float]]]:
    steps = range(engine_modes.STEPS)
    return {
        name: plain_training(engine_modes.CONFIG, steps, muon=name == "muon", sizes=engine_modes.SIZES)
        for name in ("adamw", "muon")
    }


@pytest.mark.parametrize(
    ("ranks", "size", "precision", "zero_stage", "optimizer"),
    [(1, 1, *mode) for mode in engine_modes.MODES_AT[1]]
    + [(2, size, *mode) for size in (1, 2) for mode in engine_modes.MODES_AT[2]],
)
def test_mode(
    launched: Callable[..., dict[str, Any]],
    twins: dict[str, list[tuple[float, float]]],
    ranks: int,
    size: int,
    precision: str,
    zero_stage: int,
    optimizer: str,
) -> None:
    mode = launched(ranks)["modes"][f"{size} {precision} {zero_stage} {optimizer}"]
    tolerance, twin = RELATIVE_TOLERANCE[precision, optimizer], twins[optimizer]
    for (loss, norm, applied), (expected_loss, expected_norm) in zip(mode["steps"], twin, strict=True):
        assert applied
        assert loss == pytest.approx(expected_loss, rel=tolerance)
        assert norm == pytest.approx(expected_norm, rel=tolerance * 2)
    assert mode["initial_weights_kept"], "creating the optimizer state has changed a weight"

    assert mode["average_differs_by"] < 1e-7, "the average of the weights is not torch.optim's"
    assert mode["resumed"] == mode["steps"][3:], "resumed losses and norms differ"
    assert mode["same_end"], "resumed weights or moments differ at the end"

    assert mode["poisoned"][2] == [None, None, False], "a NaN on one rank was not skipped by all"
    assert mode["poisoned"][:2] == mode["steps"][:2]
    assert mode["unchanged_by_nan"]
    assert mode["recovers"]
    assert mode["host_reads"] == {"steps": 0, "results": 2}, "a step has waited for the device"
