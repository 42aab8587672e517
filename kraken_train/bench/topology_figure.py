"""The figure of `kraken_train.bench.topology`: times relative to one architecture's over the context."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from kraken_train.bench.topology_row import QUANTITIES, Place, Row
from kraken_train.common.ticks import label_log_axis


def draw(
    predicted: Mapping[Place, Mapping[str, Row]],
    measured: Mapping[Place, Mapping[str, Row]],
    colors: Mapping[str, str],
    reference: str,
    title: str,
    path: Path,
) -> None:
    """A row of panels per quantity, a column per interconnect, a line per architecture in `colors`.

    Lines are predictions. Points are measurements, or without any mark the contexts of the predictions.
    """
    interconnects = list(dict.fromkeys(place.interconnect for place in predicted))
    figure = Figure(figsize=(3.6 * len(interconnects) + 1, 2.6 * len(QUANTITIES) + 1), layout="constrained")
    panels = figure.subplots(len(QUANTITIES), len(interconnects), squeeze=False, sharex=True, sharey="row")
    for line, (quantity, name) in zip(panels, QUANTITIES.items(), strict=True):
        for panel, interconnect in zip(line, interconnects, strict=True):
            for architecture, color in colors.items():
                expected = ratios(predicted, interconnect, quantity, architecture, reference)
                found = ratios(measured, interconnect, quantity, architecture, reference)
                panel.plot(*expected, color=color, marker="" if measured else "o", markersize=3, label=architecture)
                panel.plot(*found, color=color, marker="o", markersize=5, linestyle="none")
            panel.set_xscale("log", base=2)
            label_log_axis(panel.xaxis, base=2, text="{:,.0f}".format)
            panel.grid(alpha=0.3)
            panel.set_title(interconnect, fontsize=10)
        line[0].set_ylabel(f"{name},\nrelative to {reference}", fontsize=9)
    for panel in panels[-1]:
        panel.set_xlabel("context, tokens")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)


def ratios(
    places: Mapping[Place, Mapping[str, Row]], interconnect: str, quantity: str, architecture: str, reference: str
) -> tuple[list[int], list[float]]:
    """(contexts, times relative to the reference's)."""
    of_link = {place.context: rows for place, rows in places.items() if place.interconnect == interconnect}
    contexts = sorted(of_link)
    return contexts, [
        of_link[context][architecture].seconds(quantity) / of_link[context][reference].seconds(quantity)
        for context in contexts
    ]
