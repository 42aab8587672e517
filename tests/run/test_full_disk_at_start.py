"""A disk that is full when a folder is copied: one message with the folder and the reason."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest
from helpers import small_configs, write_small_export

from kraken_train.common.cli import user_errors
from kraken_train.common.errors import CheckpointError
from kraken_train.common.files import copy_folder


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path, **_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source), None, str(target))

    monkeypatch.setattr(shutil, "copyfile", refuse)


def test_an_export(full: None, tmp_path: Path, tokenizer_dir: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        write_small_export(tmp_path / "e", small_configs(vocab_size=320)["kraken"], tokenizer_dir)
    assert str(caught.value) == f"output_dir={tmp_path}/e could not be written: No space left on device"
    assert os.listdir(tmp_path) == []


def test_other_commands_name_what_could_not_be_written(
    full: None, tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit), user_errors(tmp_path):
        copy_folder(tokenizer_dir, tmp_path / "copy")
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/copy/")
    assert error.endswith(": No space left on device\n")


def test_a_folder_is_copied_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_bytes(b"content")
    copy_folder(tmp_path / "a", tmp_path / "new" / "a")
    assert (tmp_path / "new" / "a" / "b" / "c").read_bytes() == b"content"
    with pytest.raises(FileExistsError):
        copy_folder(tmp_path / "a", tmp_path / "new" / "a")
