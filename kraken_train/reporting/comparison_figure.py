"""The figure of a comparison: curves of the runs, and below them perplexities and results of suites."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kraken_train.common.ticks import label_log_axis
from kraken_train.reporting.comparison import Entry, SuiteComparison, common_perplexity, compare_suites
from kraken_train.reporting.curves import draw_suite_scores, fill_curves, finish, save


def draw_comparison(entries: Sequence[Entry], output: Path) -> None:
    """Draw curves, perplexity over number of parameters, and results of suites. Raises DataError."""
    colors = {entry.label: f"C{index % 10}" for index, entry in enumerate(entries)}
    perplexities = {
        entry.label: (entry.model.num_parameters, found["perplexity"])
        for entry in entries
        if entry.model is not None and (found := common_perplexity(entries).get(entry.label))
    }
    suites = compare_suites(entries)
    runs = [entry.run for entry in entries]
    with_scores = any(run.suite_scores() for run in runs)
    extra_rows = with_scores + bool(perplexities) + len(suites)
    figure = Figure(figsize=(12, 7.5 + 4.0 * extra_rows), layout="constrained")
    parts = figure.subfigures(1 + extra_rows, 1, height_ratios=[7.5] + [4.0] * extra_rows, squeeze=False)[:, 0]
    fill_curves(parts[0], runs)
    remaining = list(parts[1:])
    if with_scores:
        draw_suite_scores(remaining.pop(0).subplots(), runs)
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
    label_log_axis(axes.xaxis, text=lambda value: f"{value / 1e6:g}M")
    finish(axes, "perplexity", legend=True)


def draw_suite(axes: Axes, comparison: SuiteComparison, colors: dict[str, str]) -> None:
    """Bars with standard errors: one group per task, one bar per run."""
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
