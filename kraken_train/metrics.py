"""What a run reports: lines on the console, `metrics.jsonl`, and Weights & Biases. Only rank 0 has one."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kraken_train.config import TrainConfig
from kraken_train.errors import ConfigError, TrainingError
from kraken_train.parsing import to_dict
from kraken_train.run_folder import RunFolder

Record = dict[str, float | int]


class PatientConsole(Console):
    """A console whose reader may leave (`| head`): nothing more is printed, and training goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Metrics:
    """Reports of one start of a run; `step` is the number of optimizer steps it continues after."""

    def __init__(self, config: TrainConfig, run: RunFolder, step: int, summary: dict[str, Any]) -> None:
        self.console = PatientConsole(highlight=False)
        try:
            run.write_config(config)
            drop_records_after(run.metrics, step)
            self.file = run.metrics.open("a", buffering=1)
        except OSError as error:
            raise TrainingError(f"{run.path} cannot be written: {error.strerror}") from error
        self.wandb = start_wandb(config, run, summary)
        self.progress: Progress | None = None
        if sys.stdout.isatty():
            self.progress = Progress(
                BarColumn(bar_width=16),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=self.console,
            )
            self.progress.start()
            self.task = self.progress.add_task("training", total=config.max_steps, completed=step)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def record(self, record: Record) -> None:
        """Report one step. Values that are not finite become null in the file, as JSON has no NaN."""
        try:
            self.file.write(json.dumps({key: json_number(value) for key, value in record.items()}) + "\n")
        except OSError as error:
            raise TrainingError(f"{self.file.name} cannot be written: {error.strerror}") from error
        line = describe(record)
        if self.progress is not None:
            self.progress.update(self.task, completed=int(record["step"]), description=line)
        if self.progress is None or "validation_loss" in record:
            self.say(line)
        if self.wandb is not None:
            self.wandb.log(dict(record), step=int(record["step"]))

    def sync(self) -> None:
        """Wait until the disk has all records: those up to a checkpoint's step must not be lost with a machine."""
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            raise TrainingError(f"{self.file.name} cannot be written: {error.strerror}") from error

    def close(self, failed: bool) -> None:
        with contextlib.suppress(OSError):  # a full disk has been reported by `record`
            self.file.close()
        if self.progress is not None:
            self.progress.stop()
        if self.wandb is not None:
            self.wandb.finish(exit_code=int(failed))


def describe(record: Record) -> str:
    """One line: step, loss, and what else there is."""
    parts = [f"step {record['step']}", f"loss {record['loss']:.4f}"]
    formats = {
        "validation_loss": "validation loss {:.4f}",
        "validation_perplexity": "validation perplexity {:.2f}",
        "lr": "lr {:.2e}",
        "grad_norm": "grad norm {:.3f}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "mfu": "MFU {:.1%}",
        "data_wait": "data wait {:.1%}",
    }
    parts += [text.format(record[name]) for name, text in formats.items() if name in record]
    return " | ".join(parts)


def json_number(value: float | int) -> float | int | None:
    return value if math.isfinite(value) else None


def drop_records_after(path: Path, step: int) -> None:
    """Keep the records up to `step`: later ones, and a half-written last line, will be written again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(b"".join(line + b"\n" for line in kept))
    temporary.replace(path)


def start_wandb(config: TrainConfig, run: RunFolder, summary: dict[str, Any]) -> Any:
    """The Weights & Biases run of this run folder, new or continued; None if tracking is off. Raises ConfigError."""
    tracking = config.tracking
    if tracking.mode == "off":
        return None
    import wandb  # noqa: PLC0415 (takes seconds, and not everybody uses it)

    try:
        return wandb.init(
            id=run.run_id,
            resume="allow",
            mode=tracking.mode,  # type: ignore[arg-type]
            project=tracking.project,
            entity=tracking.entity,
            name=tracking.name or run.path.resolve().name,
            group=tracking.group,
            tags=list(tracking.tags),
            dir=str(run.path),
            config={**to_dict(config), **summary},
        )
    except wandb.errors.Error as error:
        raise ConfigError(
            f"tracking.mode={tracking.mode}: Weights & Biases did not start ({error}); log in with `wandb login`, or "
            "use tracking.mode=offline or off"
        ) from error
