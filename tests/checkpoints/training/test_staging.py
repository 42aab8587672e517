"""Checkpoints by way of a local disk, in one process; two ranks are in test_store.py."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_forked
from helpers import REPOSITORY
from small_checkpoints import equal, files, save, tensors

from checkpoints.training import staging
from checkpoints.training.background import CheckpointWriter
from checkpoints.training.manifest import has_checkpoints
from checkpoints.training.retention import Retention
from checkpoints.training.staging import STAGED, open_stage, take_up_staged
from checkpoints.training.store import SINGLE_PROCESS, find_good_checkpoint
from checkpoints.training.stored_tensors import StoredTensors
from kraken_train.common.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # pytest resets the module's filter


class Folders:
    """The folder of a run's checkpoints, and a stage that stands for the disk of a node."""

    def __init__(self, parent: Path) -> None:
        self.checkpoints, self.stage = parent / "checkpoints", parent / "stage"
        open_stage(self.stage, 0, SINGLE_PROCESS)

    def writer(self, keep: int = 9, asynchronous: bool = False) -> CheckpointWriter:
        return CheckpointWriter(
            self.checkpoints, Retention(keep), SINGLE_PROCESS, asynchronous=asynchronous, stage=self.stage
        )

    def save_without_copy(self, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
        """As a start that is killed between the two."""
        with monkeypatch.context() as patch:
            patch.setattr("checkpoints.training.background.publish_staged", lambda *arguments: None)
            with self.writer() as saves:
                saves.save(step, tensors(step), {"updates": step})

    def steps(self) -> list[str]:
        return sorted(path.name for path in self.checkpoints.iterdir())


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_staged_checkpoint_is_that_of_a_direct_save(folders: Folders, tmp_path: Path, asynchronous: bool) -> None:
    """Its tensors byte for byte; nothing stays in the stage, and old checkpoints go."""
    direct = tmp_path / "direct"
    with folders.writer(keep=2, asynchronous=asynchronous) as saves:
        for step in (1, 2, 3):
            saves.save(step, tensors(step), {"updates": step})
            save(direct, step, keep=2)
    assert folders.steps() == ["latest", "step-00000002", "step-00000003"]
    assert not list(folders.stage.iterdir())
    there, here = files(direct), files(folders.checkpoints)
    assert [path.relative_to(direct) for path in there] == [path.relative_to(folders.checkpoints) for path in here]
    tensors_only = [pair for pair in zip(there, here, strict=True) if pair[0].suffix == ".distcp"]
    assert len(tensors_only) == 2
    for one, other in tensors_only:
        assert one.read_bytes() == other.read_bytes()
    checkpoint, problems = find_good_checkpoint(folders.checkpoints)
    assert (checkpoint.step, checkpoint.metadata, problems) == (3, {"updates": 3}, [])
    assert equal(StoredTensors(checkpoint).read(), tensors(3))


def test_training_goes_on_during_the_copy(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the save is synchronous: when `save` returns, all is on the local disk, and nothing in the run's."""
    allowed, real = threading.Event(), staging.copy_synced

    def slow(*arguments: Any) -> str:
        allowed.wait()
        return real(*arguments)

    monkeypatch.setattr(staging, "copy_synced", slow)
    with folders.writer() as saves:
        saves.save(1, tensors(1), {})
        staged = {path.name for path in files(folders.stage)}
        assert staged == {".metadata", "__0_0.distcp", "manifest.json"}
        assert not has_checkpoints(folders.checkpoints)
        allowed.set()
    assert has_checkpoints(folders.checkpoints)


def test_the_next_start_copies(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    with folders.writer() as saves:
        saves.save(1, tensors(1), {"updates": 1})
    folders.save_without_copy(monkeypatch, 2)
    assert find_good_checkpoint(folders.checkpoints)[0].step == 1
    line = take_up_staged(folders.checkpoints, SINGLE_PROCESS)
    assert line is not None
    assert line.startswith("copied the checkpoint of step 2")
    checkpoint, problems = find_good_checkpoint(folders.checkpoints)
    assert (checkpoint.step, checkpoint.metadata, problems) == (2, {"updates": 2}, [])
    assert equal(StoredTensors(checkpoint).read(), tensors(2))
    assert not list(folders.stage.iterdir())
    assert take_up_staged(folders.checkpoints, SINGLE_PROCESS) is None


DIES = """
import os, sys
from pathlib import Path
import torch
from checkpoints.training import background, staging, store, writer
from checkpoints.training.retention import Retention
folder, stage, module, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
saves = background.CheckpointWriter(folder, Retention(3), store.SINGLE_PROCESS, asynchronous=False, stage=stage)
saves.save(1, {"model.a": torch.ones(3)}, {})
saves.finish()
module = {"staging": staging, "writer": writer}[module]
setattr(module, name, lambda *arguments: os._exit(9))
saves.save(2, {"model.a": torch.full((3,), 2.0)}, {})
saves.finish()
"""


@pytest.mark.parametrize(
    ("module", "name", "step"),
    [
        ("staging", "write_manifest", 1),  # while it is staged
        ("staging", "write_record", 1),
        ("staging", "copy_synced", 2),  # while it is copied
        ("writer", "write_manifest", 2),
        ("writer", "replace_synced", 2),  # after the checkpoint has its name
    ],
)
def test_a_kill(folders: Folders, tmp_path: Path, module: str, name: str, step: int) -> None:
    """The run's folder has only complete checkpoints, and the next start continues from all that was staged."""
    script = tmp_path / "dies.py"
    script.write_text(DIES)
    program = [str(script), str(folders.checkpoints), str(folders.stage), module, name]
    assert run_forked([program], [{"PYTHONPATH": str(REPOSITORY)}])[0].returncode == 9
    visible, problems = find_good_checkpoint(folders.checkpoints)
    assert problems == []
    assert visible.step == (2 if name == "replace_synced" else 1)
    take_up_staged(folders.checkpoints, SINGLE_PROCESS)
    open_stage(folders.stage, 0, SINGLE_PROCESS)
    checkpoint, problems = find_good_checkpoint(folders.checkpoints)
    assert (checkpoint.step, problems) == (step, [])
    assert StoredTensors(checkpoint).read()["model.a"].tolist() == [float(step)] * 3
    assert not list(folders.stage.iterdir())
    assert not (folders.checkpoints / STAGED).exists()
    with folders.writer() as saves:
        saves.save(3, tensors(3), {})
    assert folders.steps() == ["latest", *(f"step-{each:08d}" for each in range(1, step + 1)), "step-00000003"]


def test_another_node(folders: Folders, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is passed over with a line that names the node, for good: the run goes another way from here on."""
    save(folders.checkpoints, 1)
    folders.save_without_copy(monkeypatch, 2)
    elsewhere = folders.stage.rename(tmp_path / "on the other node")
    line = take_up_staged(folders.checkpoints, SINGLE_PROCESS)
    assert line is not None
    assert all(part in line for part in ("step 2", str(folders.stage), "none of it is on", "it is passed over"))
    elsewhere.rename(folders.stage)
    assert take_up_staged(folders.checkpoints, SINGLE_PROCESS) is None
    assert find_good_checkpoint(folders.checkpoints)[0].step == 1


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_damaged_part_is_refused(folders: Folders, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    save(folders.checkpoints, 1)
    folders.save_without_copy(monkeypatch, 2)
    (path,) = folders.stage.glob(f"*/{name}")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    line = take_up_staged(folders.checkpoints, SINGLE_PROCESS)
    assert line is not None
    assert f"{path} is damaged: its SHA-256" in line
    assert folders.steps() == ["latest", "step-00000001"]


def test_damage_during_the_copy_ends_the_run(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "copy_synced", lambda source, target: "0" * 64)
    saves = folders.writer()
    saves.save(1, tensors(1), {})
    with pytest.raises(
        CheckpointError, match=r"step 1 could not be copied to .*distcp is damaged|\.metadata is damaged"
    ):
        saves.finish()
    assert not has_checkpoints(folders.checkpoints)


def test_full_disks(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full stage ends the save; a full run folder ends it later, and what is staged waits for the next start."""
    save(folders.checkpoints, 1)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(staging, "write_manifest", full)
        with pytest.raises(
            CheckpointError, match=r"written to .*stage: No space left.*step-00000001.*stage_dir to anoth"
        ):
            folders.writer().save(2, tensors(2), {})
    assert not list(folders.stage.iterdir())
    assert folders.steps() == ["latest", "step-00000001"]
    saves = folders.writer()
    with monkeypatch.context() as patch:
        patch.setattr(staging, "copy_synced", full)
        saves.save(2, tensors(2), {})
        with pytest.raises(CheckpointError, match=r"written to .*checkpoints: No space left.*step-00000001.*run_dir"):
            saves.finish()
        with pytest.raises(CheckpointError, match="No space left"):
            take_up_staged(folders.checkpoints, SINGLE_PROCESS)
    assert (take_up_staged(folders.checkpoints, SINGLE_PROCESS) or "").startswith("copied")
    assert equal(StoredTensors(find_good_checkpoint(folders.checkpoints)[0]).read(), tensors(2))


def test_open_stage(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"stage_dir: .*file/stage on .* cannot be written to: Not a directory"):
        open_stage(tmp_path / "file" / "stage", 0, SINGLE_PROCESS)
    with pytest.raises(
        CheckpointError, match=r"MiB free, but a checkpoint takes 1073741824 MiB there; free some space"
    ):
        open_stage(tmp_path / "stage", 2**50, SINGLE_PROCESS)


def test_the_tensors_are_freed_before_the_copy(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"model.a": torch.ones(3)}
    kept = weakref.ref(given["model.a"])
    alive, real = [], staging.copy_synced

    def copy(*arguments: Any) -> str:
        alive.append(kept() is not None)
        return real(*arguments)

    monkeypatch.setattr(staging, "copy_synced", copy)
    with folders.writer(asynchronous=True) as saves:
        saves.save(1, given, {})
        del given
    assert alive
    assert not any(alive)
