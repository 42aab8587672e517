"""Saving checkpoints atomically, synchronously and in the background."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import REPOSITORY
from small_checkpoints import equal, files, save, tensors

from checkpoints.training import writer
from checkpoints.training.background import CheckpointWriter
from checkpoints.training.retention import Retention
from checkpoints.training.store import SINGLE_PROCESS, find_good_checkpoint, verify_checkpoint
from checkpoints.training.stored_tensors import StoredTensors
from kraken_train.common.errors import CheckpointError
from kraken_train.parallel.ranks import Runtime


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
        with CheckpointWriter(tmp_path / name, Retention(2), SINGLE_PROCESS, asynchronous) as saves:
            for step in (1, 2, 3):
                saves.save(step, tensors(step), {"updates": step})
    now, later = ({path.name: path for path in files(tmp_path / name)} for name in ("now", "later"))
    assert now.keys() == later.keys()
    assert sorted(path.name for path in (tmp_path / "later").iterdir()) == ["latest", "step-00000002", "step-00000003"]
    for step in (2, 3):
        checkpoint = verify_checkpoint(tmp_path / "later" / f"step-{step:08d}")
        assert (checkpoint.step, checkpoint.metadata) == (step, {"updates": step})
        assert equal(StoredTensors(checkpoint).read(), tensors(step))


class FakeCuda:
    """Four GPUs of which this process has number 2: who is current in a thread, and which streams are waited for."""

    class Stream:
        def __init__(self, device: object) -> None:
            self.device, self.waits = torch.device("cuda", device) if isinstance(device, int) else device, 0

        def synchronize(self) -> None:
            self.waits += 1

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.threads = threading.local()
        self.default = [self.Stream(number) for number in range(4)]
        replaced = {
            "is_available": lambda: True,
            "device_count": lambda: 4,
            "set_device": self.set_device,
            "current_stream": lambda device=None: self.current(),
            "stream": self.stream,
            "Stream": self.Stream,
        }
        for name, function in replaced.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.delenv("DS_ACCELERATOR", raising=False)

    def set_device(self, device: torch.device) -> None:
        assert device.index is not None
        self.threads.device, self.threads.stream = device.index, None

    def current(self) -> FakeCuda.Stream:
        stream: FakeCuda.Stream | None = getattr(self.threads, "stream", None)
        return stream or self.default[getattr(self.threads, "device", 0)]

    @contextmanager
    def stream(self, stream: FakeCuda.Stream) -> Iterator[None]:
        before, self.threads.stream = getattr(self.threads, "stream", None), stream
        yield
        self.threads.stream = before


def test_background_save_waits_for_no_stream_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint library waits for the stream of its thread."""
    cuda = FakeCuda(monkeypatch)
    runtime = Runtime(rank=2, local_rank=2, world_size=1, local_world_size=4)
    cuda.set_device(runtime.device)
    streams = []
    real = writer.write_tensors

    def write_tensors(*arguments: Any) -> str | None:
        streams.append(cuda.current())
        return real(*arguments)

    monkeypatch.setattr(writer, "write_tensors", write_tensors)
    with CheckpointWriter(tmp_path, Retention(2), runtime, asynchronous=True) as saves:
        saves.save(1, tensors(1), {})
    assert [stream.device for stream in streams] == [torch.device("cuda", 2)]
    assert streams[0] not in cuda.default
    assert streams[0].waits > 0, "the checkpoint library waits for no stream any more"
    assert [stream.waits for stream in cuda.default] == [0, 0, 0, 0]
    assert cuda.current() is cuda.default[2], "the thread that trains has another stream now"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_background_save_beside_a_busy_gpu(tmp_path: Path) -> None:
    """The queue of the training is longer than the save, and is not waited for."""
    done = torch.cuda.Event()
    torch.cuda._sleep(20_000_000_000)  # cycles: 10 s or more
    done.record()
    with CheckpointWriter(tmp_path, Retention(2), SINGLE_PROCESS, asynchronous=True) as saves:
        saves.save(1, tensors(1), {})
    assert not done.query(), "the save has waited for the training"
    torch.cuda.synchronize()


def test_background_save_does_not_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    slow = SlowWrite(monkeypatch)
    saves = CheckpointWriter(tmp_path, Retention(3), SINGLE_PROCESS, asynchronous=True)
    saves.save(2, tensors(2), {})
    slow.started.wait()
    assert find_good_checkpoint(tmp_path)[0].step == 1, "step 2 is not complete yet"
    slow.allowed.set()
    saves.finish()
    saves.finish()
    assert find_good_checkpoint(tmp_path)[0].step == 2


def test_one_save_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowWrite(monkeypatch)
    saves = CheckpointWriter(tmp_path, Retention(3), SINGLE_PROCESS, asynchronous=True)
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
    saves = CheckpointWriter(tmp_path, Retention(3), SINGLE_PROCESS, asynchronous=True)
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
        with CheckpointWriter(tmp_path, Retention(3), SINGLE_PROCESS, asynchronous=True) as saves:
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
from checkpoints.training import background, store, writer
from checkpoints.training.retention import Retention
folder = Path(sys.argv[1])
saves = background.CheckpointWriter(folder, Retention(3), store.SINGLE_PROCESS, asynchronous=True)
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
