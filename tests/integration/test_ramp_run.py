"""Runs in tokens, with a batch ramp: against plain PyTorch, interrupted, on other ranks, and against steps."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import REPOSITORY, launch_ranks, run_here, run_module, user_error, wait_for_stop

from checkpoints.training.store import find_good_checkpoint
from integration.training import learned, overrides, records, start_stopping
from kraken_train.data.dataset import TrainingData
from kraken_train.model.config import parse_model
from kraken_train.model.registry import build_model
from kraken_train.run.state import read_state
from kraken_train.training.optim import parameter_groups

# Steps of 4, 8 and 12 samples of 32 tokens: 4 to 512 tokens, 2 to 1024, and 3 to 2176.
RAMP = ["global_batch_size={0: 4, 0.5k: 8, 1k: 12}", "max_tokens=2k", "schedule.warmup_tokens=300",
        "checkpoint.every_tokens=200", "checkpoint.keep=20", "validation.every_tokens=0.5k"]  # fmt: skip
SIZES = [4] * 4 + [8] * 2 + [12] * 3
ENDS = [sum(SIZES[: step + 1]) * 32 for step in range(len(SIZES))]


def train(data: Path, run: Path, *more: str) -> str:
    result = run_module("kraken_train.train", *overrides(data, run, *more))
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def ramp(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run with a ramp."""
    run = tmp_path_factory.mktemp("ramp") / "run"
    told = train(data, run, *RAMP)
    assert "9 steps to go of 4 in 4 steps, then 8 in 2 steps, then 12 in 3 steps x 32 tokens (2 or 4 or 6 micro" in told
    assert "to 2,176 tokens (max_tokens=2k)" in told
    assert (
        "note: tokens that are no whole number of steps are rounded up: max_tokens=2k: 2,176 (9 steps); the batch of 8 "
        "from 500: 512 (4 steps); the batch of 12 from 1k: 1,024 (6 steps)" in told
    )
    return run


def rate(begin: int, end: int) -> float:
    """By the definition of the schedule: linear over 300 tokens, then half a cosine to 2000."""
    if end <= 300:
        return 1e-3 * end / 300
    return 1e-4 + 0.5 * (1e-3 - 1e-4) * (1 + math.cos(math.pi * min(1, max(0, begin - 300) / 1700)))


def test_a_ramp_is_plain_training(data: Path, ramp: Path) -> None:
    shares = TrainingData({data: 1})
    settings = json.loads((ramp / "run.json").read_text())["model"]
    samples = shares.samples(32, seed=0)
    model = build_model(parse_model(settings), seed=0)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), betas=(0.9, 0.95), eps=1e-8)
    first = 0
    for size, end, record in zip(SIZES, ENDS, records(ramp), strict=True):
        assert (record["tokens"], record["global_batch_size"]) == (end, size)
        assert record["lr"] == pytest.approx(rate(end - size * 32, end))
        for group in optimizer.param_groups:
            group["lr"] = record["lr"]
        tokens = torch.from_numpy(samples.batch(range(first, first + size)))
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        first += size
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert [record["step"] for record in records(ramp) if "validation_loss" in record] == [4, 6, 8, 9]
    saved = sorted(int(path.name[5:]) for path in (ramp / "checkpoints").glob("step-*"))
    assert saved == [step for step in range(1, 10) if step in (2, 4, 5, 6, 7, 8, 9)]
    metadata = find_good_checkpoint(ramp / "checkpoints")[0].metadata
    assert (metadata["consumed_samples"], metadata["trained_tokens"]) == (sum(SIZES), 2176)
    state = read_state(ramp)
    assert (state.step, state.max_steps) == (9, 9)
    assert "0 steps to go" in train(data, ramp, *RAMP)


@pytest.mark.parametrize("step", [2, 4, 5])  # within the first size, at a border, and within the second
def test_resumed_to_the_bit(data: Path, ramp: Path, tmp_path: Path, step: int) -> None:
    run = tmp_path / "run"
    shutil.copytree(ramp, run)
    for folder in (run / "checkpoints").glob("step-*"):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    told = train(data, run, *RAMP)
    assert f"step {step}, {ENDS[step - 1]:,} tokens" in told
    assert "changed since" not in told
    assert "the learning rate jumps" not in told
    assert learned(run) == learned(ramp)


def test_killed_and_resumed_on_more_ranks(data: Path, ramp: Path, tmp_path: Path) -> None:
    """Killed before step 7, at the second border, and read late. Two copies then read the same samples."""
    run = tmp_path / "run"
    process = start_stopping(7, overrides(data, run, *RAMP, "log_every=4"))
    wait_for_stop(process)
    state = read_state(run)
    assert (state.state, state.max_steps, state.checkpoint_step) == ("running", 9, 6)
    assert state.seconds_left is not None
    assert state.tokens_per_second is not None
    assert state.seconds_left * state.tokens_per_second == pytest.approx(2176 - 1024)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    alone = tmp_path / "alone"
    shutil.copytree(run, alone)
    train(data, alone, *RAMP)
    expected = {record[0]: record for record in learned(ramp)}
    assert all(record == expected[record[0]] for record in learned(alone))
    assert learned(alone)[-1][0] == 9
    launch_ranks(2, "-m", "kraken_train.train", *overrides(data, run, *RAMP))
    found = {record[0]: record for record in learned(run)}
    for step in (7, 8, 9):
        assert found[step] == pytest.approx(expected[step], rel=1e-4)


def test_tokens_and_steps_that_coincide(data: Path, tmp_path: Path) -> None:
    """12 steps of 4 x 32 tokens: to the bit. A run may go on in the other unit."""
    common = ["checkpoint.keep=20", "schedule=wsd", "schedule.decay_steps=5"]
    by_steps, by_tokens = tmp_path / "steps", tmp_path / "tokens"
    train(data, by_steps, *common)
    told = train(data, by_tokens, *common, "max_tokens=1536", "schedule.warmup_tokens=384", "schedule.decay_tokens=640",
                 "checkpoint.every_tokens=512", "validation.every_tokens=768", "max_steps=5")  # fmt: skip
    assert "to 1,536 tokens (max_tokens=1,536)" in told
    assert "rounded up" not in told
    assert learned(by_tokens) == learned(by_steps)
    assert len(learned(by_steps)) == 12
    names = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (by_steps, by_tokens)]
    assert names[0] == names[1]

    beyond = user_error(run_module("kraken_train.train", *overrides(data, by_steps, *common, "max_tokens=1k")))
    assert "holds a run that has done 1,536 tokens, and max_tokens=1k; raise max_tokens, or use another" in beyond
    told = train(data, by_steps, *common, "max_tokens=1.9k", "global_batch_size={0: 4, 1k: 8}")
    assert "changed since the checkpoint: max_tokens: None -> 1900" in told
    assert "changed since the checkpoint: global_batch_size: 4 -> {0: 4, 1k: 8}" in told
    assert "the learning rate jumps at step 13: 0 by the settings of the checkpoint" in told
    assert [record["tokens"] for record in records(by_steps)[12:]] == [1792, 2048]


def test_skipped_data_is_not_trained(data: Path, tmp_path: Path) -> None:
    """After a rollback the run still trains on `max_tokens`, beside what it has skipped."""
    run = tmp_path / "run"
    settings = ["max_tokens=1.5k", "checkpoint.every=2", "health.spike_window=4", "health.loss_spike=rollback"]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    environment = {**os.environ, **ranks, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = ["-m", "integration.faulty_train", "spikes", "0", "7", *overrides(data, run, *settings)]
    subprocess.run([sys.executable, *command], env=environment, check=True, capture_output=True)
    metadata = find_good_checkpoint(run / "checkpoints")[0].metadata
    assert (records(run)[-1]["step"], metadata["trained_tokens"], metadata["tokens"]) == (12, 1536, 1536 + 20 * 32)


def test_refused_before_anything_starts(data: Path, tmp_path: Path) -> None:
    for typed, words in [
        ("global_batch_size={0: 4, 1k: 6, 2k: 5}", "{0: 4, 1k: 6, 2k: 5}: 5 is not a multiple of micro_batch_size=2"),
        ("global_batch_size={1k: 6}", "must give the first size for 0 tokens"),
        ("max_tokens=1Q", "max_tokens=1Q: no whole number of tokens"),
    ]:
        error = user_error(run_here("kraken_train.train", *overrides(data, tmp_path / "run", typed)))
        assert words in error
        assert not (tmp_path / "run").exists()
