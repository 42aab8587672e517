"""Fills in the shipped scripts of launch/slurm: their #SBATCH lines and the settings that people would edit."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent
FIRST, LAST = "# ---- settings", "# ---- end of settings"


@dataclass(frozen=True)
class Settings:
    """What stands between FIRST and LAST."""

    environment: Sequence[str]  # shell commands
    python: Sequence[str]  # the command that runs a module, given its name
    srun_options: Sequence[str]
    max_restarts: int | None = None  # of training only
    overrides: Path | None = None  # a job array's: FOLDER/NAME, of which NAME.3 has an override per line


def fill_in(name: str, options: Mapping[str, str | None], settings: Settings) -> str:
    """`launch/slurm/NAME.sbatch` with other values.

    Of `options`, those that the script has are replaced, or left out where None, and the others are added; "" stands
    for an option without a value.
    """
    lines, rest = [], dict(options)
    text = (SCRIPTS / f"{name}.sbatch").read_text(encoding="utf-8")
    for line in text.splitlines():
        if not line.startswith("#SBATCH "):
            lines.append(line)
            continue
        key = line.split()[1].removeprefix("--").partition("=")[0]
        if key not in rest:
            lines.append(line)
        elif (value := rest.pop(key)) is not None:
            lines.append(sbatch_line(key, value))
    last = max(index for index, line in enumerate(lines) if line.startswith("#SBATCH "))
    lines[last + 1 : last + 1] = [sbatch_line(key, value) for key, value in rest.items() if value is not None]
    begin, end = lines.index(FIRST), lines.index(LAST)
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
