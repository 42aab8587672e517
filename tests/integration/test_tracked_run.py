"""Training that is killed again and again is one curve in W&B; a service that does not answer costs it nothing."""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from helpers import run_module, user_error, wait_for_stop
from tracking.wandb_service import Service

from integration.training import overrides, records, start_stopping
from kraken_train.run.events import read_events
from kraken_train.run.folder import read_identity
from kraken_train.tracking.wandb_files import history, wandb_files
from kraken_train.tracking.wandb_files import records as wandb_records

STEPS = 60


def run_id(run: Path) -> str:
    identity = read_identity(run)
    assert identity is not None
    return identity["id"]


def train_until(run: Path, step: int, kill_all: bool, *settings: str) -> None:
    """The command, killed after `step` has been logged; `kill_all`: with all that it has started, as a machine dies."""
    with run.with_suffix(".log").open("a") as log:
        process = start_stopping(step + 1, list(settings), stdout=log, stderr=log)
    wait_for_stop(process)
    for victim in [*(psutil.Process(process.pid).children(recursive=True) if kill_all else []), process]:
        victim.kill()
    process.wait()


@pytest.mark.slow  # 60 s
def test_one_curve_through_kills(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    assert run_module("kraken_train.train", *overrides(data, undisturbed, f"max_steps={STEPS}")).returncode == 0
    settings = overrides(data, run, f"max_steps={STEPS}", "tracking.mode=offline", "tracking.notes=a note")
    train_until(run, 15, False, *settings)
    train_until(run, 35, True, *settings)
    result = run_module("kraken_train.train", *settings)
    assert result.returncode == 0, result.stderr

    files = wandb_files(run, run_id(run))
    assert len(files) >= 2
    curve = [row for file in files for _, row in history(file)]
    expected = records(undisturbed)
    assert [row["step"] for row in curve] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm", "lr", "tokens", "validation_loss"):
        assert [row.get(name) for row in curve] == [record.get(name) for record in expected], name
    exits = [r.exit.exit_code for file in files for r in wandb_records(file) if r.WhichOneof("record_type") == "exit"]
    assert exits[-1] == 0
    assert max(row.get("events/started", 0) for row in curve) == 3

    with Service() as service:  # as W&B itself reads the files
        for name, value in service.environment.items():
            monkeypatch.setenv(name, value)
        command = [sys.executable, "-m", "wandb", "sync", *(str(file.parent) for file in files)]
        subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    assert [service.history[row]["loss"] for row in sorted(service.history)] == [record["loss"] for record in expected]


@pytest.mark.slow  # 60 s
def test_no_step_waits_for_the_service(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 300  # seconds of training, so that the follower is there for most of it

    def train(name: str, *settings: str) -> tuple[Path, float]:
        """The run and the median seconds of its steps."""
        run = tmp_path / name
        common = [f"max_steps={steps}", "validation.every=0", "checkpoint.every=1000"]
        result = run_module("kraken_train.train", *overrides(data, run, *common, *settings))
        assert result.returncode == 0, result.stderr
        tokens = records(run)[0]["tokens"]
        return run, statistics.median(tokens / record["tokens_per_second"] for record in records(run)[5:])

    for number, trouble in enumerate([{"hangs": True}, {"status": 500}]):
        alone = followed = math.inf  # the least of some runs in turns: other work on the machine only adds to a time
        with Service(**trouble) as service:
            for name, value in service.environment.items():
                monkeypatch.setenv(name, value)
            for attempt in range(8):
                alone = min(alone, train(f"alone-{number}-{attempt}", "tracking.mode=off")[1])
                run, seconds = train(f"{number}-{attempt}", "tracking.mode=online", "tracking.finish_seconds=1")
                followed = min(followed, seconds)
                (told,) = [event for event in read_events(run / "events.jsonl") if event["event"] == "tracking"]
                assert "not everything had arrived" in told["note"]
                assert [record["step"] for record in records(run)] == list(range(1, steps + 1))
                if service.requests and followed < 1.5 * alone:
                    break
        assert service.requests, "the service was asked"
        assert followed < 1.5 * alone, trouble


@pytest.mark.slow  # 6 s
def test_no_login(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    result = run_module("kraken_train.train", *overrides(data, tmp_path / "run", "tracking.mode=online"))
    assert "tracking.mode=online, but there is no login" in user_error(result)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # 20 s
def test_export_as_an_artifact(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert run_module("kraken_train.train", *overrides(data, run, "tracking.mode=offline")).returncode == 0
    result = run_module("checkpoints.export", f"run_dir={run}", f"output_dir={tmp_path / 'a'}", "log_artifact=true")
    assert result.returncode == 0, result.stderr
    (artifact,) = [
        record.artifact
        for file in wandb_files(run, run_id(run))
        for record in wandb_records(file)
        if record.WhichOneof("record_type") == "artifact"
    ]
    assert (artifact.run_id, artifact.type, artifact.name) == (run_id(run), "model", "run")
    exported = {path.relative_to(tmp_path / "a").as_posix() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert {entry.path for entry in artifact.manifest.contents} == exported
    assert "step-12" in artifact.aliases

    plain = tmp_path / "plain"
    assert run_module("kraken_train.train", *overrides(data, plain)).returncode == 0
    result = run_module("checkpoints.export", f"run_dir={plain}", f"output_dir={tmp_path / 'b'}", "log_artifact=true")
    assert "has no run in Weights & Biases" in user_error(result)
    assert not (tmp_path / "b").exists()
