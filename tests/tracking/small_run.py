"""A run folder and the metrics of its starts, without training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from helpers import PATIENCE, small_configs
from parity.common import settings

from kraken_train.common.settings import to_dict
from kraken_train.run.folder import RunFolder
from kraken_train.run.layout import IDENTITY_FILE
from kraken_train.training.metrics_logger import MetricsLogger

RUN_ID = "abcd1234"


def write_run(path: Path) -> Path:
    path.mkdir()
    identity = {"id": RUN_ID, "model": to_dict(small_configs()["kraken"]), "data_fingerprint": "f", "seed": 0}
    (path / IDENTITY_FILE).write_text(json.dumps(identity))
    return path


def begin_start(path: Path, number: int, step: int, **tracking: Any) -> MetricsLogger:
    """The metrics of a start that goes on after `step`, for use as a context."""
    chosen = {"mode": "offline", "project": "p", "finish_seconds": PATIENCE, **tracking}
    config = dataclasses.replace(settings(), tracking=dataclasses.replace(settings().tracking, **chosen))
    run = RunFolder(path, RUN_ID, resuming=number > 1, start_number=number)
    run.start.mkdir(parents=True)
    (run.start / "environment.json").write_text(json.dumps({"commit": "c0ffee", "start": number}))
    run.events.write("started", start=number, step=step)
    return MetricsLogger(config, run, step, config.max_steps)


def record(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 3.0 / step, "lr": 1e-3}
