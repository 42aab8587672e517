"""deterministic=true: the same bits in two runs, and after a kill; on a CPU here, and on a GPU where there is one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import launch_ranks, run_module

from integration.training import learned, overrides, records

ON_A_GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)


def train(device: str, data: Path, run: Path, *more: str) -> None:
    """On a GPU with its defaults: compiled, with fused kernels, and heads that FlashAttention takes."""
    of_device = ["precision=bf16", "model.hidden_size=64"] if device == "cuda" else ["precision=fp32"]
    settings = overrides(data, run, *of_device, "deterministic=true", *more)
    if device == "cuda":
        launch_ranks(1, "-m", "kraken_train.train", *settings, device=device)
    else:
        result = run_module("kraken_train.train", *settings)
        assert result.returncode == 0, result.stderr
        assert "deterministic: the same command" in result.stdout


@pytest.mark.parametrize("device", ["cpu", ON_A_GPU])
def test_equal_losses_across_runs_and_a_resumption(device: str, data: Path, tmp_path: Path) -> None:
    """Measuring sizes by layer in one of the runs changes nothing either."""
    first, second, killed = (tmp_path / name for name in ("first", "second", "killed"))
    train(device, data, first, "norms.every=3")
    train(device, data, second, "norms.every=0")
    shutil.copytree(first, killed)
    for step in (8, 12):  # as if it had been killed after step 4
        shutil.rmtree(killed / "checkpoints" / f"step-{step:08d}")
    train(device, data, killed, "norms.every=3")
    assert len(learned(first)) == 12
    assert learned(second) == learned(first)
    assert learned(killed) == learned(first)

    def sizes(run: Path) -> dict[int, dict[str, float]]:
        by_step = {r["step"]: {key: r[key] for key in r if key.startswith("rms/")} for r in records(run)}
        return {step: found for step, found in by_step.items() if found}

    assert list(sizes(first)) == [3, 6, 9, 12]
    assert sizes(killed) == sizes(first)
    assert sizes(second) == {}
    environment = json.loads((killed / "starts" / "0002" / "environment.json").read_text())
    assert environment["deterministic"] is True
