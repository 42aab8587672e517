"""Curves of one or more runs as a PNG: python -m kraken_train.report RUN_DIR [RUN_DIR ...] [--output FILE]

Reads what a run logs, RUN_DIR/metrics.jsonl: one JSON object per logged step.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kraken_train.cli import user_errors
from kraken_train.errors import DataError

METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"


@dataclass(frozen=True)
class Run:
    label: str
    records: list[dict[str, Any]]  # in the order of steps

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """(steps, values) of the steps that logged a finite `key`."""
        points = [(r["step"], r[key]) for r in self.records if is_finite(r.get(key))]
        return [step for step, _ in points], [value for _, value in points]


def is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# ---------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------


def read_run(run_dir: Path) -> Run:
    """What the run logged; where a resumed run logged a step again, the later record counts. Raises DataError."""
    path = run_dir / METRICS_FILE
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); name the run_dir of a training run") from error
    by_step: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        record = parse_record(line)
        if record is not None:
            by_step[record["step"]] = by_step.get(record["step"], {}) | record
        elif line.strip() and number < len(lines):  # the last line may be cut off: the run is still writing
            raise DataError(f"{path}:{number} is not a JSON object with a step; the file is damaged, remove that line")
    if not by_step:
        raise DataError(f"{path} holds no metrics yet; wait for the run's first logged step")
    return Run(run_dir.resolve().name, [by_step[step] for step in sorted(by_step)])


def parse_record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # no JSON, or no UTF-8
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


# ---------------------------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------------------------


def draw_curves(runs: Sequence[Run], output: Path) -> None:
    """Loss, learning rate, gradient norm and throughput over steps, all runs in the same four plots.

    Raises DataError if the picture cannot be written.
    """
    figure = Figure(figsize=(12, 7.5), layout="constrained")  # not of pyplot, so no display is looked for
    (loss, rate), (norm, speed) = figure.subplots(2, 2, sharex=True)
    for index, run in enumerate(runs):
        color = f"C{index % 10}"
        draw_loss(loss, run, color, several=len(runs) > 1)
        rate.plot(*run.series("lr"), color=color, label=run.label)
        norm.plot(*run.series("grad_norm"), color=color, label=run.label, linewidth=0.8)
        speed.plot(*run.series("tokens_per_second"), color=color, label=run.label)
    for axes, title in (
        (loss, "loss (nats per token)"),
        (rate, "learning rate"),
        (norm, "gradient norm before clipping"),
        (speed, "tokens per second"),
    ):
        finish(axes, title, legend=axes is loss or len(runs) > 1)
    norm.set_yscale("log")
    norm.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    norm.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    speed.set_ylim(0, 1.1 * max([1.0, *(value for run in runs for value in run.series("tokens_per_second")[1])]))
    speed.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    figure.supxlabel("optimizer step", fontsize="medium")
    if len(runs) == 1:
        figure.suptitle(runs[0].label)
    try:
        figure.savefig(output, dpi=120)
    except (OSError, ValueError) as error:
        raise DataError(f"{output} cannot be written: {error}") from error


def draw_loss(axes: Axes, run: Run, color: str, several: bool) -> None:
    prefix = f"{run.label} " if several else ""
    axes.plot(*run.series("loss"), color=color, alpha=0.45, linewidth=1, label=f"{prefix}training")
    steps, values = run.series("validation_loss")
    if steps:
        axes.plot(steps, values, color=color, marker="o", markersize=3.5, label=f"{prefix}validation {values[-1]:.3f}")


def finish(axes: Axes, title: str, legend: bool) -> None:
    axes.set_title(title, loc="left", fontsize="medium")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelbottom=True)
    if legend and axes.has_data():
        axes.legend(frameon=False, fontsize="small")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kraken_train.report", description="Curves of training runs.")
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="folder of a training run")
    parser.add_argument(
        "--output", type=Path, help="PNG to write; by default RUN_DIR/curves.png, or ./curves.png for several runs"
    )
    options = parser.parse_args(arguments)
    only_one = len(options.run_dirs) == 1
    output = options.output or (options.run_dirs[0] / CURVES_FILE if only_one else Path(CURVES_FILE))
    with user_errors(output):
        draw_curves([read_run(run_dir) for run_dir in options.run_dirs], output)
        print(f"wrote {output}")


if __name__ == "__main__":
    main()
