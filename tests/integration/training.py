"""Small training runs, as commands, and what they have learned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from helpers import REPOSITORY

STEPS, EVERY = 12, 4


def overrides(data: Path | str, run: Path, *more: str) -> list[str]:
    return [
        "model=kraken-tiny-4way",
        "model.num_layers=2",
        "model.hidden_size=16",
        "model.context_length=32",
        f"data_dir={data}",
        f"run_dir={run}",
        "precision=fp32",
        "global_batch_size=4",
        "micro_batch_size=2",
        f"max_steps={STEPS}",
        f"checkpoint.every={EVERY}",
        "validation.every=6",
        "validation.samples=5",
        "schedule.warmup_steps=3",
        *more,
    ]


def start_stopping(step: int, settings: list[str], **output: Any) -> subprocess.Popen[str]:
    """The training command, on one rank, which stops itself before this step, so that something can happen there."""
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    environment = {**os.environ, **ranks, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "integration.faulty_train", "stops", "0", str(step), *settings]
    return subprocess.Popen(command, env=environment, text=True, **output)


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def learned(run: Path) -> list[tuple[float, ...]]:
    """What must not depend on interruptions, per step."""
    keys = ("step", "loss", "grad_norm", "lr", "tokens", "validation_loss")
    return [tuple(record.get(key, -1.0) for key in keys) for record in records(run)]
