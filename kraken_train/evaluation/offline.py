"""Tasks of lm-evaluation-harness whose documents are JSONL files of ours.

Each becomes a YAML file that includes the harness's own definition and changes only where the documents come from, so
prompts, choices and metrics are the stock ones. `lm_eval --include_path FOLDER` takes the same files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ENDINGS = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".json")


def find_file(data_dir: Path, stem: str) -> Path | None:
    """The file of a task, whichever of the known endings it has."""
    return next((path for ending in ENDINGS if (path := data_dir / f"{stem}{ending}").is_file()), None)


def write_task(folder: Path, name: str, definition: Path, stock: Mapping[str, Any], file: Path) -> None:
    """FOLDER/NAME.yaml: the task in `definition`, whose content is `stock`, with the documents of `file`."""
    splits = {f"{split}_split": stock.get(f"{split}_split") for split in ("training", "validation", "test")}
    evaluated = "test_split" if splits["test_split"] else "validation_split"  # the harness's own preference
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
    """FOLDER/NAME.yaml: the group of tasks in `definition`, each of which has a file in `folder` as well."""
    (folder / f"{name}.yaml").write_text(
        yaml.safe_dump({"include": str(definition), "group": name}, sort_keys=False), encoding="utf-8"
    )
