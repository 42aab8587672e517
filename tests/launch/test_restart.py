"""`launch.restart`, as the batch script of a training job calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import run_here, user_error
from integration.training import overrides

from kraken_train.run.events import read_events
from kraken_train.run.rank_errors import RankError
from launch.slurm.requeue import REQUEUE_EXIT_CODE

PERMANENT = RankError("3", 2, "node-3", 7, "the disk is full", None, follows=False, restart_helps=False)


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_JOB_ID": "71", "SLURM_NTASKS": "1", "SLURM_JOB_NODELIST": "here"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("job")
def test_before_and_after(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    settings = overrides(data, run)

    def after(code: int) -> tuple[int, str]:
        options = ["--exit-code", str(code), "--slurm-reason", "", "--max-restarts", "1"]
        result = run_here("launch.restart", "after", *options, *settings)
        return result.returncode, result.stdout + result.stderr

    bad = "parallel.sub_layer_parallel_size=4"
    assert "does not divide the 2 ranks" in user_error(
        run_here("launch.restart", "before", "--ranks", "2", *settings, bad)
    )
    assert "does not exist" in user_error(
        run_here("launch.restart", "before", "--ranks", "2", *overrides(tmp_path / "none", run))
    )
    assert not run.exists()

    assert run_here("launch.restart", "before", "--ranks", "2", *settings).returncode == 0
    errors = run / "starts" / "0001" / "errors"
    errors.mkdir(parents=True)
    assert after(137)[0] == REQUEUE_EXIT_CODE
    assert [event["event"] for event in read_events(run / "events.jsonl")] == ["allocated", "requeued"]

    # An error file of this attempt does not count for the next attempt, which has not started ranks yet.
    (errors / "rank-0000.json").write_text(json.dumps(PERMANENT.__dict__))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    code, message = after(1)
    assert code == 1
    assert "1 restarts in a row" in message
    assert "disk" not in message


@pytest.mark.usefixtures("job")
def test_no_requeue_if_it_cannot_be_recorded(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "events.jsonl").mkdir(parents=True)  # no event can be recorded, as on a full disk
    result = run_here(
        "launch.restart", "after", "--exit-code", "1", "--told", "", "--max-restarts", "3", *overrides(data, run)
    )
    assert result.returncode == 2
    assert "cannot be" in result.stderr
