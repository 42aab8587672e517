"""Draws curves of training runs as PNG files."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from kraken_train.common.errors import DataError
from kraken_train.common.ticks import label_log_axis
from kraken_train.run.metrics import SUITE, Run

STYLES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))


def draw_curves(runs: Sequence[Run], output: Path) -> None:
    """Draw loss, learning rate, gradient norm and throughput over steps, with all runs in the same four plots.

    Where suites were measured during a run, a plot below has their scores. Raises DataError if the file cannot be
    written.
    """
    with_suites = any(run.suite_scores() for run in runs)
    heights = [7.5, 4.0] if with_suites else [7.5]
    figure = Figure(figsize=(12, sum(heights)), layout="constrained")  # not by pyplot, which would look for a display
    curves, *rest = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    fill_curves(curves, runs)
    for part in rest:
        draw_suite_scores(part.subplots(), runs)
    if len(runs) == 1:
        figure.suptitle(runs[0].label)
    save(figure, output)


def fill_curves(figure: Figure | SubFigure, runs: Sequence[Run]) -> None:
    (loss, rate), (norm, speed) = figure.subplots(2, 2, sharex=True)
    for index, run in enumerate(runs):
        color = f"C{index % 10}"
        draw_loss(loss, run, color, several=len(runs) > 1)
        rate.plot(*run.series("lr"), color=color, label=run.label)
        norm.plot(*run.series("grad_norm"), color=color, label=run.label, linewidth=0.8)
        speed.plot(*run.series("tokens_per_second"), color=color, label=run.label)
        for axes, step in itertools.product((rate, norm, speed), run.phase_begins()):
            draw_border(axes, step, color)
    for axes, title in (
        (loss, "loss (nats per token)"),
        (rate, "learning rate"),
        (norm, "gradient norm before clipping"),
        (speed, "tokens per second"),
    ):
        finish(axes, title, legend=axes is loss or len(runs) > 1)
    norm.set_yscale("log")
    label_log_axis(norm.yaxis)
    speed.set_ylim(0, 1.1 * max([1.0, *(value for run in runs for value in run.series("tokens_per_second")[1])]))
    speed.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    figure.supxlabel("optimizer step", fontsize="medium")


def draw_loss_curve(run: Run, output: Path) -> None:
    """Draw only the loss. Raises DataError if the file cannot be written."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    draw_loss(axes, run, "C0", several=False)
    finish(axes, "loss (nats per token)", legend=True)
    axes.set_xlabel("optimizer step")
    save(figure, output)


def draw_loss(axes: Axes, run: Run, color: str, several: bool) -> None:
    prefix = f"{run.label} " if several else ""
    axes.plot(*run.series("loss"), color=color, alpha=0.45, linewidth=1, label=f"{prefix}training")
    steps, values = run.series("validation_loss")
    if steps:
        axes.plot(steps, values, color=color, marker="o", markersize=3.5, label=f"{prefix}validation {values[-1]:.3f}")
    for step in run.phase_begins():
        draw_border(axes, step, color)
    sets = sorted({key for record in run.records for key in record if key.startswith("validation_loss/")})
    for key, style in zip(sets, itertools.cycle(STYLES[1:]), strict=False):
        steps, values = run.series(key)
        label = f"{prefix}{key.partition('/')[2]} {values[-1]:.3f}"
        axes.plot(steps, values, color=color, linestyle=style, linewidth=1, label=label)


def draw_suite_scores(axes: Axes, runs: Sequence[Run]) -> None:
    """A line for each task and average; runs differ in the style of line."""
    keys = list(dict.fromkeys(key for run in runs for key in run.suite_scores()))
    for run, style in zip(runs, itertools.cycle(STYLES), strict=False):
        for index, key in enumerate(keys):
            steps, values = run.series(key)
            if steps:
                name = f"{run.label} " if len(runs) > 1 else ""
                label = f"{name}{key.removeprefix(f'{SUITE}/')} {values[-1]:.3f}"
                axes.plot(steps, values, color=f"C{index % 10}", linestyle=style, marker="o", markersize=3, label=label)
    finish(axes, "scores of suites", legend=True)
    axes.set_xlabel("optimizer step")


def draw_border(axes: Axes, step: int, color: str) -> None:
    """Of two phases, before the first step of the second."""
    axes.axvline(step - 0.5, color=color, linestyle=":", linewidth=1)


def finish(axes: Axes, title: str, legend: bool) -> None:
    axes.set_title(title, loc="left", fontsize="medium")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelbottom=True)
    if legend and axes.has_data():
        axes.legend(frameon=False, fontsize="small")


def save(figure: Figure, output: Path) -> None:
    try:
        figure.savefig(output, dpi=120)
    except (OSError, ValueError) as error:
        raise DataError(f"{output} cannot be written: {error}") from error
