"""Runs whose loss spikes, or of which a rank is slow or hangs. One rank each run takes 4 s, two take 10 s."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import REPOSITORY

from checkpoints.training.store import find_good_checkpoint
from integration.faulty_train import SLOW_SECONDS
from integration.training import learned, overrides, records
from kraken_train.run.events import read_events
from kraken_train.run.rank_errors import read_errors

WATCHED = ["checkpoint.every=2", "health.spike_window=4", "health.spike_steps=3", "max_nonfinite_steps=3"]
Train = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def train(data: Path) -> Train:
    """`train(run, [fault, rank, when], ...)`: a run, on one rank unless `ranks` says otherwise."""

    def start(run: Path, fault: list[str], *more: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
        command = [sys.executable]
        if ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += ["-m", "integration.faulty_train", *fault, *overrides(data, run, *WATCHED, *more)]
        alone = {} if ranks > 1 else {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
        environment = {**os.environ, **alone, "PYTHONPATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return start


@pytest.fixture(scope="module")
def without_bad_data(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that is expected after a rollback from step 9 to step 4: the samples of steps 5 to 9 do not exist."""
    run = tmp_path_factory.mktemp("without") / "run"
    result = train(run, ["skips the data of 5 steps", "0", "5"])
    assert result.returncode == 0, result.stderr
    return run


def of_steps(run: Path) -> list[tuple[float, ...]]:
    """What was learned in each step; the position in the data differs."""
    return [(*values[:4], values[5]) for values in learned(run)]


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run / "events.jsonl") if event["event"] == name]


def told(result: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in result.stdout.splitlines() if line.startswith("told: ")]


def test_back_from_a_spike(train: Train, without_bad_data: Path, tmp_path: Path) -> None:
    """Killed right after going back, the run meets the spike again, and goes back again."""
    run = tmp_path / "run"
    rollback = "health.loss_spike=rollback"
    assert train(run, ["spikes and dies", "0", "7"], rollback).returncode == -9
    assert [event["step"] for event in events(run, "saved")] == [2, 4, 6], "nothing is saved within the spike"
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    # The loss of step 7 is computed with what was saved after step 6.
    assert left == ["latest", "step-00000002", "step-00000004"]

    result = train(run, ["spikes", "0", "7"], rollback)
    assert result.returncode == 0, result.stderr
    assert told(result) == [{"step": 4, "equal": True, "tensors": 48, "index_readings": 1}]
    (event,) = events(run, "rolled_back")
    assert (event["step"], event["to_step"], event["skipped_samples"]) == (9, 4, 20)
    assert f"{event['reason']}: back from step 9" in result.stdout
    assert [event["step"] for event in events(run, "saved")][3:] == [6, 6, 8, 10, 12]
    assert of_steps(run) == of_steps(without_bad_data)
    assert records(run)[-1]["tokens"] == records(without_bad_data)[-1]["tokens"] + 20 * 32


@pytest.mark.slow  # 8 s
def test_back_from_a_spike_that_is_seen_late(train: Train, tmp_path: Path) -> None:
    """Results are read after steps 8 and 10, so the data of step 10 are skipped with those of the spike."""
    late = "log_every=5"
    result = train(tmp_path / "run", ["spikes", "0", "7"], "health.loss_spike=rollback", late)
    assert result.returncode == 0, result.stderr
    (event,) = events(tmp_path / "run", "rolled_back")
    assert (event["step"], event["to_step"], event["skipped_samples"]) == (10, 4, 24)
    assert train(tmp_path / "without", ["skips the data of 6 steps", "0", "5"], late).returncode == 0
    assert of_steps(tmp_path / "run") == of_steps(tmp_path / "without")


@pytest.mark.slow  # 4 s, and 4 s if it is alone
def test_back_from_nan(train: Train, without_bad_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = train(run, ["sees NaNs", "0", "7"], "health.nonfinite=rollback", "checkpoint.asynchronous=true")
    assert result.returncode == 0, result.stderr
    assert told(result) == [{"step": 4, "equal": True, "tensors": 48, "index_readings": 1}]
    assert events(run, "rolled_back")[0]["reason"] == "the loss or a gradient was not finite in steps 7 to 9"
    assert of_steps(run) == of_steps(without_bad_data)


def test_skipped_steps_are_no_updates(train: Train, tmp_path: Path) -> None:
    """AdamW's correction goes by the updates, so a run that resumes must know their number."""
    result = train(tmp_path, ["sees NaNs", "0", "7"], "max_nonfinite_steps=9", "log_every=4")
    assert result.returncode == 0, result.stderr
    skipped = [event["step"] for event in events(tmp_path, "skipped")]
    assert skipped[0] == 7
    assert len(skipped) < 5
    checkpoint, _ = find_good_checkpoint(tmp_path / "checkpoints")
    assert (checkpoint.step, checkpoint.metadata["updates"]) == (12, 12 - len(skipped))


@pytest.mark.slow  # 12 s
def test_a_spike_stops_the_run(train: Train, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = train(run, ["spikes", "0", "7"], "health.loss_spike=stop")
    assert result.returncode != 0
    assert "high from step 7 on (health.loss_spike=stop); the checkpoints in" in result.stderr
    assert "health.loss_spike=rollback continues with the data after" in result.stderr
    (error,) = read_errors(run / "starts" / "0001")
    assert not error.restart_helps
    assert not events(run, "rolled_back")
    result = train(run, ["spikes", "0", "7"])  # ignore
    assert result.returncode == 0
    assert records(run)[7]["loss"] > 50

    # The data after the spike are no better.
    again = tmp_path / "again"
    result = train(again, ["only spikes", "0", "7"], "health.loss_spike=rollback", "health.max_rollbacks=1")
    assert result.returncode != 0
    assert "high from step 5 on, and health.max_rollbacks=1 did not suffice to get past step 9" in result.stderr
    assert [event["to_step"] for event in events(again, "rolled_back")] == [4]


@pytest.mark.slow  # 20 s
def test_two_ranks_go_back_together(train: Train, tmp_path: Path) -> None:
    """One of them spikes; they share a model."""
    shared = "parallel.sub_layer_parallel_size=2"
    result = train(tmp_path / "run", ["spikes", "1", "7"], "health.loss_spike=rollback", shared, ranks=2)
    assert result.returncode == 0, result.stderr
    assert train(tmp_path / "without", ["skips the data of 5 steps", "all", "5"], shared, ranks=2).returncode == 0
    assert of_steps(tmp_path / "run") == of_steps(tmp_path / "without")


@pytest.mark.slow  # 20 s
def test_a_slow_rank_is_named(train: Train, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = train(run, ["is slow", "all", "2"], "max_steps=22", "validation.every=0", ranks=2)
    assert result.returncode == 0, result.stderr
    slow = [event for event in events(run, "straggler") if event["rank"] == 1]
    assert len(slow) == 1
    assert slow[0]["factor"] > 1.5
    assert slow[0]["step"] >= 8
    assert len([event for event in events(run, "straggler_over") if event["rank"] == 1]) == 1
    assert f"note: rank 1 on {slow[0]['host']} holds the others up" in result.stdout
    of_slow_steps = records(run)[1:11]
    assert all(record["slowest_rank"] == 1 and record["rank_seconds_max"] >= SLOW_SECONDS for record in of_slow_steps)


@pytest.mark.slow  # 30 s
def test_a_rank_that_hangs_in_its_data_is_named(train: Train, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = train(run, ["hangs in its data", "1", "2"], "health.step_seconds=20", ranks=2)
    assert result.returncode == 1, result.stderr
    start = run / "starts" / "0001"
    first, second = read_errors(start)
    assert (first.rank, first.follows, second.rank, second.follows) == (1, False, 0, True)
    assert first.restart_helps
    assert f"rank 1 (process {first.pid} on {first.host}) is in faulty_train.py:" in first.message
    assert "read_for_ever; the others wait for it in " in first.message
    assert result.stderr.count(f"error: {first.message}") == 1
    (ended,) = events(run, "ended")
    assert (ended["outcome"], ended["reason"]) == ("failed", first.message)
    for rank in range(2):
        assert "(most recent call first)" in (start / "logs" / f"rank-{rank:04d}.log").read_text()
