"""Folders of finished runs, without the training."""

from __future__ import annotations

import json

from kraken_train.common.settings import to_dict
from kraken_train.model.config import ModelConfig
from studies.results import Results
from studies.study import Run


def write_finished(
    results: Results, run: Run, loss: float, model: ModelConfig, tokens: int = 1638400, data: str = "d"
) -> None:
    folder = results.runs_dir / run.name
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(
        json.dumps({"id": "a", "model": to_dict(model), "data_fingerprint": data, "seed": run.seed})
    )
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 400, "tokens": tokens, "validation_loss": loss}))
    noon = "2026-11-27T12:00:00+00:00"
    events = [
        {"time": noon, "event": "started", "start": 1, "step": 0},
        {"time": noon, "event": "ended", "start": 1, "outcome": "finished"},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
