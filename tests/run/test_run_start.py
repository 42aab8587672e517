"""What a start leaves in the run folder: its output by rank, its errors by cause, and events that survive damage."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kraken_train.common.errors import CheckpointError, ConfigError, RankLostError
from kraken_train.common.files import try_lock
from kraken_train.health.shutdown import Interrupted
from kraken_train.parallel.ranks import Runtime
from kraken_train.run import folder as run_folder
from kraken_train.run.events import EventLog, read_events
from kraken_train.run.folder import locked
from kraken_train.run.layout import ERRORS, LOCK_FILE, LOGS
from kraken_train.run.rank_errors import read_errors
from kraken_train.run.start import Tee, recorded


@pytest.mark.parametrize("seconds", [0.2, 60.0])
def test_who_only_looks_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """`status` holds the lock of a run for a moment, which must not end a start; who holds it longer does."""
    lock, now = (tmp_path / LOCK_FILE).open("a"), 0.0
    assert try_lock(lock.fileno(), shared=True)

    def sleep(passing: float) -> None:
        nonlocal now
        now += passing
        if now >= seconds:
            lock.close()

    monkeypatch.setattr(run_folder, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    held = locked(tmp_path)
    if seconds < run_folder.LOCK_PATIENCE:
        with held:
            assert lock.closed
    else:
        with pytest.raises(CheckpointError, match="is being written by another process"), held:
            pass


@pytest.fixture
def start(tmp_path: Path) -> Path:
    return tmp_path / "starts" / "0001"


def fail(start: Path, rank: int, error: BaseException) -> None:
    with pytest.raises(type(error)), recorded(start, Runtime(rank, rank, 4, 4)):
        print("about to fail")
        raise error


def test_errors_by_cause(start: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fail(start, 2, RankLostError("another rank has ended"))
    fail(start, 0, ZeroDivisionError("division by zero"))
    fail(start, 1, ConfigError("optim.lr=-1 must be greater than 0"))
    fail(start, 3, Interrupted("SIGTERM"))  # no failure
    errors = read_errors(start)
    assert [(error.rank, error.follows, error.restart_helps) for error in errors] == [
        (0, False, True), (1, False, False), (2, True, True),
    ]  # fmt: skip
    assert errors[0].message == "ZeroDivisionError: division by zero"
    assert errors[0].traceback is not None
    assert "in fail" in errors[0].traceback
    assert errors[1].traceback is None
    (start / ERRORS / "rank-0007.json").write_text('{"time": "2026')  # its rank was killed while it wrote
    assert len(read_errors(start)) == 3
    assert capsys.readouterr().out == "about to fail\n" * 4
    for rank in range(4):
        (line,) = (start / LOGS / f"rank-{rank:04d}.log").read_text().splitlines()
        time, _, text = line.partition(" ")
        assert text == "about to fail"
        assert time.startswith("20")
        assert time.endswith("+00:00")


def test_output_is_as_before(start: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stdout, stderr = sys.stdout, sys.stderr
    with recorded(start, Runtime(0, 0, 1, 1)):
        print("half a ", end="")
        print("\x1b[1mbold\x1b[0m", file=sys.stderr)
        print("line\n")
        for percent in (1, 50, 99):
            print(f"\r\x1b[2Kprogress {percent}%", end="")
        print("\rdone")
    assert (sys.stdout, sys.stderr) == (stdout, stderr)
    logged = [line.split(" ", 1)[1] for line in (start / LOGS / "rank-0000.log").read_text().splitlines()]
    assert logged == ["bold", "half a line", "done"]
    assert capsys.readouterr().out.startswith("half a line\n\n\r\x1b[2Kprogress 1%")


def test_a_log_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / LOGS).touch()
    with (
        pytest.raises(CheckpointError, match=r"rank-0000\.log cannot be written: File exists"),
        recorded(tmp_path, Runtime(0, 0, 1, 1)),
    ):
        pass


def test_a_log_that_cannot_be_written_stops_nothing() -> None:
    log, stream = io.StringIO(), io.StringIO()
    log.close()
    print("still here", file=Tee(stream, log))  # type: ignore[type-var]
    assert stream.getvalue() == "still here\n"


def test_events(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert read_events(tmp_path / "events.jsonl") == []
    log = EventLog(tmp_path / "events.jsonl")
    log.write("saved", step=4)
    with log.path.open("ab") as file:
        file.write(b'{"event": "sav\n\xff\n[1]\n{"event": "no time"}\n')
    log.write("ended", outcome="finished")
    assert [(event["event"], event.get("step")) for event in read_events(log.path)] == [("saved", 4), ("ended", None)]
    assert json.loads(log.path.read_bytes().splitlines()[0])["time"].endswith("+00:00")
    nowhere = EventLog(tmp_path / "missing" / "events.jsonl")
    nowhere.write("saved", step=1)
    nowhere.write("saved", step=2)
    assert capsys.readouterr().err.count("cannot be written") == 1
