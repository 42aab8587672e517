"""precision=auto in a training run: what is recorded, and that a continued run keeps it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml
from helpers import REPOSITORY, run_here

from integration.training import overrides


def train_on(processor: str, data: Path, run: Path, *more: str) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).with_name("faulty_train.py")
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    environment = {
        **os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "RANK": "0",
        "LOCAL_RANK": "0", "WORLD_SIZE": "1",
    }  # fmt: skip
    command = [sys.executable, str(script), processor, "0", "0", *overrides(data, run, "precision=auto", *more)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_a_run_keeps_the_precision_that_it_began_with(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    began = train_on("has no native bf16", data, run, "max_steps=2")
    assert began.returncode == 0, began.stderr
    assert "precision fp32: this device has no native bf16 (precision=auto)\n" in began.stdout
    assert yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["precision"] == "fp32"

    continued = train_on("has native bf16", data, run, "max_steps=4")
    assert continued.returncode == 0, continued.stderr
    assert "precision fp32: as this run began (precision=auto)\n" in continued.stdout
    assert "changed since the checkpoint: precision" not in continued.stdout
    assert "precision   fp32\n" in run_here("kraken_train.status", str(run)).stdout

    (run / "config.yaml").unlink()  # the checkpoint knows it too
    finished = train_on("has native bf16", data, run, "max_steps=4", "parallel.reduce_dtype=bf16")
    assert "reduce_dtype=bf16 would round what precision=fp32 computes" in finished.stderr
