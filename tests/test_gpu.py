"""The same training on a GPU as on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import launch_ranks
from parity import engine_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_modes_of_the_engine(tmp_path: Path) -> None:
    reports = []
    for device in ("cuda", "cpu"):
        output = tmp_path / f"{device}.json"
        launch_ranks(1, str(engine_ranks.__file__), str(output), device=device)
        reports.append(json.loads(output.read_text()))
    for precision, zero_stage in engine_ranks.MODES:
        on_gpu, on_cpu = (report[f"{precision} {zero_stage}"] for report in reports)
        tolerance = {"fp32": 1e-4, "bf16": 1e-2}[precision]
        for found, expected in zip(on_gpu["steps"], on_cpu["steps"], strict=True):
            assert found == pytest.approx(expected, rel=tolerance)
        assert on_gpu["resumed"] == pytest.approx(on_gpu["steps"][3:], rel=tolerance)
        assert on_gpu["poisoned"][2] == [None, None, False]
        assert on_gpu["unchanged_by_nan"] and on_gpu["recovers"]
