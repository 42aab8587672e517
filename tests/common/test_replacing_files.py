"""Files that are replaced as a whole, also by two processes at once."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from kraken_train.common.files import open_temporary, replace_synced


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    """The second begins and ends while the first one writes; each text is whole, and the last one remains."""
    path = tmp_path / "results.json"
    with open_temporary(path) as first:
        first.write("the first")
        first.flush()
        replace_synced(path, "the second, which is longer")
        assert path.read_text() == "the second, which is longer"
        os.replace(first.name, path)
    assert path.read_text() == "the first"
    assert os.listdir(tmp_path) == [path.name]


def test_a_writer_that_was_late_for_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has opened the temporary file, which then gets its final name: it must not empty that one."""
    path = tmp_path / "results.json"

    def lock_late(descriptor: int) -> bool:
        monkeypatch.undo()
        replace_synced(path, "the first")
        return True

    monkeypatch.setattr("kraken_train.common.files.try_lock", lock_late)
    with open_temporary(path) as second:
        assert path.read_text() == "the first"
        second.write("the second")
        os.replace(second.name, path)
    assert path.read_text() == "the second"
    assert os.listdir(tmp_path) == [path.name]


def test_what_a_killed_writer_has_left_is_used_again(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with open_temporary(path) as killed:
        killed.write("a long text that never got its name")
    assert len(os.listdir(tmp_path)) == 1
    replace_synced(path, "short")
    assert path.read_text() == "short"
    assert os.listdir(tmp_path) == [path.name]


def test_a_failure_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    replace_synced(path, "old")

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        replace_synced(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == [path.name]
