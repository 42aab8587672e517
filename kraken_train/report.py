"""Curves of one or more runs as a PNG, and several of them compared in a table.

    python -m kraken_train.report RUN_DIR
    python -m kraken_train.report RUN_OR_EXPORT RUN_OR_EXPORT ... [--output FILE.png] [--table FILE.md|FILE.json]

It reads what runs have logged and what evaluations have recorded in exports.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from kraken_train.cli import user_errors
from kraken_train.errors import DataError
from kraken_train.run_metrics import Run, read_run

if TYPE_CHECKING:
    from kraken_train.comparison import Entry, SuiteComparison

CURVES_FILE = "curves.png"


# ---------------------------------------------------------------------------------------------------------------
# Curves
# ---------------------------------------------------------------------------------------------------------------


def draw_curves(runs: Sequence[Run], output: Path) -> None:
    """Loss, learning rate, gradient norm and throughput over steps, all runs in the same four plots.

    Raises DataError if the picture cannot be written.
    """
    figure = Figure(figsize=(12, 7.5), layout="constrained")  # not of pyplot, so no display is looked for
    fill_curves(figure, runs)
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


def draw_loss_curve(run: Run, output: Path) -> None:
    """The loss alone. Raises DataError if the picture cannot be written."""
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


# ---------------------------------------------------------------------------------------------------------------
# Comparison
# ---------------------------------------------------------------------------------------------------------------


def draw_comparison(entries: Sequence[Entry], output: Path) -> None:
    """The curves, below them perplexity over parameters and the suites' results. Raises DataError."""
    from kraken_train.comparison import common_perplexity, compare_suites  # noqa: PLC0415 (takes seconds)

    colors = {entry.label: f"C{index % 10}" for index, entry in enumerate(entries)}
    perplexities = {
        entry.label: (entry.model.num_parameters, found["perplexity"])
        for entry in entries
        if entry.model is not None and (found := common_perplexity(entries).get(entry.label))
    }
    suites = compare_suites(entries)
    below = bool(perplexities) + len(suites)
    height = 4.0 * below
    figure = Figure(figsize=(12, 7.5 + height), layout="constrained")
    parts = figure.subfigures(1 + below, 1, height_ratios=[7.5] + [4.0] * below, squeeze=False)[:, 0]
    fill_curves(parts[0], [entry.run for entry in entries])
    remaining = list(parts[1:])
    if perplexities:
        draw_perplexities(remaining.pop(0).subplots(), perplexities, colors)
    for part, comparison in zip(remaining, suites.values(), strict=True):
        draw_suite(part.subplots(), comparison, colors)
    save(figure, output)


def draw_perplexities(axes: Axes, found: dict[str, tuple[int, float]], colors: dict[str, str]) -> None:
    for label, (parameters, perplexity) in found.items():
        axes.scatter([parameters], [perplexity], color=colors[label], label=f"{label} {perplexity:,.2f}")
    axes.set_xscale("log")
    axes.set_xlabel("parameters")
    axes.margins(0.15)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}M")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value / 1e6:g}M" if f"{value:e}"[0] in "25" else "")
    finish(axes, "perplexity", legend=True)


def draw_suite(axes: Axes, comparison: SuiteComparison, colors: dict[str, str]) -> None:
    """Bars with standard errors: a group per task, a bar per run."""
    width = 0.8 / len(comparison.results)
    for index, (label, result) in enumerate(comparison.results.items()):
        scores = [(at, task.scores[task.metric]) for at, name in enumerate(comparison.tasks)
                  if (task := result.tasks.get(name))]  # fmt: skip
        axes.bar(
            [at + (index + 0.5) * width - 0.4 for at, _ in scores],
            [score.value for _, score in scores],
            width,
            yerr=[score.standard_error or 0.0 for _, score in scores],
            color=colors[label],
            label=label,
            error_kw={"linewidth": 0.8},
        )
    metrics = {
        name: next((r.tasks[name].metric for r in comparison.results.values() if name in r.tasks), "not run")
        for name in comparison.tasks
    }
    axes.set_xticks(range(len(metrics)), [f"{name}\n{metric}" for name, metric in metrics.items()])
    finish(axes, comparison.title, legend=True)


def compare(paths: Sequence[Path], output: Path, table: Path | None) -> None:
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    from kraken_train import comparison  # noqa: PLC0415 (takes seconds, and the curves of one run do not need it)
    from kraken_train.evaluation.results import markdown_table  # noqa: PLC0415

    entries = [comparison.read_entry(path) for path in paths]
    entries = [
        replace(entry, label=label, run=replace(entry.run, label=label))
        for entry, label in zip(entries, comparison.unique_labels(entries, paths), strict=True)
    ]
    tables = [("", comparison.HEADER, comparison.rows(entries))]
    for suite in comparison.compare_suites(entries).values():
        tables.append((suite.title, *comparison.suite_table(suite)))  # type: ignore[arg-type]
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    for title, header, rows in tables:
        shown = Table(*header, title=title or None, title_justify="left")
        for column in shown.columns[1:]:
            column.justify = "right"
        for row in rows:
            shown.add_row(*row)
        console.print(shown, markup=False)
    for note in comparison.notes(entries):
        console.print(note, markup=False)
    if table is not None:
        if table.suffix == ".json":
            text = comparison.to_json(entries)
        else:
            parts = [f"{f'**{title}**' if title else ''}\n\n{markdown_table(h, r)}" for title, h, r in tables]
            text = "\n\n".join([*parts, *comparison.notes(entries)]).lstrip() + "\n"
        table.write_text(text, encoding="utf-8")
        print(f"wrote {table}")
    draw_comparison(entries, output)
    print(f"wrote {output}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kraken_train.report", description="Curves of training runs.")
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="folder of a training run, or export")
    parser.add_argument(
        "--output", type=Path, help="PNG to write; by default RUN_DIR/curves.png, or ./curves.png for several runs"
    )
    parser.add_argument("--table", type=Path, help="Markdown file, or JSON by its ending, to write the comparison to")
    options = parser.parse_args(arguments)
    only_one = len(options.run_dirs) == 1
    output = options.output or (options.run_dirs[0] / CURVES_FILE if only_one else Path(CURVES_FILE))
    with user_errors(output):
        if only_one and options.table is None:
            draw_curves([read_run(options.run_dirs[0])], output)
            print(f"wrote {output}")
        else:
            compare(options.run_dirs, output, options.table)


if __name__ == "__main__":
    main()
