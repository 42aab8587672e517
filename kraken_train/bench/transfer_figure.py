"""The figures of `kraken_train.bench.transfer`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from kraken_train.common.ticks import label_log_axis
from kraken_train.recipe.optimizers import PARAMETRIZATIONS

TITLES = dict(zip(PARAMETRIZATIONS, ("standard", "muP"), strict=True))
COLORS = dict(zip(PARAMETRIZATIONS, ("#d1495b", "#2b4c7e"), strict=True))
# Text stays text, and equal data make equal files.
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "transfer"}


def draw_coordinates(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """The changes of activations over the size, relative to the smallest: a column for each dimension in which models
    grow, a row for each parametrization."""
    dimensions = list(dict.fromkeys(row["dimension"] for row in rows))
    labels = list(dict.fromkeys(row["activation"] for row in rows))
    figure = Figure(figsize=(3.4 * len(dimensions), 6.4), layout="constrained")
    panels = figure.subplots(len(PARAMETRIZATIONS), len(dimensions), squeeze=False, sharex=True, sharey=True)
    for line, parametrization in zip(panels, PARAMETRIZATIONS, strict=True):
        for panel, dimension in zip(line, dimensions, strict=True):
            for index, label in enumerate(labels):
                points = {
                    row["factor"]: row["change"]
                    for row in rows
                    if (row["dimension"], row["parametrization"], row["activation"])
                    == (dimension, parametrization, label)
                }
                first = points[min(points)]
                values = [value / first for value in points.values()]
                panel.plot(list(points), values, color=f"C{index}", marker="o", markersize=3, label=label)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log", base=2)
            label_log_axis(panel.xaxis, base=2)
            label_log_axis(panel.yaxis, base=2)
            panel.set_title(f"{TITLES[parametrization]}: {dimension}", loc="left", fontsize="medium")
            panel.grid(alpha=0.25)
        line[0].set_ylabel("change, relative to the smallest")
    for panel in panels[-1]:
        panel.set_xlabel("times the smallest")
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    figure.suptitle(title, fontsize="medium")
    save(figure, path)


def draw_sweep(rows: Sequence[dict[str, Any]], small: str, factor: int, path: Path) -> None:
    """The loss over the learning rate: a panel for each dimension in which the large model is larger than `small`, in
    which a star marks the best learning rate of each curve."""
    dimensions = [name for name in dict.fromkeys(row["model"] for row in rows) if name != small]
    figure = Figure(figsize=(3.6 * len(dimensions), 3.8), layout="constrained")
    panels = figure.subplots(1, len(dimensions), squeeze=False, sharey=True)[0]
    for panel, dimension in zip(panels, dimensions, strict=True):
        for name in PARAMETRIZATIONS:
            for model, label, line in ((small, small, "--"), (dimension, f"{dimension} x {factor}", "-")):
                of_curve = [row for row in rows if (row["model"], row["parametrization"]) == (model, name)]
                points = {row["lr"]: row["loss"] for row in of_curve}
                best = min(points, key=lambda lr: points[lr])
                panel.plot(list(points), list(points.values()), color=COLORS[name], linestyle=line,
                           label=f"{TITLES[name]}, {label}")  # fmt: skip
                panel.plot([best], [points[best]], color=COLORS[name], marker="*", markersize=12)
        panel.set_xscale("log")
        label_log_axis(panel.xaxis)
        panel.set_title(f"{dimension} x {factor}", loc="left", fontsize="medium")
        panel.set_xlabel("learning rate")
        panel.grid(alpha=0.25)
        panel.legend(frameon=False, fontsize="small")
    panels[0].set_ylabel("loss (nats per byte)")
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    with mpl.rc_context(STYLE):
        figure.savefig(path, metadata={"Date": None})
