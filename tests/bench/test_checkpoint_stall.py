"""How long training stands still for a checkpoint: what counts as the stall, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import run_here, run_module, user_error

from kraken_train.bench import checkpoint_rounds
from kraken_train.bench.checkpoint_rounds import ASYNCHRONOUS, SYNCHRONOUS, Measured, Times, one_save
from kraken_train.bench.checkpoint_stall import RATIO, Spread, figures
from kraken_train.parallel.ranks import Runtime


class Clock:
    """In place of the module `time`: only what a test does takes time."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds


class Pretended:
    """A model, its engine and a writer, whose work takes this time."""

    def __init__(self, clock: Clock, **seconds: float) -> None:
        self.clock, self.seconds = clock, seconds
        self.engine = self

    def __getattr__(self, name: str) -> Any:
        def work(*arguments: object) -> None:
            self.clock.seconds += self.seconds.get(name, 0.0)

        return work


@pytest.mark.parametrize(
    ("save", "finish", "expected"),
    [(8.0, 0.0, Times(stall=8.75, steps=30.0, rest=0.0)), (0.125, 4.0, Times(stall=0.875, steps=30.0, rest=4.0))],
)
def test_what_counts_as_the_stall(monkeypatch: pytest.MonkeyPatch, save: float, finish: float, expected: Times) -> None:
    """The comparison of replicas, the copy of the state and the call of the writer; no step, and no wait after it."""
    clock = Clock()
    monkeypatch.setattr(checkpoint_rounds, "time", clock)
    model: Any = Pretended(clock, step=10.0, state=0.5, verify_replicas=0.25)
    writer: Any = Pretended(clock, save=save, finish=finish)
    assert one_save(model, writer, 1, 3, Runtime(0, 0, 1, 1)) == expected


def test_figures_compare_within_a_round() -> None:
    """The machine is ten times slower in the second round; the ratio is not."""
    waiting = [Times(2.0, 5.0, 0.0), Times(20.0, 50.0, 0.0), Times(4.0, 5.0, 0.0)]
    beside = [Times(0.2, 5.5, 0.0), Times(2.0, 55.0, 1.0), Times(0.2, 5.0, 0.0)]
    found = figures(Measured({SYNCHRONOUS: waiting, ASYNCHRONOUS: beside}, 8_000_000))
    assert found[RATIO] == Spread(median=pytest.approx(10), low=pytest.approx(7.5), high=pytest.approx(10))
    assert found["lost by an asynchronous save in all, s"].median == pytest.approx(0.7)  # of 0.7, 8 and 0.2
    assert found["written by a synchronous save, MB/s"].median == pytest.approx(2)


def test_command(tmp_path: Path) -> None:
    tiny = ("model=kraken-tiny-4way", "vocab_size=512", "micro_batch_size=1", "precision=fp32", "device=cpu")
    result = run_module("kraken_train.bench.checkpoint_stall", *tiny, "steps=1", "rounds=2", f"output_dir={tmp_path}")
    assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-stall.json"], "the checkpoints are still there"
    found = json.loads((tmp_path / "checkpoint-stall.json").read_text())
    assert {kind: len(of) for kind, of in found["rounds"].items()} == {SYNCHRONOUS: 2, ASYNCHRONOUS: 2}
    assert all(part in result.stdout for part in (RATIO, found["processor"], "kraken of "))


def test_mistakes(tmp_path: Path) -> None:
    for setting in ("rounds=0", "model=none", "output_dir=/dev/null/x"):
        result = run_here("kraken_train.bench.checkpoint_stall", f"output_dir={tmp_path}", "device=cpu", setting)
        assert setting.partition("=")[0] in user_error(result)
