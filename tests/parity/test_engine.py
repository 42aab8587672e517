"""DeepSpeed's modes against plain PyTorch in one process: losses, gradient norms, clipping, resume, NaN."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from helpers import launch_ranks

from kraken_train.model import KrakenModel
from kraken_train.optim import parameter_groups
from parity import engine_ranks

RELATIVE_TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("engine") / "report.json"
    launch_ranks(request.param, str(engine_ranks.__file__), str(output))
    report = json.loads(output.read_text())
    assert report["world_size"] == request.param
    return report


@pytest.fixture(scope="module")
def twin() -> list[tuple[float, float]]:
    """(loss, gradient norm) per step of the same training in plain PyTorch, the global batch at once."""
    model = KrakenModel(engine_ranks.MODEL)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    results = []
    for step, samples in enumerate(engine_ranks.batches()):
        loss = model.loss(samples[:, :-1], samples[:, 1:])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), engine_ranks.MAX_GRAD_NORM)
        for group in optimizer.param_groups:
            group["lr"] = engine_ranks.rate(step)
        optimizer.step()
        optimizer.zero_grad()
        results.append((loss.item(), norm.item()))
    assert max(norm for _, norm in results) > engine_ranks.MAX_GRAD_NORM, "the clipping is not tested"
    return results


@pytest.mark.parametrize(("precision", "zero_stage"), engine_ranks.MODES)
def test_mode(report: dict[str, Any], twin: list[tuple[float, float]], precision: str, zero_stage: int) -> None:
    mode = report[f"{precision} {zero_stage}"]
    tolerance = RELATIVE_TOLERANCE[precision]
    for (loss, norm, applied), (expected_loss, expected_norm) in zip(mode["steps"], twin, strict=True):
        assert applied
        assert loss == pytest.approx(expected_loss, rel=tolerance)
        assert norm == pytest.approx(expected_norm, rel=tolerance * 2)
    assert mode["initial_weights_kept"], "creating the optimizer state has changed a weight"

    assert mode["resumed"] == mode["steps"][3:], "resumed losses and norms differ"
    assert mode["same_end"], "resumed weights or moments differ at the end"

    assert mode["poisoned"][2] == [None, None, False], "a NaN on one rank was not skipped by all"
    assert mode["poisoned"][:2] == mode["steps"][:2]
    assert mode["unchanged_by_nan"]
    assert mode["recovers"]
