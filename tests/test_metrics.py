"""metrics.jsonl across restarts, and a Weights & Biases run that goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from parity.common import settings

from kraken_train.config import TrackingConfig
from kraken_train.errors import ConfigError
from kraken_train.metrics import Metrics, describe, drop_records_after
from kraken_train.run_folder import RunFolder


def record(step: int, **more: float) -> dict[str, Any]:
    return {"step": step, "loss": 3.0 / step, "grad_norm": 1.0, "lr": 1e-3, "tokens": 10 * step, **more}


def config(mode: str = "off") -> Any:
    tracking = TrackingConfig(mode=mode, project="test", entity=None, name=None, group=None, tags=("a",))
    template = settings()
    return type(template)(**{**template.__dict__, "tracking": tracking})


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_one_record_per_step_across_restarts(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, "abc", resuming=False)
    first = Metrics(config(), run, 0, {})
    for step in range(1, 6):
        first.record(record(step))
    first.close(failed=False)
    with run.metrics.open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    with run.metrics.open("ab") as damaged:
        damaged.write(b"\n\xff\xfe{\n")
    second = Metrics(config(), run, 3, {})  # the newest checkpoint is of step 3
    for step in range(4, 8):
        second.record(record(step))
    second.close(failed=False)
    assert steps(run.metrics) == [1, 2, 3, 4, 5, 6, 7]


def test_nothing_to_drop(tmp_path: Path) -> None:
    drop_records_after(tmp_path / "metrics.jsonl", 0)
    assert list(tmp_path.iterdir()) == []


def test_file_is_json_even_for_nan(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, "abc", resuming=False)
    metrics = Metrics(config(), run, 0, {})
    metrics.record(record(1) | {"loss": math.nan, "grad_norm": math.inf})
    metrics.close(failed=False)
    line = run.metrics.read_text()
    assert "NaN" not in line and "Infinity" not in line
    assert json.loads(line)["loss"] is None


def test_line() -> None:
    text = describe(record(2, validation_loss=2.0, validation_perplexity=7.389, mfu=0.25, data_wait=0.01))
    assert text == (
        "step 2 | loss 1.5000 | validation loss 2.0000 | validation perplexity 7.39 | lr 1.00e-03 | grad norm 1.000 | "
        "MFU 25.0% | data wait 1.0%"
    )


def test_wandb_continues_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    for start in (0, 2):
        metrics = Metrics(config("offline"), RunFolder(tmp_path, "abcd1234", resuming=start > 0), start, {"n": 1})
        metrics.record(record(start + 1))
        metrics.close(failed=False)
    # The folders' own names end in a number where both begin in one second.
    runs = [path.name for path in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")]
    assert runs == ["run-abcd1234.wandb"] * 2, "each start writes files of its own, of one and the same run"


def test_wandb_without_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "no such key")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with pytest.raises(ConfigError, match=r"tracking\.mode=online: Weights & Biases did not start"):
        Metrics(config("online"), RunFolder(tmp_path, "abcd1234", resuming=False), 0, {})
