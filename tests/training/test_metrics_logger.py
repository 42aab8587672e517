"""metrics.jsonl across restarts and rollbacks, and the line on the console. tests/tracking has what follows it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from parity.common import settings

from kraken_train.run.folder import RunFolder
from kraken_train.training.metrics_logger import MetricsLogger, describe, drop_records_after


def record(step: int, **more: float) -> dict[str, Any]:
    return {"step": step, "loss": 3.0 / step, "grad_norm": 1.0, "lr": 1e-3, "tokens": 10 * step, **more}


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_one_record_per_step_across_restarts(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, "abc", resuming=False)
    with MetricsLogger(settings(), run, 0, last_step=5) as first:
        for step in range(1, 6):
            first.record(record(step))
    with run.metrics.open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    with run.metrics.open("ab") as damaged:
        damaged.write(b"\n\xff\xfe{\n")
    with MetricsLogger(settings(), run, 3, last_step=5) as second:  # the newest checkpoint is of step 3
        for step in range(4, 8):
            second.record(record(step))
    assert steps(run.metrics) == [1, 2, 3, 4, 5, 6, 7]


def test_steps_that_are_done_again(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, "abc", resuming=False)
    with MetricsLogger(settings(), run, 0, last_step=5) as metrics:
        for step in (1, 2, 3):
            metrics.record(record(step))
        metrics.rewind(1)
        assert steps(run.metrics) == [1]
        metrics.record(record(2, validation_loss=1.0))
    assert steps(run.metrics) == [1, 2]
    assert "validation_loss" in run.metrics.read_text().splitlines()[1]


def test_nothing_to_drop(tmp_path: Path) -> None:
    drop_records_after(tmp_path / "metrics.jsonl", 0)
    assert list(tmp_path.iterdir()) == []


def test_file_is_json_even_for_nan(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, "abc", resuming=False)
    with MetricsLogger(settings(), run, 0, last_step=5) as metrics:
        metrics.record(record(1) | {"loss": math.nan, "grad_norm": math.inf})
    line = run.metrics.read_text()
    assert "NaN" not in line
    assert "Infinity" not in line
    assert json.loads(line)["loss"] is None


def test_line() -> None:
    text = describe(record(2, validation_loss=2.0, validation_perplexity=7.389, mfu=0.25, data_wait=0.01))
    assert text == (
        "step 2 | loss 1.5000 | validation loss 2.0000 | validation perplexity 7.39 | lr 1.00e-03 | grad norm 1.000 | "
        "MFU 25.0% | data wait 1.0%"
    )
