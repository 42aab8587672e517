"""Reading and verifying checkpoints, by one process and by two ranks."""

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
from small_checkpoints import equal, files, save, tensors

from checkpoints.training import store, stored_tensors
from checkpoints.training.manifest import MANIFEST, Checkpoint, content_sha256
from checkpoints.training.retention import Retention
from checkpoints.training.store import (
    SINGLE_PROCESS,
    find_good_checkpoint,
    model_of,
    verify_checkpoint,
)
from checkpoints.training.stored_tensors import StoredTensors
from checkpoints.training.writer import save_checkpoint
from kraken_train.common.errors import CheckpointError
from kraken_train.common.settings import to_dict

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # pytest resets the module's filter


def flip_byte(path: Path, position: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_round_trip(tmp_path: Path) -> None:
    save(tmp_path, 5)
    checkpoint, problems = find_good_checkpoint(tmp_path)
    assert (checkpoint.step, checkpoint.metadata, problems) == (5, {"updates": 5}, [])
    assert equal(StoredTensors(checkpoint).read(), tensors(5))
    assert StoredTensors(checkpoint).read(["model.b"]).keys() == {"model.b"}
    with pytest.raises(CheckpointError, match=r"holds no tensor model\.c; it is a checkpoint of another model"):
        StoredTensors(checkpoint).read(["model.c"])


def test_retention_and_pointer(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["latest", "step-00000003", "step-00000004"]
    assert (tmp_path / "latest").read_text() == "step-00000004\n"


def test_no_checkpoint(tmp_path: Path) -> None:
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
            assert len(problems) == 1
            assert str(path) in problems[0]
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
    with pytest.raises(CheckpointError, match="format version 99, but this program reads versions up to 1"):
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
    StoredTensors(checkpoint).fill(given)
    for name, view in views.items():
        assert torch.equal(view, tensors(1)[name])
        assert given[name] is view
    for wrong, message in (
        ({"model.a": torch.zeros(3, 5, 4)}, "holds model.a of shape (3, 4, 5), not (3, 5, 4); it is a checkpoint of"),
        ({"model.a": torch.zeros(3, 4, 5), "model.c": torch.zeros(2)}, "holds no tensor model.c"),
    ):
        with pytest.raises(CheckpointError) as error:
            StoredTensors(checkpoint).fill(wrong)
        assert message in str(error.value)
        assert not any(tensor.any() for tensor in wrong.values()), "tensors were read before all checks"


def test_the_index_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start reads parameter by parameter; were the index read each time, that of a large model would take minutes."""
    save(tmp_path, 1)
    read: list[Path] = []
    real = stored_tensors.read_index
    monkeypatch.setattr(stored_tensors, "read_index", lambda path: (read.append(path), real(path))[1])
    checkpoint, _ = find_good_checkpoint(tmp_path)
    stored = StoredTensors(checkpoint)
    for name, expected in tensors(1).items():
        given = {name: torch.zeros_like(expected)}
        stored.fill(given)
        assert equal(given, {name: expected})
        assert equal(stored.read([name]), {name: expected})
    assert read == [checkpoint.path]


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
    assert len(problems) == 1
    assert problems[0].endswith(".distcp cannot be read: Permission denied")


# ---------------------------------------------------------------------------------------------------------------
# Two ranks, which hold one model replica together
# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of checkpoints, and the report of each rank; see store_ranks.py."""
    folder = tmp_path_factory.mktemp("ranks")
    save_checkpoint(folder / "one process", 7, store_ranks.unsharded_tensors(7), {}, Retention(1), SINGLE_PROCESS)
    launch_ranks(2, str(store_ranks.__file__), str(folder), "2")
    reports = json.loads((folder / "report.json").read_text())
    assert len(reports) == 2
    return folder / "ranks", reports


Ranks = tuple[Path, list[dict[str, Any]]]


def test_collectives_over_any_group(two_ranks: Ranks) -> None:
    for report in two_ranks[1]:
        assert report["collectives"] == {
            "gather": [["rank 0", "rank 1"]] * 2,
            "sum": [[2.0, 1.0]] * 2,
            "all_true": [False, False],
            "on_first": [0, 0],
        }


def test_one_process_reads_what_ranks_saved(two_ranks: Ranks) -> None:
    folder, reports = two_ranks
    assert reports[0]["save"]["keys"] != reports[1]["save"]["keys"], "the ranks should have different tensors"
    for step in (1, 2, 3):
        checkpoint = verify_checkpoint(folder / f"step-{step:08d}")
        assert checkpoint.metadata == {"tokens": step}
        assert equal(StoredTensors(checkpoint).read(), store_ranks.unsharded_tensors(step))
        assert checkpoint.files.keys() == {".metadata", "__0_0.distcp", "__1_0.distcp"}
        for name, entry in checkpoint.files.items():
            assert entry["bytes"] == (checkpoint.path / name).stat().st_size
    shares = [(folder / "step-00000001" / f"__{rank}_0.distcp").stat().st_size for rank in (0, 1)]
    assert max(shares) < 2 * min(shares), "one rank wrote most of it"
    assert [report["save"]["hashed"] for report in reports] == [["__0_0.distcp", ".metadata"], ["__1_0.distcp"]]


def test_ranks_save_in_the_background(two_ranks: Ranks) -> None:
    for report in two_ranks[1]:
        saved = report["save"]
        assert saved["in_progress"], "training waited for the save"
        assert saved["sums_right"]
        assert saved["after_start"] == ["step-00000001"]
        assert saved["after_finish"] == ["step-00000001", "step-00000002"]
        assert saved["after_error"] == ["step-00000001", "step-00000002", "step-00000003"]


def test_ranks_save_by_way_of_a_local_disk(two_ranks: Ranks) -> None:
    """Each rank copies files, also the other's, since both are on one node here."""
    folder, found = two_ranks[0].parent / "staged", [report["stage"] for report in two_ranks[1]]
    assert sorted(name for each in found for name in each.pop("copied")) == [
        "step-00000001.rank-00000/.metadata", "step-00000001.rank-00000/__0_0.distcp",
        "step-00000001.rank-00001/__1_0.distcp",
    ]  # fmt: skip
    assert found[0] == found[1]
    assert "MiB free, but a checkpoint takes 2199023255552 MiB there" in found[0]["small"]  # twice 2^60 bytes
    assert found[0]["before"] == ["step-00000001"]
    assert "__1_0.distcp of it is on no node of this start; it is passed over" in found[0]["without a node"]
    assert found[0]["with it"].startswith("copied the checkpoint of step 2")
    assert found[0]["full"].startswith("the checkpoint of step 3 could not be written to ")
    assert "local disk: File too large" in found[0]["full"]
    assert found[0]["staged"] == []
    for step in (1, 2):
        checkpoint = verify_checkpoint(folder / f"step-{step:08d}")
        assert checkpoint.metadata == {"tokens": step}
        assert equal(StoredTensors(checkpoint).read(), store_ranks.unsharded_tensors(step))


def test_a_failure_of_one_rank_fails_on_all(two_ranks: Ranks) -> None:
    reports = [report["fail"] for report in two_ranks[1]]
    assert reports[0] == reports[1]
    for case in ("write, asynchronous=False", "write, asynchronous=True", "hash"):
        assert reports[0][case].startswith("the checkpoint of step 4 could not be written to ")
        assert reports[0][case].count("step-00000003") == 1
    assert "File too large" in reports[0]["write, asynchronous=True"]
    assert "Input/output error" in reports[0]["hash"]
    assert reports[0]["started"] is None
    assert reports[0]["raised again"] is None
    assert reports[0]["files"] == ["latest", "step-00000001", "step-00000002", "step-00000003"]


def test_ranks_verify_together(two_ranks: Ranks) -> None:
    folder, reports = two_ranks
    found = [report["verify"] for report in reports]
    hashed = [share.pop("hashed") for share in found]
    assert all(hashed)
    assert sorted(hashed[0] + hashed[1]) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    assert found[0] == found[1]
    assert found[0]["undamaged"] == [3, {"tokens": 3}, []]
    newest = folder / "step-00000003"
    for name in (".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json"):
        step, _, problems = found[0][f"flipped {name}"]
        assert step == 2
        assert len(problems) == 1
        assert problems[0].startswith(f"{newest / name} is damaged")
    assert found[0]["unreadable on rank 1"].startswith(f"every checkpoint in {folder} is damaged: {newest}")
    assert found[0]["unreadable on rank 1"].count("cannot be read: Permission denied") == 3
    assert found[0]["none"].startswith("there is no checkpoint in")


@pytest.mark.parametrize("writer", ["ranks", "one process"])
def test_ranks_read_their_shards(two_ranks: Ranks, writer: str) -> None:
    for report in two_ranks[1]:
        filled = report[f"fill {writer}"]
        assert filled["equal"] == dict.fromkeys(store_ranks.unsharded_tensors(0), True)
        assert "holds model.a of shape (4, 8, 40), not (6, 8, 40); it is a checkpoint of" in filled["shape"]
        assert "holds no tensor model.c" in filled["name"]


def test_a_file_of_another_step(two_ranks: Ranks, tmp_path: Path) -> None:
    """An undamaged file of the right name and size, but of another step."""
    folder = shutil.copytree(two_ranks[0], tmp_path / "checkpoints")
    for rank in (0, 1):
        file = folder / "step-00000003" / f"__{rank}_0.distcp"
        intact = file.read_bytes()
        shutil.copy(folder / "step-00000002" / file.name, file)
        checkpoint, problems = find_good_checkpoint(folder)
        assert checkpoint.step == 2
        assert problems == [f"{file} is damaged: its SHA-256 is not that of the manifest"]
        file.write_bytes(intact)
    assert find_good_checkpoint(folder)[0].step == 3


def test_damage_to_all_but_the_oldest(two_ranks: Ranks, tmp_path: Path) -> None:
    folder = shutil.copytree(two_ranks[0], tmp_path / "checkpoints")
    flip_byte(folder / "step-00000003" / "__1_0.distcp")
    (folder / "step-00000002" / "__0_0.distcp").unlink()
    checkpoint, problems = find_good_checkpoint(folder)
    assert checkpoint.step == 1
    assert ["is damaged" in problems[0], problems[1].endswith("__0_0.distcp is missing")] == [True, True]


def test_a_layout_that_is_no_longer_read() -> None:
    def checkpoint(architecture: str) -> Checkpoint:
        model = to_dict(small_configs()[architecture])
        model = {name: value for name, value in model.items() if "kv_heads" not in name}  # as before they were added
        return Checkpoint(Path("step-00000004"), 4, {"model": model}, {})

    assert model_of(checkpoint("kraken")) == small_configs()["kraken"]
    with pytest.raises(CheckpointError, match="step-00000004 was written before grouped-query attention"):
        model_of(checkpoint("standard"))
