"""The files of a run: those in its folder, and those that its command needs. Imports no torch."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any

from kraken_train.common.errors import CheckpointError
from kraken_train.common.files import read_file
from kraken_train.common.parsing import parse_json, parse_yaml, well_typed
from kraken_train.run.exports import is_export, read_exports
from kraken_train.run.layout import CONFIG_FILE, EVENTS_FILE, IDENTITY_FILE, start_folders
from kraken_train.run.metrics import METRICS_FILE

TYPES: dict[str, type | UnionType] = {  # of settings and of facts about a start, as far as they are used
    **dict.fromkeys(("max_steps", "max_tokens"), int | None),
    **dict.fromkeys(("precision", "run_dir", "init_from", "resume"), str | None),
    "data_dir": str | dict | list,
    **dict.fromkeys(("folder", "command", "launch_command"), str | None),
    **dict.fromkeys(("hosts", "launchers"), list | None),
}
IDENTITY_KEYS = {"id", "model", "data_fingerprint", "seed"}


@dataclass(frozen=True)
class Export:
    step: int
    path: str
    is_there: bool


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML or JSON file; empty where it is missing or being written. Entries of a wrong type are left out."""
    try:
        content = (parse_json if path.suffix == ".json" else parse_yaml)(read_file(path))
    except (OSError, ValueError):
        return {}
    return well_typed(content, TYPES) if isinstance(content, dict) else {}


def identity_is_usable(run: Path) -> bool | None:
    """Whether run.json says what identifies the run; None where it is missing."""
    file = run / IDENTITY_FILE
    return read_mapping(file).keys() >= IDENTITY_KEYS if file.exists() else None


def folder_problems(run: Path, has_checkpoint: bool) -> list[str]:
    """Which parts of the folder are missing or damaged, the checkpoints aside."""
    problems = []
    usable = identity_is_usable(run)
    if not usable:
        problems.append(f"{run / IDENTITY_FILE} is {'missing' if usable is None else 'damaged'}")
    has_metrics = (run / METRICS_FILE).exists()
    for name, expected in (
        (EVENTS_FILE, has_metrics or has_checkpoint or bool(start_folders(run))),
        (CONFIG_FILE, has_metrics or has_checkpoint),
        (METRICS_FILE, has_checkpoint),
    ):
        if expected and not (run / name).exists():
            problems.append(f"{run / name} is missing")
    return problems


def find_exports(run: Path) -> tuple[list[Export], list[str]]:
    """The exports that were made of the run, the newest last, and what is wrong with the list of them."""
    try:
        made = read_exports(run)
    except CheckpointError as error:
        return [], [str(error)]
    found = [(export["step"], Path(export["path"])) for export in made]
    return [Export(step, str(path), is_export(path)) for step, path in found], []


def data_folders(config: dict[str, Any], folder: str | None) -> list[Path]:
    """The data of the run's settings, of all phases. `folder` is the one that its command ran in."""
    found: list[Path] = []
    phases = config.get("phases")
    for group in (config, *(phases if isinstance(phases, list) else ())):
        data = group.get("data_dir") or () if isinstance(group, dict) else ()
        found += [Path(folder or ".", str(path)) for path in ([data] if isinstance(data, str) else data)]
    return list(dict.fromkeys(found))


def missing_inputs(config: dict[str, Any], folder: str | None, has_checkpoint: bool) -> list[str]:
    """Inputs of the run's command that do not exist, as seen from this machine."""
    missing = [] if folder is None or Path(folder).is_dir() else [f"the folder {folder} in which it ran"]
    missing += [f"data_dir={path}" for path in data_folders(config, folder) if not path.is_dir()]
    initial = config.get("init_from")
    if initial and not has_checkpoint and not Path(folder or ".", initial).is_dir():
        missing.append(f"init_from={initial}")
    teacher = (config.get("distill") or {}).get("teacher")
    if teacher and not Path(folder or ".", teacher).is_dir():
        missing.append(f"distill.teacher={teacher}")
    return missing


def command_again(run: Path, config: dict[str, Any], environment: dict[str, Any], has_checkpoint: bool) -> str | None:
    """The command that started the run, with what must be different now: run_dir of a copied folder, and resume.

    It is that of launch.deepspeed, the outermost launcher's, or the program's where there was none.
    """
    launchers = environment.get("launchers") or [environment.get("command")]
    command = environment.get("launch_command") or launchers[-1]
    if not isinstance(command, str):
        return None
    run_dir = config.get("run_dir")
    if run_dir is not None and Path(environment.get("folder") or ".", run_dir).resolve() != run.resolve():
        command += f" {shlex.quote(f'run_dir={run.resolve()}')}"
    if config.get("resume") == "never" or (config.get("resume") == "must" and not has_checkpoint):
        command += " resume=auto"
    return command
