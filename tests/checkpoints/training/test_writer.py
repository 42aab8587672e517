"""Saving checkpoints atomically, synchronously and in the background."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from helpers import REPOSITORY
from small_checkpoints import equal, files, save, tensors

from checkpoints.training import writer
from checkpoints.training.store import SINGLE_PROCESS, find_good_checkpoint, load_tensors, verify_checkpoint
from checkpoints.training.writer import CheckpointWriter
from kraken_train.common.errors import CheckpointError


def test_failed_write_keeps_the_previous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    before = {path: path.read_bytes() for path in files(tmp_path)}

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    for broken in ("write_synced", "file_sha256"):
        with monkeypatch.context() as patch:
            patch.setattr(writer, broken, full)
            with pytest.raises(CheckpointError, match=r"step 2 could not be written.*No space left.*step-00000001"):
                save(tmp_path, 2)
        assert {path: path.read_bytes() for path in files(tmp_path)} == before
    assert find_good_checkpoint(tmp_path)[0].step == 1


def test_parts_that_rank_0_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that is not shared, or whose view is out of date."""
    save(tmp_path, 1)

    def hidden(*arguments: Any) -> writer.WrittenPart:
        part = write_part(*arguments)
        next(arguments[1].glob("*.distcp")).unlink()
        return part

    def truncated(*arguments: Any) -> writer.WrittenPart:
        part = write_part(*arguments)
        os.truncate(next(arguments[1].glob("*.distcp")), 10)
        return part

    write_part = writer.write_part
    for broken, state in ((hidden, "missing"), (truncated, "different")):
        monkeypatch.setattr(writer, "write_part", broken)
        with pytest.raises(CheckpointError, match=f"written by another node, but on this one it is {state} in"):
            save(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]


class SlowWrite:
    """A replacement of `writer.write_tensors` that sets `started` and waits for `allowed` before it writes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started, self.allowed = threading.Event(), threading.Event()
        self.real = writer.write_tensors
        monkeypatch.setattr(writer, "write_tensors", self)

    def __call__(self, *arguments: Any) -> str | None:
        self.started.set()
        self.allowed.wait()
        return self.real(*arguments)


def test_background_save_equals_a_synchronous_one(tmp_path: Path) -> None:
    for name, asynchronous in (("now", False), ("later", True)):
        with CheckpointWriter(tmp_path / name, 2, SINGLE_PROCESS, asynchronous) as saves:
            for step in (1, 2, 3):
                saves.save(step, tensors(step), {"updates": step})
    now, later = ({path.name: path for path in files(tmp_path / name)} for name in ("now", "later"))
    assert now.keys() == later.keys()
    assert sorted(path.name for path in (tmp_path / "later").iterdir()) == ["latest", "step-00000002", "step-00000003"]
    for step in (2, 3):
        checkpoint = verify_checkpoint(tmp_path / "later" / f"step-{step:08d}")
        assert (checkpoint.step, checkpoint.metadata) == (step, {"updates": step})
        assert equal(load_tensors(checkpoint), tensors(step))


def test_background_save_does_not_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    slow = SlowWrite(monkeypatch)
    saves = CheckpointWriter(tmp_path, 3, SINGLE_PROCESS, asynchronous=True)
    saves.save(2, tensors(2), {})
    slow.started.wait()
    assert find_good_checkpoint(tmp_path)[0].step == 1, "step 2 is not complete yet"
    slow.allowed.set()
    saves.finish()
    saves.finish()
    assert find_good_checkpoint(tmp_path)[0].step == 2


def test_one_save_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowWrite(monkeypatch)
    saves = CheckpointWriter(tmp_path, 3, SINGLE_PROCESS, asynchronous=True)
    saves.save(1, tensors(1), {})
    assert saves.under_way is not None
    join = saves.under_way.join
    saves.under_way.join = lambda *arguments: (slow.allowed.set(), join(*arguments))[1]  # type: ignore[method-assign]
    saves.save(2, tensors(2), {})
    assert (tmp_path / "step-00000001").is_dir(), "the second save started before the first had ended"
    slow.allowed.set()
    saves.finish()
    assert find_good_checkpoint(tmp_path)[0].step == 2


def test_a_failed_background_save_raises_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    saves = CheckpointWriter(tmp_path, 3, SINGLE_PROCESS, asynchronous=True)
    expected = r"step 2 could not be written.*No space left.*step-00000001"

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    for raising_call in (lambda: saves.save(3, tensors(3), {}), saves.finish):
        with monkeypatch.context() as patch:
            patch.setattr(writer, "file_sha256", full)
            saves.save(2, tensors(2), {})
            assert saves.under_way is not None
            saves.under_way.join()
        with pytest.raises(CheckpointError, match=expected):
            raising_call()
        saves.finish()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]
    saves.save(3, tensors(3), {})
    saves.finish()
    assert find_good_checkpoint(tmp_path)[0].step == 3


def test_an_error_of_training_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(step: int) -> None:
        with CheckpointWriter(tmp_path, 3, SINGLE_PROCESS, asynchronous=True) as saves:
            saves.save(step, tensors(step), {})
            raise ArithmeticError("training has failed")

    with pytest.raises(ArithmeticError):
        train(1)
    assert find_good_checkpoint(tmp_path)[0].step == 1, "did not wait for the save in progress"
    assert not capsys.readouterr().err
    monkeypatch.setattr(writer, "write_tensors", lambda *arguments: "the disk is gone")
    with pytest.raises(ArithmeticError):
        train(2)
    assert "the checkpoint of step 2 could not be written" in capsys.readouterr().err


EXITS_DURING_A_SAVE = """
import sys, threading
from pathlib import Path
import torch
from checkpoints.training import store, writer
folder = Path(sys.argv[1])
saves = writer.CheckpointWriter(folder, 3, store.SINGLE_PROCESS, asynchronous=True)
saves.save(1, {"model.a": torch.ones(3)}, {})
saves.finish()
written, real = threading.Event(), writer.write_tensors
def stuck(*arguments):
    real(*arguments)
    written.set()
    threading.Event().wait()
writer.write_tensors = stuck
saves.save(2, {"model.a": torch.ones(3)}, {})
written.wait()
raise SystemExit(7)
"""


def test_a_save_that_hangs_does_not_delay_the_exit(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", EXITS_DURING_A_SAVE, str(tmp_path)]
    assert subprocess.run(command, env=environment, check=False).returncode == 7
    checkpoint, problems = find_good_checkpoint(tmp_path)
    assert (checkpoint.step, problems) == (1, [])
    assert (tmp_path / "latest").read_text() == "step-00000001\n"
    save(tmp_path, 3)
    assert not list(tmp_path.glob(".step-*")), "files of the interrupted save were not deleted"
