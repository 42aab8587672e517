"""A run's copy for TensorBoard, as TensorBoard itself reads it: what metrics.jsonl holds, after whatever happened."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tracking.small_run import begin_start, record, write_run

from kraken_train.tracking.process import LOG


def read(run: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    return accumulator.Reload()


def values(accumulator: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, pytest.approx(event.value, rel=1e-6)) for event in accumulator.Scalars(tag)]


def test_curve_across_starts(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with begin_start(run, 1, 0, kind="tensorboard") as first:
        for step in range(1, 6):
            first.record(record(step))
    watched = read(run)  # a TensorBoard that stays open
    with begin_start(run, 2, 5, kind="tensorboard"):
        pass
    assert values(watched.Reload(), "lr") == [(s, 1e-3) for s in range(1, 6)]
    with begin_start(run, 3, 3, kind="tensorboard") as second:
        for step in range(4, 8):
            second.record(record(step) | {"lr": 2e-3})
        second.record(record(8) | {"loss": math.inf})
        second.rewind(6)
        second.run.events.write("rolled_back", step=8, to_step=6)
        for step in range(7, 10):
            second.record(record(step) | {"lr": 3e-3, "validation_loss": 1.5})
    rates = [(s, 1e-3) for s in (1, 2, 3)] + [(s, 2e-3) for s in (4, 5, 6)] + [(s, 3e-3) for s in (7, 8, 9)]
    for accumulator in (read(run), watched.Reload()):
        assert values(accumulator, "lr") == rates
        assert values(accumulator, "loss") == [(s, 3 / s) for s in range(1, 10)]
        assert values(accumulator, "validation_loss") == [(s, 1.5) for s in (7, 8, 9)]
        assert values(accumulator, "events/started") == [(0, 1), (5, 2), (3, 3)]
        assert values(accumulator, "events/rolled_back") == [(8, 1)]
        (config,) = accumulator.Tensors("config")[-1].tensor_proto.string_val
        assert b"data_fingerprint: f" in config
        assert b"c0ffee" in config
    assert len(list((run / "tensorboard").iterdir())) == 2, "the newest file and the one before"
    assert "Traceback" not in (run / "starts/0003/logs" / LOG).read_text()
