"""Runs on several ranks: saves, verifies and reads checkpoints, and writes the results as JSON.

Usage: store_ranks.py FOLDER SUB_LAYER_PARALLEL_SIZE. `FOLDER/one process` holds a checkpoint of the same tensors that
one process wrote. Rank 0 writes FOLDER/report.json with one entry per rank.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from checkpoints.training import background, staging, store, writer
from checkpoints.training.background import CheckpointWriter
from checkpoints.training.manifest import step_folders
from checkpoints.training.retention import Retention
from checkpoints.training.staging import open_stage
from checkpoints.training.store import find_good_checkpoint
from checkpoints.training.stored_tensors import StoredTensors
from kraken_train.common.errors import CheckpointError
from kraken_train.common.files import file_sha256
from kraken_train.parallel.ranks import Runtime, read_runtime

AXES = {
    "model.a": 0,
    "model.b": 1,
    "optimizer.exp_avg.a": 0,
    "optimizer.exp_avg.b": 1,
}  # the sharded dimension
WRITE_TENSORS, COPY_SYNCED = writer.write_tensors, staging.copy_synced
PLAIN = ("model.norm", "optimizer.exp_avg.norm")


def unsharded_tensors(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    shapes = dict.fromkeys(AXES, (4, 8, 40)) | dict.fromkeys(PLAIN, (7,))
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def local_shard(whole: torch.Tensor, axis: int, mesh: DeviceMesh) -> torch.Tensor:
    return whole.chunk(mesh.size(), axis)[mesh.get_local_rank()].contiguous()


def tensors_of_rank(step: int, runtime: Runtime, mesh: DeviceMesh) -> dict[str, torch.Tensor]:
    """The tensors that this rank saves: a sharded tensor is on one model replica, a plain one on one rank."""
    size = mesh.size()
    copies = runtime.world_size // size
    kept: dict[str, torch.Tensor] = {}
    for index, (name, whole) in enumerate(unsharded_tensors(step).items()):
        if name in AXES and index % copies == runtime.rank // size:
            local = local_shard(whole, AXES[name], mesh)
            kept[name] = DTensor.from_local(local, mesh, [Shard(AXES[name])], run_check=False)
        elif name in PLAIN and index % runtime.world_size == runtime.rank:
            kept[name] = whole
    return kept


def message(function: Any, *arguments: Any) -> str | None:
    try:
        function(*arguments)
    except CheckpointError as error:
        return str(error)
    return None


@contextmanager
def recorded_hashes() -> Iterator[list[str]]:
    """The names of the files that this rank hashes in the context."""
    names: list[str] = []

    def recorded(path: Path) -> str:
        names.append(path.name)
        return file_sha256(path)

    with mock.patch.object(store, "file_sha256", recorded), mock.patch.object(writer, "file_sha256", recorded):
        yield names


def collectives(runtime: Runtime) -> dict[str, Any]:
    """Results of collectives over the default group and over a second one."""
    other = dataclasses.replace(runtime, group=dist.new_group(backend="gloo"))
    return {
        "gather": [channel.gather(f"rank {channel.rank}") for channel in (runtime, other)],
        "sum": [channel.sum([1.0, float(channel.rank)]) for channel in (runtime, other)],
        "all_true": [channel.all_true(channel.rank == 0) for channel in (runtime, other)],
        "on_first": [channel.on_first(lambda: runtime.rank) for channel in (runtime, other)],
    }


def save(folder: Path, runtime: Runtime, mesh: DeviceMesh) -> dict[str, Any]:
    """Save step 1 synchronously, step 2 in the background during collectives, step 3 with an error after it."""
    with recorded_hashes() as hashed:
        CheckpointWriter(folder, Retention(9), runtime, asynchronous=False).save(
            1, tensors_of_rank(1, runtime, mesh), {"tokens": 1}
        )
    allowed = threading.Event()

    def slow_write(*arguments: Any) -> str | None:
        allowed.wait()
        return WRITE_TENSORS(*arguments)

    with (
        CheckpointWriter(folder, Retention(9), runtime, asynchronous=True) as saves,
        mock.patch.object(writer, "write_tensors", slow_write),
    ):
        saves.save(2, tensors_of_rank(2, runtime, mesh), {"tokens": 2})
        after_start = [path.name for path in step_folders(folder)]
        sums = [runtime.sum([float(index)])[0] for index in range(100)]
        in_progress = saves.under_way is not None and saves.under_way.is_alive()
        allowed.set()
        saves.finish()
        saves.finish()
        after_finish = [path.name for path in step_folders(folder)]
    try:
        with CheckpointWriter(folder, Retention(9), runtime, asynchronous=True) as saves:
            saves.save(3, tensors_of_rank(3, runtime, mesh), {"tokens": 3})
            raise ArithmeticError("training has failed")
    except ArithmeticError:
        after_error = [path.name for path in step_folders(folder)]
    return {
        "keys": sorted(tensors_of_rank(1, runtime, mesh)),
        "hashed": hashed,
        "after_start": after_start,
        "in_progress": in_progress,
        "sums_right": sums == [index * runtime.world_size for index in range(100)],
        "after_finish": after_finish,
        "after_error": after_error,
    }


def fail_to_save(folder: Path, runtime: Runtime, mesh: DeviceMesh) -> dict[str, Any]:
    """Save while the last rank cannot write its part, or cannot read it to hash it."""
    last = runtime.rank == runtime.world_size - 1
    found: dict[str, Any] = {}
    for asynchronous in (False, True):
        saves = CheckpointWriter(folder, Retention(9), runtime, asynchronous)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if last:
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
        started = message(saves.save, 4, tensors_of_rank(4, runtime, mesh), {})
        raised = message(saves.finish) or started
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        found[f"write, asynchronous={asynchronous}"] = raised
        if asynchronous:
            found["started"], found["raised again"] = started, message(saves.finish)
    unreadable = mock.patch.object(writer, "file_sha256", side_effect=OSError(errno.EIO, "Input/output error"))
    if last:
        unreadable.start()
    found["hash"] = message(saves.save, 4, tensors_of_rank(4, runtime, mesh), {}) or message(saves.finish)
    if last:
        unreadable.stop()
    found["files"] = sorted(path.name for path in folder.iterdir())
    return found


def stage(folder: Path, local: Path, runtime: Runtime, mesh: DeviceMesh) -> dict[str, Any]:
    """Save by way of a local disk: step 1 whole, 2 as if killed before the copy, 3 with a full disk on a rank."""
    open_stage(local, 10, runtime)
    found: dict[str, Any] = {"small": message(open_stage, local, 2**60, runtime)}
    parts = []

    def copied(source: Path, target: Path) -> str:
        parts.append(f"{source.parent.name}/{source.name}")
        return COPY_SYNCED(source, target)

    with CheckpointWriter(folder, Retention(9), runtime, asynchronous=False, stage=local) as saves:
        with mock.patch.object(staging, "copy_synced", copied):
            saves.save(1, tensors_of_rank(1, runtime, mesh), {"tokens": 1})
            saves.finish()
        found["copied"] = parts
        with mock.patch.object(background, "publish_staged", return_value=None):
            saves.save(2, tensors_of_rank(2, runtime, mesh), {"tokens": 2})
            saves.finish()
        dist.barrier()
        found["before"] = [path.name for path in step_folders(folder)]
        lost = local / "step-00000002.rank-00001"
        if runtime.is_first:
            lost.rename(local / "lost")
            (folder / "kept.json").write_bytes((folder / staging.STAGED).read_bytes())
        dist.barrier()
        found["without a node"] = staging.take_up_staged(folder, runtime)
        dist.barrier()
        if runtime.is_first:
            (local / "lost").rename(lost)
            (folder / "kept.json").rename(folder / staging.STAGED)
        dist.barrier()
        found["with it"] = staging.take_up_staged(folder, runtime)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if runtime.rank == runtime.world_size - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
        found["full"] = message(saves.save, 3, tensors_of_rank(3, runtime, mesh), {})
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    dist.barrier()
    found["staged"] = sorted(path.name for path in local.iterdir())
    return found


def verify(folder: Path, runtime: Runtime) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def find() -> list[Any]:
        checkpoint, problems = find_good_checkpoint(folder, runtime)
        return [checkpoint.step, checkpoint.metadata, problems]

    with recorded_hashes() as found["hashed"]:
        found["undamaged"] = find()

    newest = step_folders(folder)[-1]
    for path in sorted(newest.iterdir()):
        intact = path.read_bytes()
        dist.barrier()
        if runtime.is_first:
            path.write_bytes(bytes([intact[0] ^ 1]) + intact[1:])
        dist.barrier()
        found[f"flipped {path.name}"] = find()
        dist.barrier()
        if runtime.is_first:
            path.write_bytes(intact)
        dist.barrier()

    refuse = PermissionError(errno.EACCES, "Permission denied")
    with mock.patch.object(store, "file_sha256", side_effect=refuse if runtime.rank == 1 else file_sha256):
        found["unreadable on rank 1"] = message(find)
    found["none"] = message(find_good_checkpoint, folder / "nowhere", runtime)
    return found


def fill(checkpoint: store.Checkpoint, runtime: Runtime, mesh: DeviceMesh) -> dict[str, Any]:
    """Read this rank's shards of all tensors, whichever ranks wrote them."""
    expected = unsharded_tensors(checkpoint.step)
    given: dict[str, torch.Tensor] = {}
    local: dict[str, torch.Tensor] = {}
    for name, whole in expected.items():
        if name in AXES:
            local[name] = torch.zeros_like(local_shard(whole, AXES[name], mesh))
            given[name] = DTensor.from_local(local[name], mesh, [Shard(AXES[name])], run_check=False)
        else:
            given[name] = local[name] = torch.zeros_like(whole)
    stored = StoredTensors(checkpoint)
    stored.fill(given)
    is_equal = {
        name: torch.equal(local[name], local_shard(whole, AXES[name], mesh) if name in AXES else whole)
        for name, whole in expected.items()
    }
    larger = DTensor.from_local(torch.zeros(3, 8, 40), mesh, [Shard(0)], run_check=False)
    return {
        "equal": is_equal,
        "shape": message(stored.fill, {"model.a": larger}),
        "name": message(stored.fill, {"model.c": larger}),
    }


def main() -> None:
    folder, sub_layer_parallel_size = Path(sys.argv[1]), int(sys.argv[2])
    runtime = read_runtime()
    dist.init_process_group("gloo")
    copies = runtime.world_size // sub_layer_parallel_size
    mesh = init_device_mesh("cpu", (copies, sub_layer_parallel_size), mesh_dim_names=("data", "sub_layers"))
    report: dict[str, Any] = {"collectives": collectives(runtime)}
    report["save"] = save(folder / "ranks", runtime, mesh["sub_layers"])
    report["fail"] = fail_to_save(folder / "ranks", runtime, mesh["sub_layers"])
    report["stage"] = stage(folder / "staged", folder / "local disk", runtime, mesh["sub_layers"])
    report["verify"] = verify(folder / "ranks", runtime)
    for name in ("ranks", "one process"):
        checkpoint, _ = find_good_checkpoint(folder / name)
        report[f"fill {name}"] = fill(checkpoint, runtime, mesh["sub_layers"])
    reports = runtime.gather(report)
    if runtime.is_first:
        (folder / "report.json").write_text(json.dumps(reports))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
