"""Checkpoints on disk: complete or absent, verified, and never a worse state than before."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import store_ranks
import torch
from helpers import launch_ranks, small_configs

from checkpoints.training import store
from checkpoints.training.manifest import MANIFEST, POINTER, Checkpoint, content_sha256
from checkpoints.training.store import (
    ALONE,
    fill_tensors,
    find_good_checkpoint,
    load_tensors,
    model_of,
    verify_checkpoint,
)
from checkpoints.training.writer import save_checkpoint
from kraken_train.common.errors import CheckpointError
from kraken_train.common.settings import to_dict

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # pytest drops the module's filter


def tensors(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model.a": torch.randn(3, 4, 5, generator=generator),
        "model.b": torch.randn(7, generator=generator),
        "optimizer.exp_avg.a": torch.randn(3, 4, 5, generator=generator),
    }


def save(folder: Path, step: int, keep: int = 3) -> None:
    save_checkpoint(folder, step, tensors(step), {"updates": step}, keep, ALONE)


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def flip_byte(path: Path, position: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != POINTER)


def test_round_trip(tmp_path: Path) -> None:
    save(tmp_path, 5)
    checkpoint, problems = find_good_checkpoint(tmp_path)
    assert (checkpoint.step, checkpoint.metadata, problems) == (5, {"updates": 5}, [])
    assert same(load_tensors(checkpoint), tensors(5))
    assert load_tensors(checkpoint, ["model.b"]).keys() == {"model.b"}
    with pytest.raises(CheckpointError, match=r"holds no tensor model\.c; it is the checkpoint of another model"):
        load_tensors(checkpoint, ["model.c"])


def test_retention_and_pointer(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["latest", "step-00000003", "step-00000004"]
    assert (tmp_path / "latest").read_text() == "step-00000004\n"


def test_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        find_good_checkpoint(tmp_path / "nowhere")


def test_any_flipped_byte_falls_back(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    newest = files(tmp_path / "step-00000002")
    assert {path.name for path in newest} >= {".metadata", "manifest.json"}
    for path in newest:
        intact = path.read_bytes()
        for position in (0, len(intact) // 2, len(intact) - 1):
            damaged = bytearray(intact)
            damaged[position] ^= 1
            path.write_bytes(damaged)
            checkpoint, problems = find_good_checkpoint(tmp_path)
            assert checkpoint.step == 1, (path, position)
            assert len(problems) == 1 and str(path) in problems[0]
        path.write_bytes(intact)
    assert find_good_checkpoint(tmp_path)[0].step == 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: os.truncate(path, 10), "has 10 bytes instead of"),
    ],
)
def test_missing_and_truncated_files(tmp_path: Path, damage: object, message: str) -> None:
    save(tmp_path, 1)
    data = next(path for path in files(tmp_path) if path.suffix == ".distcp")
    damage(data)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message):
        find_good_checkpoint(tmp_path)


def test_newer_format(tmp_path: Path) -> None:
    save(tmp_path, 1)
    manifest = tmp_path / "step-00000001" / MANIFEST
    content = json.loads(manifest.read_text())["content"] | {"format_version": 99}
    manifest.write_text(json.dumps({"content": content, "sha256": content_sha256(content)}))
    with pytest.raises(CheckpointError, match="format version 99, this program reads up to 1"):
        find_good_checkpoint(tmp_path)


def test_pointer_is_not_needed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "latest").unlink()
    assert find_good_checkpoint(tmp_path)[0].step == 1


def test_fill_in_place(tmp_path: Path) -> None:
    save(tmp_path, 1)
    checkpoint, _ = find_good_checkpoint(tmp_path)
    given = {name: torch.zeros_like(tensor) for name, tensor in tensors(1).items() if name != "model.b"}
    views = dict(given)
    fill_tensors(checkpoint, given)
    for name, view in views.items():
        assert torch.equal(view, tensors(1)[name]) and given[name] is view
    for wrong, words in (
        ({"model.a": torch.zeros(3, 5, 4)}, "holds model.a of shape (3, 4, 5), not (3, 5, 4); it is the checkpoint of"),
        ({"model.a": torch.zeros(3, 4, 5), "model.c": torch.zeros(2)}, "holds no tensor model.c"),
    ):
        with pytest.raises(CheckpointError) as error:
            fill_tensors(checkpoint, wrong)
        assert words in str(error.value)
        assert not any(tensor.any() for tensor in wrong.values()), "something was read before the mistake was found"


def test_unreadable_file_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    real = store.file_sha256

    def refused(path: Path) -> str:
        if "step-00000002" in str(path) and path.suffix == ".distcp":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(store, "file_sha256", refused)
    checkpoint, problems = find_good_checkpoint(tmp_path)
    assert checkpoint.step == 1
    assert len(problems) == 1 and problems[0].endswith(".distcp cannot be read: Permission denied")


# ---------------------------------------------------------------------------------------------------------------
# Over two ranks, which hold one model copy together
# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder and what each rank has reported; see store_ranks.py."""
    folder = tmp_path_factory.mktemp("ranks")
    save_checkpoint(folder / "alone", 7, store_ranks.whole_tensors(7), {}, 1, ALONE)
    launch_ranks(2, str(store_ranks.__file__), str(folder), "2")
    reports = json.loads((folder / "report.json").read_text())
    assert len(reports) == 2
    return folder / "ranks", reports


Ranks = tuple[Path, list[dict[str, Any]]]


def test_ranks_agree_over_any_group(two_ranks: Ranks) -> None:
    for report in two_ranks[1]:
        assert report["agree"] == {
            "gather": [["rank 0", "rank 1"]] * 2,
            "sum": [[2.0, 1.0]] * 2,
            "all_true": [False, False],
            "on_first": [0, 0],
        }


def test_ranks_save_what_one_process_reads(two_ranks: Ranks) -> None:
    folder, reports = two_ranks
    assert reports[0]["save"]["keys"] != reports[1]["save"]["keys"], "the ranks should hold different tensors"
    for step in (1, 2, 3):
        checkpoint = verify_checkpoint(folder / f"step-{step:08d}")
        assert checkpoint.metadata == {"tokens": step}
        assert same(load_tensors(checkpoint), store_ranks.whole_tensors(step))
        assert checkpoint.files.keys() == {".metadata", "__0_0.distcp", "__1_0.distcp"}
        for name, entry in checkpoint.files.items():
            assert entry["bytes"] == (checkpoint.path / name).stat().st_size
    shares = [(folder / "step-00000001" / f"__{rank}_0.distcp").stat().st_size for rank in (0, 1)]
    assert max(shares) < 2 * min(shares), "one rank has written most of it"
    assert [report["save"]["hashed"] for report in reports] == [["__0_0.distcp", ".metadata"], ["__1_0.distcp"]]


def test_ranks_save_in_the_background(two_ranks: Ranks) -> None:
    for report in two_ranks[1]:
        saved = report["save"]
        assert saved["under_way"], "the training steps waited for the save"
        assert saved["sums_right"]
        assert saved["at_once"] == ["step-00000001"]
        assert saved["after_finish"] == ["step-00000001", "step-00000002"]
        assert saved["after_error"] == ["step-00000001", "step-00000002", "step-00000003"]


def test_a_rank_that_cannot_write_fails_all(two_ranks: Ranks) -> None:
    reports = [report["fail"] for report in two_ranks[1]]
    assert reports[0] == reports[1]
    for way in ("write, asynchronous=False", "write, asynchronous=True", "hash"):
        assert reports[0][way].startswith("the checkpoint of step 4 could not be written to ")
        assert reports[0][way].count("step-00000003") == 1
    assert "File too large" in reports[0]["write, asynchronous=True"]
    assert "Input/output error" in reports[0]["hash"]
    assert reports[0]["started"] is None and reports[0]["told twice"] is None
    assert reports[0]["left"] == ["latest", "step-00000001", "step-00000002", "step-00000003"]


def test_ranks_verify_together(two_ranks: Ranks) -> None:
    folder, reports = two_ranks
    found = [report["verify"] for report in reports]
    hashed = [share.pop("hashed") for share in found]
    assert all(hashed) and sorted(hashed[0] + hashed[1]) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    assert found[0] == found[1]
    assert found[0]["whole"] == [3, {"tokens": 3}, []]
    newest = folder / "step-00000003"
    for name in (".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json"):
        step, _, problems = found[0][f"flipped {name}"]
        assert step == 2
        assert len(problems) == 1 and problems[0].startswith(f"{newest / name} is damaged")
    assert found[0]["unreadable on rank 1"].startswith(f"no checkpoint in {folder} is whole: {newest}")
    assert found[0]["unreadable on rank 1"].count("cannot be read: Permission denied") == 3
    assert found[0]["none"].startswith("there is no checkpoint in")


@pytest.mark.parametrize("writer", ["ranks", "alone"])
def test_ranks_read_their_slices(two_ranks: Ranks, writer: str) -> None:
    for report in two_ranks[1]:
        filled = report[f"fill {writer}"]
        assert filled["right"] == dict.fromkeys(store_ranks.whole_tensors(0), True)
        assert "holds model.a of shape (4, 8, 40), not (6, 8, 40); it is the checkpoint of" in filled["shape"]
        assert "holds no tensor model.c" in filled["name"]


def test_a_file_of_another_step(two_ranks: Ranks, tmp_path: Path) -> None:
    """A whole file of the right name and size, but from another moment."""
    folder = shutil.copytree(two_ranks[0], tmp_path / "checkpoints")
    for rank in (0, 1):
        file = folder / "step-00000003" / f"__{rank}_0.distcp"
        intact = file.read_bytes()
        shutil.copy(folder / "step-00000002" / file.name, file)
        checkpoint, problems = find_good_checkpoint(folder)
        assert checkpoint.step == 2
        assert problems == [f"{file} is damaged: its SHA-256 is not the manifest's"]
        file.write_bytes(intact)
    assert find_good_checkpoint(folder)[0].step == 3


def test_damage_to_all_but_the_oldest(two_ranks: Ranks, tmp_path: Path) -> None:
    folder = shutil.copytree(two_ranks[0], tmp_path / "checkpoints")
    flip_byte(folder / "step-00000003" / "__1_0.distcp")
    (folder / "step-00000002" / "__0_0.distcp").unlink()
    checkpoint, problems = find_good_checkpoint(folder)
    assert checkpoint.step == 1
    assert ["is damaged" in problems[0], problems[1].endswith("__0_0.distcp is missing")] == [True, True]


def test_the_layout_of_an_older_program() -> None:
    def checkpoint(architecture: str) -> Checkpoint:
        model = to_dict(small_configs()[architecture])
        model = {name: value for name, value in model.items() if "kv_heads" not in name}  # which it did not know
        return Checkpoint(Path("step-00000004"), 4, {"model": model}, {})

    assert model_of(checkpoint("kraken")) == small_configs()["kraken"]
    with pytest.raises(CheckpointError, match="step-00000004 is of a program from before grouped-query attention"):
        model_of(checkpoint("standard"))
