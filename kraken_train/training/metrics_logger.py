"""The reports of a run: console lines, `metrics.jsonl` and the tracker. Only rank 0 has a logger."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kraken_train.config import TrainConfig
from kraken_train.health.shutdown import INTERRUPTED_EXIT_CODE, Interrupted
from kraken_train.run.folder import RunFolder, system_errors
from kraken_train.run.layout import LOGS
from kraken_train.run.metrics import SUITE, VALIDATION_LOSS, parse_record
from kraken_train.tracking.process import start_follower

Record = dict[str, float | int]


class PipeSafeConsole(Console):
    """A console whose reader may close it (`| head`): then nothing more is printed, and training continues."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class MetricsLogger:
    """A context for the reports of one start of a run, which continues after `step` and ends with `last_step`."""

    def __init__(self, config: TrainConfig, run: RunFolder, step: int, last_step: int) -> None:
        self.run = run
        self.console = PipeSafeConsole(highlight=False)
        with system_errors(f"{run.path} cannot be written"):
            run.write_config(config)
        self.file = self.open_after(step)
        self.follower = start_follower(config.tracking, run.path, run.start / LOGS, self.note)
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
            self.task = self.progress.add_task("training", total=last_step, completed=step)

    def rewind(self, step: int) -> None:
        """Continue after `step`: later records are dropped, as they will be written again. Raises CheckpointError."""
        self.file.close()
        self.file = self.open_after(step)

    def open_after(self, step: int) -> TextIO:
        with system_errors(f"{self.run.metrics} cannot be written"):
            drop_records_after(self.run.metrics, step)
            return self.run.metrics.open("a", encoding="utf-8", buffering=1)

    def print_line(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def record(self, record: Record) -> None:
        """Report one step. Values that are not finite become null in the file, as JSON has no NaN."""
        with system_errors(f"{self.file.name} cannot be written"):
            self.file.write(json.dumps({key: json_number(value) for key, value in record.items()}) + "\n")
        line = describe(record)
        if self.progress is not None:
            self.progress.update(self.task, completed=int(record["step"]), description=line)
        if self.progress is None or any(name.startswith(VALIDATION_LOSS) for name in record):
            self.print_line(line)

    def sync(self) -> None:
        """Wait until the disk has all records: those up to a checkpoint's step must not be lost with a machine."""
        with system_errors(f"{self.file.name} cannot be written"):
            os.fsync(self.file.fileno())

    def note(self, text: str) -> None:
        self.print_line(f"note: {text}")
        self.run.events.write("tracking", note=text)

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # a full disk has been reported by `record`
            self.file.close()
        if self.progress is not None:
            self.progress.stop()
        if self.follower is not None:
            interrupted = kind is not None and issubclass(kind, Interrupted)
            self.follower.close(INTERRUPTED_EXIT_CODE if interrupted else int(kind is not None))


def describe(record: Record) -> str:
    """One line: step, loss, and what else there is."""
    parts = [f"step {record['step']}", f"loss {record['loss']:.4f}"]
    formats = {
        "z_loss": "z-loss {:.2e}",
        "distill_kl": "KL {:.4f}",
        "validation_loss": "validation loss {:.4f}",
        "validation_perplexity": "validation perplexity {:.2f}",
        "lr": "lr {:.2e}",
        "grad_norm": "grad norm {:.3f}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "mfu": "MFU {:.1%}",
        "data_wait": "data wait {:.1%}",
    }
    parts += [text.format(record[name]) for name, text in formats.items() if name in record]
    if sets := [f"{name} {value:.4f}" for name, value in within(record, VALIDATION_LOSS)]:
        parts.append(f"validation loss of {', '.join(sets)}")
    if scores := [f"{name} {value:.3f}" for name, value in within(record, SUITE)]:
        parts.append(", ".join(scores))
    return " | ".join(parts)


def within(record: Record, group: str) -> list[tuple[str, float | int]]:
    """(name, value) of the entries `group/name`."""
    return [(name.removeprefix(f"{group}/"), value) for name, value in record.items() if name.startswith(f"{group}/")]


def json_number(value: float | int) -> float | int | None:
    return value if math.isfinite(value) else None


def drop_records_after(path: Path, step: int) -> None:
    """Keep the records up to `step`: later ones, and a half-written last line, will be written again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines():
        record = parse_record(line)
        if record is not None and record["step"] <= step:
            kept.append(line)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(b"".join(line + b"\n" for line in kept))
    temporary.replace(path)
