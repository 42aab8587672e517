"""A run's copy in W&B: one curve however its starts end, and training that does not wait for the service."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import PATIENCE, wait_until
from tracking.small_run import RUN_ID, begin_start, record, write_run
from tracking.wandb_service import Service

from kraken_train.health.shutdown import Interrupted
from kraken_train.run.events import read_events
from kraken_train.tracking import process
from kraken_train.tracking.wandb_files import (
    FILE_HEADER_BYTES,
    end_at_last_record,
    history,
    last_step,
    records,
    wandb_files,
)
from kraken_train.training.metrics_logger import MetricsLogger


def offline_curve(run: Path) -> list[tuple[int, dict[str, Any]]]:
    return [row for file in wandb_files(run, RUN_ID) for row in history(file)]


def kinds(run: Path, kind: str) -> list[Any]:
    found = [entry for file in wandb_files(run, RUN_ID) for entry in records(file)]
    return [getattr(entry, kind) for entry in found if entry.WhichOneof("record_type") == kind]


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a machine that has too much to do for the seconds that an interrupted run has left."""
    monkeypatch.setattr(process, "INTERRUPTED_SECONDS", PATIENCE)


def kill_follower(metrics: MetricsLogger) -> None:
    """As a machine does that dies."""
    assert metrics.follower is not None
    follower = psutil.Process(metrics.follower.process.pid)
    follower.suspend()  # so that it does not see its children end, and start them again
    for one in [*follower.children(recursive=True), follower]:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    metrics.follower.process.wait()


def followers_of(run: Path) -> list[int]:
    """Processes that still have to do with the run, W&B's own included."""
    found = []
    for one in psutil.process_iter():
        try:
            if one.status() != psutil.STATUS_ZOMBIE and any(
                str(run) in text for text in (*one.cmdline(), *(file.path for file in one.open_files()))
            ):
                found.append(one.pid)
        except psutil.Error:
            continue
    return [pid for pid in found if pid != os.getpid()]


def recorded_waits(process: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """How long its end is waited for from now on, at most, each time."""
    limits: list[float | None] = []
    wait = process.wait
    monkeypatch.setattr(process, "wait", lambda timeout=None: (limits.append(timeout), wait(timeout))[1])
    return limits


def test_offline_across_deaths(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")

    first = begin_start(run, 1, 0)
    for step in range(1, 6):
        first.record(record(step))
    wait_until(lambda: wandb_files(run, RUN_ID))
    kill_follower(first)  # the machine has died, and with it what W&B had not written yet
    left = last_step(wandb_files(run, RUN_ID))

    with pytest.raises(KeyboardInterrupt), begin_start(run, 2, 3) as second:  # the newest checkpoint was of step 3
        for step in range(4, 9):
            second.record(record(step))
        second.record(record(9) | {"loss": math.nan})
        raise KeyboardInterrupt
    assert [exit.exit_code for exit in kinds(run, "exit")] == [1]

    with begin_start(run, 3, 6) as third:
        for step in range(7, 11):  # another value than before shows which one W&B keeps
            third.record(record(step) | {"lr": 2e-3})
        third.rewind(9)
        third.record(record(10) | {"lr": 3e-3})
        third.record(record(11) | {"lr": 3e-3})

    curve = offline_curve(run)
    assert [step for step, _ in curve] == [row["step"] for _, row in curve] == list(range(1, 12))
    # What W&B has is not logged again; of step 10 it has what it saw first.
    rates = [row["lr"] for _, row in curve]
    assert rates[:9] == [1e-3] * 9
    assert rates[9] in (2e-3, 3e-3)
    assert rates[10] == 3e-3
    losses = [row["loss"] for _, row in curve]
    assert math.isnan(losses[8])
    assert [losses[i] for i in (0, 7, 9)] == [3.0, 3 / 8, 0.3]
    counts = [row["events/started"] for _, row in curve if "events/started" in row]
    assert counts == ([1, 2, 3] if left else [2, 3])
    assert [exit.exit_code for exit in kinds(run, "exit")] == [1, 0]
    assert "started start=3 step=6" in "".join(output.line for output in kinds(run, "output_raw"))
    settings = {item.key: item.value_json for item in kinds(run, "run")[-1].config.update}
    assert settings["data_fingerprint"] == '"f"'
    assert '"c0ffee"' in settings["environment"]
    assert int(settings["num_parameters"]) > 1000
    assert '"adamw"' not in settings["environment"]
    wait_until(lambda: followers_of(run) == [])


def test_killed_just_after_its_start_then_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The follower, before it has written a file, before the file has a record, and within one; training continues."""
    run = write_run(tmp_path / "run")
    first = begin_start(run, 1, 0)
    kill_follower(first)
    assert not wandb_files(run, RUN_ID)
    with first:
        for step in range(1, 6):
            first.record(record(step))

    second = begin_start(run, 2, 3)
    wait_until(lambda: wandb_files(run, RUN_ID))
    kill_follower(second)
    (begun,) = wandb_files(run, RUN_ID)
    os.truncate(begun, FILE_HEADER_BYTES)
    with second:
        for step in range(4, 8):
            second.record(record(step))

    with begin_start(run, 3, 6) as third:
        for step in range(7, 10):
            third.record(record(step))
    (cut,) = wandb_files(run, RUN_ID)
    os.truncate(cut, cut.stat().st_size // 2)
    kept = last_step([cut])
    assert kept < 9

    with begin_start(run, 4, 8) as fourth:
        for step in range(9, 12):
            fourth.record(record(step))
    assert [step for step, _ in offline_curve(run)] == list(range(1, 12))
    assert [step for step, _ in history(cut)] == list(range(1, kept + 1))
    with Service() as service:
        for name, value in service.environment.items():
            monkeypatch.setenv(name, value)
        folders = [str(file.parent) for file in wandb_files(run, RUN_ID)]
        synced = subprocess.run([sys.executable, "-m", "wandb", "sync", *folders], check=True, capture_output=True)
    assert service.steps == list(range(1, 12)), synced.stderr
    assert set(service.names) == {RUN_ID}


@pytest.mark.usefixtures("patience")
def test_online_goes_on_where_the_service_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run")
    with Service() as service:
        for name, value in service.environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(Interrupted), begin_start(run, 1, 0, mode="online") as first:
            for step in range(1, 5):
                first.record(record(step))
            raise Interrupted
        assert service.steps == [1, 2, 3, 4]
        assert service.exit_codes == [143]
        assert service.preempted
        with begin_start(run, 2, 2, mode="online") as second:
            for step in range(3, 8):
                second.record(record(step))
    assert service.steps == [1, 2, 3, 4, 5, 6, 7]
    assert service.exit_codes == [143, 0]
    assert set(service.names) == {RUN_ID}
    assert service.config["num_parameters"]["value"] > 1000
    assert not [event for event in read_events(run / "events.jsonl") if event["event"] == "tracking"]


def test_service_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recording costs what it costs without a copy, the end is bounded, and the files can be sent later."""
    run = write_run(tmp_path / "run")
    with Service(hangs=True) as service:
        for name, value in (service.environment | {"WANDB_INIT_TIMEOUT": str(PATIENCE)}).items():
            monkeypatch.setenv(name, value)
        with begin_start(run, 1, 0, mode="online", finish_seconds=1.0) as metrics:
            wait_until(lambda: service.requests)
            for step in range(1, 101):
                metrics.record(record(step))
            assert metrics.follower is not None
            waited = recorded_waits(metrics.follower.process, monkeypatch)
        assert waited[0] == 1.0
        (logged,) = [event["note"] for event in read_events(run / "events.jsonl") if event["event"] == "tracking"]
        assert "Weights & Biases: not everything had arrived 1 s after" in logged
        assert f"python -m kraken_train.tracking.follow {run}" in logged
        wait_until(lambda: followers_of(run) == [])
    with Service() as service:
        monkeypatch.setenv("WANDB_BASE_URL", service.environment["WANDB_BASE_URL"])
        command = [sys.executable, "-m", "kraken_train.tracking.follow", str(run)]
        subprocess.run(command, check=True, capture_output=True)
    assert service.steps == list(range(1, 101))


@pytest.mark.slow  # 20 to 40 s each: W&B tries again for a while
@pytest.mark.parametrize("trouble", [{"hangs": True}, {"status": 500}, {"status": 507}])
def test_recorded_where_the_service_cannot_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: dict[str, Any]
) -> None:
    run = write_run(tmp_path / "run")
    with Service(**trouble) as service:
        for name, value in (service.environment | {"WANDB_INIT_TIMEOUT": "3"}).items():
            monkeypatch.setenv(name, value)
        with begin_start(run, 1, 0, mode="online") as metrics:
            for step in range(1, 4):
                metrics.record(record(step))
            wait_until(lambda: wandb_files(run, RUN_ID))
            metrics.record(record(4))
    (logged,) = [event["note"] for event in read_events(run / "events.jsonl") if event["event"] == "tracking"]
    assert "cannot be reached" in logged
    assert f"`wandb sync {run / 'wandb' / 'offline-run-*'}`" in logged
    assert [step for step, _ in offline_curve(run)] == [1, 2, 3, 4]
    wait_until(lambda: followers_of(run) == [])


@pytest.mark.slow  # 5 s
@pytest.mark.usefixtures("patience")
def test_request_to_end_that_reaches_everything(tmp_path: Path) -> None:
    """Slurm sends SIGTERM to all processes of a job; W&B's own one ends at once, with what it has not written."""
    run = write_run(tmp_path / "run")
    with pytest.raises(Interrupted), begin_start(run, 1, 0) as metrics:
        metrics.record(record(1))
        wait_until(lambda: wandb_files(run, RUN_ID))
        assert metrics.follower is not None
        follower = psutil.Process(metrics.follower.process.pid)
        for one in [*follower.children(recursive=True), follower]:
            with suppress(psutil.NoSuchProcess):
                one.terminate()
        metrics.record(record(2))
        wait_until(lambda: len(list(run.glob("wandb/offline-run-*"))) == 2)
        raise Interrupted
    assert [step for step, _ in offline_curve(run)] == [1, 2]
    assert [exit.exit_code for exit in kinds(run, "exit")] == [143]


def test_follower_that_dies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    with begin_start(run, 1, 0) as metrics:
        metrics.record(record(1))
        assert metrics.follower is not None
        metrics.follower.process.send_signal(signal.SIGKILL)
        wait_until(lambda: "follows the run has ended" in capsys.readouterr().out)
        metrics.record(record(2))
    assert len([event for event in read_events(run / "events.jsonl") if event["event"] == "tracking"]) == 1
    wait_until(lambda: followers_of(run) == [])


@pytest.mark.slow  # 4 s
def test_files_that_are_cut_short(tmp_path: Path) -> None:
    """Wherever a dying machine has cut W&B's file, what is before is read."""
    run = write_run(tmp_path / "run")
    with begin_start(run, 1, 0) as metrics:
        for step in range(1, 61):
            metrics.record(record(step) | {f"another metric {number}": float(number) for number in range(30)})
    (file,) = wandb_files(run, RUN_ID)
    whole = file.read_bytes()
    assert len(whole) > 2 * 32768
    assert [step for step, _ in history(file)] == list(range(1, 61))
    previous = 60
    for size in (len(whole) - 5, 70_000, 65_540, 65_536, 32_770, 32_768, 5_000, 8, 7, 3, 0):
        file.write_bytes(whole[:size])
        steps = [step for step, _ in history(file)]
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) <= previous
        previous = len(steps)
        end_at_last_record(file)
        if file.exists():
            assert [step for step, _ in history(file)] == steps
            assert whole.startswith(file.read_bytes())
        else:
            assert size <= FILE_HEADER_BYTES + 1
            assert not steps
    file.write_bytes(whole[:40_000] + b"\x00" * 1000)  # as some file systems leave it
    assert 0 < last_step([file]) < 60
    end_at_last_record(file)
    assert whole.startswith(file.read_bytes())
    file.write_bytes(whole)
    end_at_last_record(file)
    assert file.read_bytes() == whole
