"""Describes and verifies a training checkpoint: python -m checkpoints.inspect DIR

DIR is one checkpoint, RUN/checkpoints/step-NNNNNNNN, or a run folder or its `checkpoints` folder: then all checkpoints
are listed, and the newest is described and verified. Every byte of that checkpoint is read; no GPUs are needed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoints.training.index import INDEX
from checkpoints.training.manifest import POINTER, STEP_FOLDER, Checkpoint, read_manifest, step_folders
from checkpoints.training.store import WEIGHT_PREFIX, verify_checkpoint
from checkpoints.training.stored_tensors import StoredTensors
from kraken_train.common.cli import user_errors
from kraken_train.common.errors import CheckpointError
from kraken_train.common.help import make_parser

OPTIMIZER_PREFIX = "optimizer."
LABEL_WIDTH = 11
BYTE_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def inspect(folder: Path) -> None:
    """Print a description. Raises CheckpointError if there is no checkpoint or the described one is damaged."""
    path = folder
    if not is_checkpoint(folder):
        checkpoints = checkpoints_folder(folder)
        print_lines(describe_all(checkpoints))
        print()
        path = newest(checkpoints)
    checkpoint = read_manifest(path)
    print_lines(describe(checkpoint))
    verify_checkpoint(path)
    print_lines(describe_tensors(checkpoint))  # after the verification: a damaged index must not be read
    print(f"verified: all {len(checkpoint.files)} files have the size and the SHA-256 that the manifest lists")


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder is a checkpoint, also a renamed one. The manifest is no criterion: other folders have one."""
    return STEP_FOLDER.match(os.path.basename(os.path.realpath(folder))) is not None or (folder / INDEX).exists()


def checkpoints_folder(folder: Path) -> Path:
    """The folder of checkpoints that `folder` is or contains. Raises CheckpointError."""
    for candidate in (folder, folder / "checkpoints"):
        if step_folders(candidate) or damaged_folders(candidate):
            return candidate
    problem = "holds no checkpoint" if folder.is_dir() else "is not a folder"
    raise CheckpointError(
        f"{folder} {problem}; give a run folder, its checkpoints folder or a checkpoint in it, such as step-00000100"
    )


def newest(checkpoints: Path) -> Path:
    found = step_folders(checkpoints)
    if not found:
        raise CheckpointError(f"{checkpoints} has only damaged checkpoints; give one of them to describe it")
    return found[-1]


def damaged_folders(checkpoints: Path) -> list[Path]:
    """Checkpoints that a resumed run found damaged and renamed."""
    return sorted(checkpoints.glob("step-*.damaged"))


# ---------------------------------------------------------------------------------------------------------------
# Descriptions
# ---------------------------------------------------------------------------------------------------------------


def describe_all(checkpoints: Path) -> list[tuple[str, str]]:
    """A line per checkpoint, oldest first, from the manifests alone."""
    pointer = checkpoints / POINTER
    pointed = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else None
    found = step_folders(checkpoints)
    lines = [("checkpoints", f"{len(found)} in {checkpoints}")]
    for path in found:
        try:
            checkpoint = read_manifest(path)
            tokens = checkpoint.metadata.get("tokens")
            parts = [size(total_bytes(checkpoint)), *([f"{tokens:,} tokens"] if tokens is not None else [])]
        except CheckpointError as error:
            parts = [str(error)]
        lines.append((path.name, ", ".join([*parts, *(["latest"] if path.name == pointed else [])])))
    if pointed is None:
        lines.append((POINTER, "is missing; training does not need it"))
    elif pointed not in [path.name for path in found]:
        lines.append((POINTER, f"points to {pointed}, which does not exist; training does not need it"))
    lines += [(path.name, "renamed by a run that found it damaged") for path in damaged_folders(checkpoints)]
    return lines


def describe(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """The content of the manifest as (label, text), without entries that an older checkpoint does not have."""
    metadata = checkpoint.metadata
    config = metadata.get("config", {})
    lines = [("checkpoint", str(checkpoint.path)), ("step", f"{checkpoint.step:,}")]
    for label, key, text in (
        ("updates", "updates", "{:,}"),
        ("samples", "consumed_samples", "{:,} consumed"),
        ("tokens", "tokens", "{:,} consumed"),
        ("run", "run_id", "{}"),
        ("data", "data_fingerprint", "fingerprint {}"),
    ):
        if key in metadata:
            lines.append((label, text.format(metadata[key])))
    if "model" in metadata:
        lines += describe_model(metadata["model"])
    if "precision" in config:
        lines.append(("precision", str(config["precision"])))
    engine = config.get("engine")
    if isinstance(engine, dict) and "zero_stage" in engine:
        lines.append(("ZeRO stage", str(engine["zero_stage"])))
    lines += describe_topology(metadata)
    return [*lines, ("files", f"{len(checkpoint.files)}, {size(total_bytes(checkpoint))}")]


def describe_model(model: dict[str, Any]) -> list[tuple[str, str]]:
    settings = ", ".join(f"{name}={value}" for name, value in model.items() if name != "architecture")
    return [("model", str(model.get("architecture", "?"))), ("", settings)]


def describe_topology(metadata: dict[str, Any]) -> list[tuple[str, str]]:
    """The number of ranks that wrote the checkpoint; any other number can read it."""
    if "world_size" not in metadata:
        return []
    ranks = metadata["world_size"]
    text = f"{ranks} rank{'s' if ranks != 1 else ''}"
    if {"sub_layer_parallel_size", "data_parallel_size"} <= metadata.keys():
        text += (
            f": {metadata['sub_layer_parallel_size']} sub-layer parallel x {metadata['data_parallel_size']} "
            "data parallel"
        )
    return [("written by", text)]


def describe_tensors(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    stored = StoredTensors(checkpoint).entries
    numbers = {"weights": 0, "moments": 0, "others": 0}
    for name, entry in stored.items():
        kind = {WEIGHT_PREFIX: "weights", OPTIMIZER_PREFIX: "moments"}.get(name[: name.find(".") + 1], "others")
        numbers[kind] += entry.size.numel()
    return [("tensors", f"{len(stored):,}"), *((kind, f"{count:,} values") for kind, count in numbers.items() if count)]


def total_bytes(checkpoint: Checkpoint) -> int:
    return sum(entry["bytes"] for entry in checkpoint.files.values())


def size(number: float) -> str:
    """1536 -> "1.5 KiB"."""
    power = 0
    while number >= 1024 and power < len(BYTE_UNITS) - 1:
        number, power = number / 1024, power + 1
    return f"{number:.0f} {BYTE_UNITS[power]}" if power == 0 else f"{number:.1f} {BYTE_UNITS[power]}"


def print_lines(lines: Sequence[tuple[str, str]]) -> None:
    width = max(LABEL_WIDTH, *(len(label) for label, _ in lines))
    for label, text in lines:
        print(f"{label:{width}}  {text}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="a checkpoint, a checkpoints folder or a run folder")
    folder = parser.parse_args(arguments).folder
    with user_errors(folder):
        inspect(folder)


if __name__ == "__main__":
    main()
