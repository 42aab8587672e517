"""Fills in the shipped scripts of launch/slurm: their #SBATCH lines and the settings between two marker lines."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent
BEGIN_SETTINGS, END_SETTINGS = "# ---- settings", "# ---- end of settings"


@dataclass(frozen=True)
class Settings:
    """The settings between the lines BEGIN_SETTINGS and END_SETTINGS."""

    environment: Sequence[str]  # shell commands
    python: Sequence[str]  # the command that runs a module; its name is appended
    srun_options: Sequence[str]
    max_restarts: int | None = None  # None: not a training script
    overrides: Path | None = None  # of a job array: PREFIX; the file PREFIX.3 has the overrides of task 3


def fill_in(name: str, options: Mapping[str, str | None], settings: Settings) -> str:
    """The script `launch/slurm/NAME.sbatch` with these options of sbatch and these settings.

    An option that the script already has is replaced, or removed if its value is None; other options are added. The
    value "" means an option without a value.
    """
    lines, remaining = [], dict(options)
    text = (SCRIPTS / f"{name}.sbatch").read_text(encoding="utf-8")
    for line in text.splitlines():
        if not line.startswith("#SBATCH "):
            lines.append(line)
            continue
        key = line.split()[1].removeprefix("--").partition("=")[0]
        if key not in remaining:
            lines.append(line)
        elif (value := remaining.pop(key)) is not None:
            lines.append(sbatch_line(key, value))
    last = max(index for index, line in enumerate(lines) if line.startswith("#SBATCH "))
    lines[last + 1 : last + 1] = [sbatch_line(key, value) for key, value in remaining.items() if value is not None]
    begin, end = lines.index(BEGIN_SETTINGS), lines.index(END_SETTINGS)
    lines[begin + 1 : end] = settings_block(settings)
    return "\n".join(lines) + "\n"


def sbatch_line(key: str, value: str) -> str:
    return f"#SBATCH --{key}={shlex.quote(value)}" if value else f"#SBATCH --{key}"


def settings_block(settings: Settings) -> list[str]:
    lines = ["environment() {", *(f"    {command}" for command in settings.environment or [":"]), "}"]
    lines.append(f"python=({shlex.join(settings.python)})")
    lines.append(f"srun_options=({shlex.join(settings.srun_options)})")
    if settings.max_restarts is not None:
        lines.append(f"max_restarts={settings.max_restarts}")
    if settings.overrides is not None:
        lines.append(f'mapfile -t overrides <{shlex.quote(str(settings.overrides))}."$SLURM_ARRAY_TASK_ID"')
        lines.append('set -- "${overrides[@]}"')
    return lines
