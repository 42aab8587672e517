"""The figure that shows a run going wrong: sizes of weights, updates and activations over steps, a line for each layer.

They are root mean squares that `kraken_train.training.norms` has measured.
"""

from __future__ import annotations

import functools
import itertools
import operator
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from kraken_train.common.errors import DataError
from kraken_train.common.ticks import label_log_axis
from kraken_train.reporting.curves import finish, save
from kraken_train.run.metrics import Run, rms_key

LAYER = "layer_"
COLUMNS = 3
COLOURS = mpl.colormaps["viridis"]
OTHER_COLOURS = ("C1", "C3", "C6", "C5", "C7")  # of places beside the layers
# Title, and the kinds of sizes: one, or two of which the first is divided by the second.
PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("weights", ("weight",)),
    ("update over weights", ("update", "weight")),
    ("gains of norms", ("gain",)),
    ("activations: residual streams", ("activation",)),
    ("activations: a stream's own attention", ("attention",)),
    ("exchanged sum over own attention", ("sum", "attention")),
)


def draw_norms(run: Run, output: Path) -> None:
    """Draw the panels that the run has sizes for. Raises DataError where it has none."""
    panels = [(title, kinds) for title, kinds in PANELS if run.rms_places(kinds[0])]
    if not panels:
        raise DataError(
            f"run {run.label} has measured no norms yet; train with norms.every=100, the number of steps between two "
            "measurements, and wait for the first one"
        )
    places = list(dict.fromkeys(place for _, kinds in panels for place in run.rms_places(kinds[0])))
    layers = sorted({int(place.removeprefix(LAYER)) for place in places if place.startswith(LAYER)})
    depth = Normalize(0, max([1, *layers]))
    colors: dict[str, Any] = {f"{LAYER}{layer}": COLOURS(depth(layer)) for layer in layers}
    others = [place for place in places if place not in colors]
    colors |= dict(zip(others, itertools.cycle(OTHER_COLOURS), strict=False))
    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(13, 3.6 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, COLUMNS, squeeze=False, sharex=True)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, kinds) in zip(grid.flat, panels, strict=False):
        for place in run.rms_places(kinds[0]):
            style = "-" if place.startswith(LAYER) else "--"
            axes.plot(*sizes(run, kinds, place), color=colors[place], linestyle=style, linewidth=1)
        axes.set_yscale("log")
        label_log_axis(axes.yaxis)
        axes.set_xlabel("optimizer step")
        finish(axes, title, legend=False)
    lines = [Line2D([], [], color=colors[place], linestyle="--", label=place.replace("_", " ")) for place in others]
    figure.legend(handles=lines, loc="outside lower center", ncols=6, frameon=False)
    if layers:
        whole = MaxNLocator(integer=True)
        bar = figure.colorbar(ScalarMappable(depth, COLOURS), ax=list(grid.flat), pad=0.01, aspect=40, ticks=whole)
        bar.set_label("layer, counted from 0")
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    figure.suptitle(f"{run.label}: root mean squares of the elements")
    save(figure, output)


def sizes(run: Run, kinds: tuple[str, ...], place: str) -> tuple[list[float], list[float]]:
    """(steps, values) of one kind, or of one divided by another. Zeros have no place on a logarithmic axis."""
    of_kinds = [dict(zip(*run.series(rms_key(kind, place)), strict=True)) for kind in kinds]
    steps = [step for step in of_kinds[0] if all(values.get(step, 0) > 0 for values in of_kinds)]
    return steps, [functools.reduce(operator.truediv, (values[step] for values in of_kinds)) for step in steps]
