"""Everything that only a GPU can settle, in one command: python -m kraken_train.bench.acceptance

Stages, each with a time limit and a JSON file of its own; a stage that fails does not hold up the next one. At the end
stands a table: measured, expected, goal, verdict. The same command goes on where it stopped: what is done is skipped.
`piece_minutes=9` ends early, between two stages, for a machine that is lent for ten minutes at a time.

On one GPU the stages are those of `conf/acceptance/one_gpu.yaml`, on eight those of `eight_gpus.yaml`. Without a GPU
all stages of both run with tiny models on gloo, so that nothing in them runs for the first time on a GPU.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

from kraken_train.bench.stages import cpu_calls, many_gpus, one_gpu
from kraken_train.bench.stages.preset import CPU, CUDA, MANY_GPUS, ONE_GPU, Preset, load_preset
from kraken_train.bench.stages.record import read_record
from kraken_train.bench.stages.runner import Runner
from kraken_train.bench.stages.stage import Stage
from kraken_train.bench.stages.table import Row, as_markdown, as_table, rows
from kraken_train.common.cli import run_entry
from kraken_train.common.errors import ConfigError
from kraken_train.common.files import replace_synced
from kraken_train.common.free_text import FilePath
from kraken_train.common.output import open_output
from kraken_train.common.validation import require_choice, require_positive
from kraken_train.parallel.ranks import gpu_is_usable

STAGES = {ONE_GPU: one_gpu.STAGES, MANY_GPUS: many_gpus.STAGES}
ALL = {stage.name: stage for stages in STAGES.values() for stage in stages}
PRESETS = AUTO, *_ = ("auto", "cpu", "one_gpu", "eight_gpus")
TABLE_FILE, TABLE_PAGE = "table.json", "table.md"


@dataclass(frozen=True)
class AcceptanceConfig:
    """See conf/acceptance.yaml."""

    preset: str  # auto: by the number of GPUs | cpu | one_gpu | eight_gpus: a file of conf/acceptance
    stages: tuple[str, ...] | None  # names of stages, as in [machine,speed]; null: all of the preset
    again: bool  # run what is done once more
    # longest time of this call; a stage whose limit does not fit waits for the next one; null: all stages now
    piece_minutes: float | None
    output_dir: FilePath  # folder for a JSON file of each stage and for the table
    work_dir: FilePath  # folder for what the stages write: logs, data, runs, profiles

    def validate(self) -> None:
        """Raises ConfigError."""
        require_choice("preset", self.preset, PRESETS)
        if self.stages == ():
            raise ConfigError("stages=[] names no stage; use null for all of the preset")
        for name in self.stages or ():
            require_choice("stages", name, tuple(ALL))
        if self.piece_minutes is not None:
            require_positive("piece_minutes", self.piece_minutes)
        for name in ("output_dir", "work_dir"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty; give {name}=FOLDER")


def choose_preset(name: str, gpus: int) -> Preset:
    """Raises ConfigError where there are too few GPUs."""
    if name == AUTO:
        name = "cpu" if gpus == 0 else "eight_gpus" if gpus >= load_preset("eight_gpus").ranks else "one_gpu"
    preset = load_preset(name)
    needed = (preset.ranks if MANY_GPUS in preset.sets else 1) if preset.device == CUDA else 0
    if gpus < needed:
        raise ConfigError(f"preset={name} needs {needed} GPUs, and PyTorch sees {gpus}; use preset=auto")
    return preset


def choose_stages(config: AcceptanceConfig, preset: Preset) -> list[Stage]:
    """In their order. Raises ConfigError for one of another preset, and for one that never fits into a piece."""
    own = [stage for name in preset.sets for stage in STAGES[name]]
    for name in config.stages or ():
        require_choice("stages", name, tuple(stage.name for stage in own))
    chosen = [stage for stage in own if config.stages is None or stage.name in config.stages]
    longest = max(preset.minutes(stage.minutes) for stage in chosen)
    if config.piece_minutes is not None and longest > config.piece_minutes:
        raise ConfigError(
            f"piece_minutes={config.piece_minutes:g} is less than the {longest:g} minutes of a stage, which would "
            f"never begin; use at least {longest:g}, or null"
        )
    return chosen


def accept(config: AcceptanceConfig) -> None:
    gpus = torch.cuda.device_count() if gpu_is_usable() else 0
    preset = choose_preset(config.preset, gpus)
    stages = choose_stages(config, preset)
    output_dir, work_dir = Path(config.output_dir), Path(config.work_dir)
    open_output(output_dir)
    open_output(work_dir, "work_dir")
    runner = Runner(preset, output_dir, work_dir, device_name(preset, gpus), say)
    waiting = runner.run(stages, config.again, config.piece_minutes and config.piece_minutes * 60)
    records = {stage.name: read_record(output_dir, stage.name) for stage in stages}
    found = list(rows(stages, records, preset.device == CPU))
    write_table(found, output_dir)
    console = Console(width=None if Console().is_terminal else 160)
    console.print(as_table(found, f"Acceptance on {runner.device}"))
    if preset.device == CPU:
        say("what only a GPU runs, and kraken_train.bench.stages.cpu_calls has replaced here:")
        for line in cpu_calls.replaced():
            say(f"  {line}")
    if waiting:
        say(f"not begun in this piece: {', '.join(waiting)}; the same command continues with them")


def device_name(preset: Preset, gpus: int) -> str:
    return f"CPU ({platform.machine()})" if preset.device == CPU else f"{gpus} x {torch.cuda.get_device_name(0)}"


def say(line: str) -> None:
    print(line, flush=True)


def write_table(found: list[Row], folder: Path) -> None:
    replace_synced(folder / TABLE_FILE, json.dumps([asdict(row) for row in found], indent=2) + "\n")
    replace_synced(folder / TABLE_PAGE, as_markdown(found))


def main() -> None:
    run_entry(accept, AcceptanceConfig, "acceptance")


if __name__ == "__main__":
    main()
