"""The tables of `kraken_train.bench.topology`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from rich.table import Table

from kraken_train.bench.topology_row import QUANTITIES, Row, by_place, fastest
from kraken_train.model.architecture import ModelConfig


def as_table(rows: Sequence[Row], quantity: str) -> Table:
    """A line for each place: the times of the architectures in ms, and which is fastest."""
    places = by_place(rows)
    names = list(dict.fromkeys(row.architecture for row in rows))
    table = Table(title=f"Predicted {QUANTITIES[quantity]}, ms (exposed communication in %)")
    for heading in ("size", "devices", "interconnect", "batch", "context", *names, "fastest"):
        table.add_column(heading, justify="right")
    for place, of_place in places.items():
        times = [getattr(of_place[name], quantity) for name in names]
        cells = [f"{1e3 * time.total:.4g} ({time.exposed / time.total:.0%})" for time in times]
        where = (place.size, str(place.degree), place.interconnect, str(place.batch_size), str(place.context))
        table.add_row(*where, *cells, fastest(of_place, quantity))
    return table


def crossings(rows: Sequence[Row], quantity: str) -> list[str]:
    """A line for each place but its context: which architecture is fastest from which context on."""
    lines: dict[str, list[str]] = {}
    last: dict[str, str] = {}
    for place, of_place in sorted(by_place(rows).items(), key=lambda item: item[0].context):
        name, where = fastest(of_place, quantity), place.without_context
        if last.get(where) != name:
            lines.setdefault(where, []).append(f"{name} from {place.context} tokens")
            last[where] = name
    return [f"{where}: {', '.join(found)}" for where, found in lines.items()]


def collectives(models: Sequence[ModelConfig], title: str) -> Table:
    """What each architecture sums over the devices in a forward pass."""
    table = Table(title=f"{title}: all-reduces of a forward pass")
    for heading in ("architecture", "all-reduces", "behind computation", "waited for", "values per token"):
        table.add_column(heading, justify="right")
    for model in models:
        total = sum(reduced.count for reduced in model.all_reduces) // 2  # the other half is in the backward pass
        hidden = sum(reduced.count for reduced in model.all_reduces if reduced.behind is not None) // 2
        table.add_row(model.architecture, str(total), str(hidden), str(total - hidden), str(model.hidden_size))
    return table


def comparison(predicted: Sequence[Row], measured: Sequence[Row], quantity: str, reference: str) -> Table:
    """Times relative to the reference's, as predicted and as measured, and the measured times in ms."""
    table = Table(title=f"{QUANTITIES[quantity]}, relative to {reference}: predicted, measured (measured ms)")
    names = list(dict.fromkeys(row.architecture for row in measured))
    for heading in ("size", "devices", "interconnect", "batch", "context", *names):
        table.add_column(heading, justify="right")
    expected, found = by_place(predicted), by_place(measured)
    for place, rows in found.items():
        where = (place.size, str(place.degree), place.interconnect, str(place.batch_size), str(place.context))
        cells = [
            f"{relative(expected[place], name, reference, quantity):.2f}, "
            f"{relative(rows, name, reference, quantity):.2f} ({1e3 * rows[name].seconds(quantity):.4g})"
            for name in names
        ]
        table.add_row(*where, *cells)
    return table


def agreement(predicted: Sequence[Row], measured: Sequence[Row], quantity: str, reference: str) -> str:
    """By how much measured ratios to the reference differ from predicted ones."""
    expected, found = by_place(predicted), by_place(measured)
    differences = [
        abs(relative(rows, name, reference, quantity) / relative(expected[place], name, reference, quantity) - 1)
        for place, rows in found.items()
        for name in rows
        if name != reference
    ]
    if not differences:
        return f"{QUANTITIES[quantity]}: only {reference} is measured"
    return (
        f"{QUANTITIES[quantity]}: ratios to {reference} differ from the predicted ones by {np.median(differences):.1%} "
        f"(median), {max(differences):.1%} at most"
    )


def relative(rows: Mapping[str, Row], name: str, reference: str, quantity: str) -> float:
    return rows[name].seconds(quantity) / rows[reference].seconds(quantity)
