"""A training run with Muon, as a command: it learns, continues to the bit, and its state is for Muon alone."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from helpers import run_module, user_error

from checkpoints.training.store import find_good_checkpoint
from checkpoints.training.stored_tensors import StoredTensors
from integration.training import STEPS, learned, overrides

SETTINGS = ("optim=muon", "schedule=constant", "schedule.warmup_steps=3", "optim.lr=1e-2", "checkpoint.keep=9")


def train(data: Path, run: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return run_module("kraken_train.train", *overrides(data, run, *SETTINGS, *more))


def test_run(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = train(data, run)
    assert done.returncode == 0, done.stderr
    found = learned(run)
    assert len(found) == STEPS
    assert found[-1][1] < found[0][1] - 0.2
    names = StoredTensors(find_good_checkpoint(run / "checkpoints")[0]).entries
    kept = {name.partition(".layers.0.ffn.up")[0] for name in names if ".layers.0.ffn.up" in name}
    assert kept == {"model", "optimizer.momentum_buffer"}

    # Interrupted after 8 steps, and continued.
    again = tmp_path / "again"
    shutil.copytree(run, again)
    for path in ("checkpoints/step-00000012", "checkpoints/latest"):
        (shutil.rmtree if "step" in path else Path.unlink)(again / path)
    continued = train(data, again)
    assert continued.returncode == 0, continued.stderr
    assert "step 8" in continued.stdout
    assert learned(again) == found

    # Another optimizer has no use for its state, and nothing is written.
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    error = user_error(train(data, run, "optim=adamw", "max_steps=20"))
    assert "holds the state of optim=muon, with which optim=adamw cannot continue; use optim=muon" in error
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
