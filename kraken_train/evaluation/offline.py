"""Definitions of lm-evaluation-harness tasks that read their documents from local JSONL files.

Each definition is a YAML file that includes the harness's own one and changes only the source of the documents, so that
prompts, choices and metrics stay the same. `lm_eval --include_path FOLDER` reads the same files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ENDINGS = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".json")


def find_file(data_dir: Path, stem: str) -> Path | None:
    """The file of a task with one of ENDINGS; None if there is none."""
    return next((path for ending in ENDINGS if (path := data_dir / f"{stem}{ending}").is_file()), None)


def write_task(folder: Path, name: str, definition: Path, stock: Mapping[str, Any], file: Path) -> None:
    """Write FOLDER/NAME.yaml: the task of the file `definition`, whose content is `stock`, with documents of `file`."""
    splits = {f"{split}_split": stock.get(f"{split}_split") for split in ("training", "validation", "test")}
    evaluated = "test_split" if splits["test_split"] else "validation_split"  # as the harness itself prefers
    task = {
        "include": str(definition),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {splits[evaluated]: str(file.resolve())}},
        **{key: splits[key] if key == evaluated else None for key in splits},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")


def write_group(folder: Path, name: str, definition: Path) -> None:
    """Write FOLDER/NAME.yaml: the group of the file `definition`; `folder` also has a file for each of its tasks."""
    (folder / f"{name}.yaml").write_text(
        yaml.safe_dump({"include": str(definition), "group": name}, sort_keys=False), encoding="utf-8"
    )
