"""Opening the folder of a run: where it cannot be, on a full disk, and by two starts at once."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers import small_configs
from parity.common import settings

from kraken_train.common.errors import CheckpointError
from kraken_train.parallel.ranks import Runtime
from kraken_train.run import folder as folder_of_run
from kraken_train.run.folder import RunFolder, locked
from kraken_train.run.start import recorded, write_environment
from kraken_train.training import open_run
from kraken_train.training.metrics_logger import MetricsLogger

ALONE = Runtime(0, 0, 1, 1)
Open = Callable[..., RunFolder]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Opens a run folder until the end of the test, or of the stack that is given."""
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.model").write_bytes(b"t" * 10_000)
    (tokenizer / "kraken_tokenizer.json").write_text("{}")
    with ExitStack() as until_the_end:

        def open_folder(path: Path, held: ExitStack | None = None, **changes: Any) -> RunFolder:
            config = dataclasses.replace(settings(), run_dir=str(path), **changes)
            return open_run.open_run_folder(config, small_configs()["kraken"], tokenizer, ["f"], held or until_the_end)

        yield open_folder


def content(path: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_the_second_of_two_starts_is_refused(opened: Open, tmp_path: Path) -> None:
    path = tmp_path / "run"
    with ExitStack() as held:
        first = opened(path, held)
        before = content(path)
        with pytest.raises(CheckpointError) as refused:
            opened(path)
        assert f"run_dir={path} is being written by another process" in str(refused.value)
        assert f"process {os.getpid()} on {socket.gethostname()}" in str(refused.value)
        assert content(path) == before
    second = opened(path)
    assert (second.run_id, second.start_number) == (first.run_id, 2)


def test_a_start_that_has_waited_for_another_goes_by_what_that_has_made(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have found no run; one is through before the other gets the lock."""
    faster: list[RunFolder] = []

    @contextmanager
    def locked_late(path: Path) -> Iterator[None]:
        monkeypatch.setattr(open_run, "locked", locked)
        with ExitStack() as held:
            faster.append(opened(path, held))
        with locked(path):
            yield

    def open_late(path: Path, **changes: Any) -> RunFolder:
        monkeypatch.setattr(open_run, "locked", locked_late)
        return opened(path, **changes)

    run = open_late(tmp_path / "a")
    assert (run.run_id, run.start_number) == (faster[-1].run_id, 2)
    assert json.loads((run.path / "run.json").read_text())["id"] == run.run_id
    with pytest.raises(CheckpointError, match="holds a run with seed=0, not 1"):
        open_late(tmp_path / "b", seed=1)
    with pytest.raises(CheckpointError, match="resume=never would overwrite"):
        open_late(tmp_path / "c", resume="never")
    assert [folder.name for folder in (tmp_path / "c" / "starts").iterdir()] == ["0001"]


def test_places_that_are_no_run(opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, export, data, file, link = (tmp_path / name for name in ("run", "export", "data", "file", "link"))
    with ExitStack() as held:
        opened(run, held)
    for folder, names in ((export, ("config.json", "model.safetensors")), (data, ("manifest.json", "train.bin"))):
        folder.mkdir()
        for name in names:
            (folder / name).touch()
    file.touch()
    link.symlink_to("nowhere")
    for place, words in [
        (file, "is a file; name a folder"),
        (file / "run", "cannot be written: Not a directory; set run_dir to a folder"),
        (link, "cannot be written: File exists; a file, or a link to nothing, is where a folder must be"),
        (export, "is not empty and holds an export; use a new or empty folder"),
        (data, "is not empty and holds prepared data; use a new or empty folder"),
        (run / "tokenizer", f"is not empty and holds a part of the run in {run}; use a new or empty folder"),
        (run / "starts", f"is not empty and holds a part of the run in {run}; use a new or empty folder"),
    ]:
        before = content(tmp_path)
        with pytest.raises(CheckpointError) as refused:
            opened(place)
        assert str(refused.value) == f"run_dir={place} {words}"
        assert content(tmp_path) == before

    def deny(*arguments: Any, **keywords: Any) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(folder_of_run, "read_file", deny)
    with pytest.raises(CheckpointError) as refused:
        opened(run)
    assert str(refused.value) == (
        f"run_dir={run} cannot be read: Permission denied; set run_dir to a folder that this user can read and write"
    )


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    if os.geteuid() != 0 or subprocess.run(["mount", *options, str(folder)], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_file_system_that_cannot_be_written(opened: Open, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with ExitStack() as held:
        opened(disk / "run", held)
    with mounted(disk, "--bind", str(disk)):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(disk)], check=True)
        for run in (disk / "run", disk / "new"):
            with pytest.raises(CheckpointError, match="cannot be written: Read-only file system; set run_dir to"):
                opened(run)


def begin(opened: Open, path: Path) -> None:
    """What a start writes before its first step."""
    with ExitStack() as held:
        run = opened(path, held)
        held.enter_context(recorded(run.start, ALONE))
        write_environment(run.start, ALONE)
        with MetricsLogger(dataclasses.replace(settings(), run_dir=str(path)), run, 0, last_step=5):
            pass


def test_a_disk_that_is_full(opened: Open, tmp_path: Path) -> None:
    """With ever more room: one message, until it suffices."""
    disk = tmp_path / "disk"
    with mounted(disk, "-t", "tmpfs", "-o", "size=1m", "tmpfs"):
        fill = disk / "fill"
        fill.write_bytes(b"f" * (1 << 20))
        failures = 0
        while failures < 50:
            try:
                begin(opened, disk / "run")
                break
            except CheckpointError as error:
                failures += 1
                words = "cannot be written: No space left on device; free some space, or set run_dir to another disk"
                assert str(error).startswith((f"run_dir={disk}/run", f"{disk}/run"))
                assert str(error).endswith(words)
            shutil.rmtree(disk / "run")
            os.truncate(fill, fill.stat().st_size - 4096)
        assert 5 < failures < 50
        assert (disk / "run" / "tokenizer" / "tokenizer.model").stat().st_size == 10_000


def test_a_tokenizer_that_cannot_be_copied(opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    with monkeypatch.context() as full:
        full.setattr("shutil.copyfile", copy)
        with pytest.raises(CheckpointError) as refused, ExitStack() as held:
            opened(tmp_path / "run", held)
    assert str(refused.value) == (
        f"run_dir={tmp_path}/run cannot be written: No space left on device; free some space, or set run_dir to "
        "another disk"
    )
    assert opened(tmp_path / "run").start_number == 1  # with more room
