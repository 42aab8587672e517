"""A file of an export that is no longer what was written is noticed by what reads it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import small_configs, write_small_export

from checkpoints.exports.checksums import SUMS_FILE
from checkpoints.exports.folder import Export, read_export
from checkpoints.push import complete_export
from kraken_train.common.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path, tokenizer_dir: Path) -> Path:
    write_small_export(tmp_path / "export", small_configs(vocab_size=320)["kraken"], tokenizer_dir)
    return tmp_path / "export"


def flip(path: Path) -> None:
    """A bit of the last value."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def other_epsilon(path: Path) -> None:
    """A change with which it still describes the same tensors."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(settings | {"norm_epsilon": 1e-4}), encoding="utf-8")


def other_piece(path: Path) -> None:
    """A change with which the tokenizer is still read."""
    content = path.read_bytes()
    piece = "▁the".encode()
    assert piece in content
    path.write_bytes(content.replace(piece, "▁teh".encode()))


@pytest.mark.parametrize(
    ("name", "damage", "use"),
    [
        ("model.safetensors", flip, Export.load_model),
        ("config.json", other_epsilon, lambda export: None),
        ("tokenizer/tokenizer.model", other_piece, Export.load_tokenizer),
        ("modeling_kraken.py", flip, lambda export: complete_export(export.folder)),  # before it is uploaded
    ],
)
def test_a_changed_file(
    folder: Path, name: str, damage: Callable[[Path], None], use: Callable[[Export], object]
) -> None:
    use(read_export(folder))
    damage(folder / name)
    with pytest.raises(CheckpointError, match=rf"{name} is not the file that was written: .* remove {SUMS_FILE}"):
        use(read_export(folder))
    (folder / SUMS_FILE).unlink()  # it was changed on purpose, or it is an export of an earlier version
    use(read_export(folder))


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "tokenizer" / "pipe")
    with (folder / SUMS_FILE).open("a") as file:
        file.write(f"{'0' * 64}  tokenizer/pipe\n")
    with pytest.raises(CheckpointError, match=r"tokenizer/pipe cannot be read"):
        read_export(folder).load_tokenizer()


def test_sha256sum_checks_it(folder: Path) -> None:
    command = ["sha256sum", "--check", "--strict", "--quiet", SUMS_FILE]
    assert subprocess.run(command, cwd=folder, check=False).returncode == 0
    named = {line.split("  ")[1] for line in (folder / SUMS_FILE).read_text().splitlines()}
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert named == there - {SUMS_FILE}
    flip(folder / "model.safetensors")
    assert subprocess.run(command, cwd=folder, check=False, capture_output=True).returncode == 1


def test_what_users_and_evaluations_change(folder: Path) -> None:
    for name in ("README.md", "loss.png", "evaluation.json"):
        assert name not in (folder / SUMS_FILE).read_text()
        (folder / name).write_text("mine")
    complete_export(folder)


@pytest.mark.parametrize(
    "line", ["no hash  config.json", f"{'0' * 64}  ../secret", f"{'0' * 64}  /etc/passwd", f"{'0' * 64}  \0x", "0" * 64]
)
def test_a_damaged_list(folder: Path, line: str) -> None:
    with (folder / SUMS_FILE).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(CheckpointError, match=rf"{SUMS_FILE} is damaged: .* copy it again, or remove it"):
        read_export(folder)
