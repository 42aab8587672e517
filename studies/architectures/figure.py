"""The figure of the verdict: loss over tokens and over predicted time, a column for each size."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kraken_train.bench.grid import REFERENCE
from kraken_train.common.ticks import label_log_axis
from kraken_train.reporting.curves import finish, save
from studies.architectures.comparison import Comparison, Trained
from studies.spread import standard_error


def draw(found: Mapping[str, Mapping[str, Trained]], timed: Mapping[str, list[Comparison]], path: Path) -> None:
    """`found` by size and architecture; `timed` has the comparisons at equal time, by size. Raises DataError."""
    rows = 1 + len(next(iter(timed.values())))
    figure = Figure(figsize=(4.2 * len(found) + 0.6, 3.4 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, len(found), squeeze=False)
    for column, (size, architectures) in enumerate(found.items()):
        draw_losses(panels[0][column], architectures, dict.fromkeys(architectures, 1.0))
        finish(panels[0][column], f"{size}: over tokens", legend=False)
        panels[0][column].set_xlabel("tokens, millions")
        for row, comparison in enumerate(timed[size], start=1):
            panel = panels[row][column]
            draw_losses(panel, architectures, comparison.relative_seconds or {})
            tokens = sorted(architectures[REFERENCE].by_tokens)[-2] / 1e6
            panel.axvline(tokens, color="black", linewidth=0.8, linestyle=":")
            finish(panel, f"{size}: over predicted time, {comparison.place}", legend=False)
            panel.set_xlabel(f"time, in that of a million tokens of {REFERENCE}")
    for line in panels:
        line[0].set_ylabel("validation loss (nats per token)")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4 * len(found)), frameon=False)
    save(figure, path)


def draw_losses(panel: Axes, architectures: Mapping[str, Trained], scale: Mapping[str, float]) -> None:
    """A line for each architecture with standard errors, over its millions of tokens times its scale.

    Forms of an architecture have its colour, and dashes.
    """
    for name, one in architectures.items():
        losses = dict(sorted(one.by_tokens.items()))
        panel.errorbar(
            [tokens / 1e6 * scale[name] for tokens in losses],
            [statistics.mean(values) for values in losses.values()],
            [standard_error(values) or 0.0 for values in losses.values()],
            color=one.model.color, linestyle="-" if name == one.model.architecture else "--",
            marker="o", markersize=3, capsize=2, linewidth=1.2, label=name,
        )  # fmt: skip
    panel.set_xscale("log", base=2)
    label_log_axis(panel.xaxis, base=2)
