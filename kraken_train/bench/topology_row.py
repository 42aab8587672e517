"""A row of `kraken_train.bench.topology`: what is predicted or measured of an architecture in one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kraken_train.planning.layout import TrainingLayout
from kraken_train.planning.serving_time import PassTime

# Attributes of a row, with their names in tables and figures.
QUANTITIES = {"step": "training step", "first_token": "time to first token", "next_token": "time per output token"}


@dataclass(frozen=True)
class Place:
    """Where architectures are compared."""

    size: str
    degree: int
    interconnect: str
    batch_size: int
    context: int

    @property
    def without_context(self) -> str:
        sequences = "1 sequence" if self.batch_size == 1 else f"{self.batch_size} sequences"
        devices = "1 device" if self.degree == 1 else f"{self.degree} devices"
        return f"{self.size}, {devices}, {self.interconnect}, {sequences}"


@dataclass(frozen=True)
class Row:
    """Of one architecture in one place, in seconds."""

    architecture: str
    place: Place
    step: PassTime
    first_token: PassTime
    next_token: PassTime

    def seconds(self, quantity: str) -> float:
        time: PassTime = getattr(self, quantity)
        return time.total


def training_layout(place: Place, precision: str) -> TrainingLayout:
    """One copy of the model, and one micro-batch in a step."""
    return TrainingLayout(place.degree, 1, place.batch_size, 1, vocab_parallel=place.degree > 1, precision=precision)


def by_place(rows: Sequence[Row]) -> dict[Place, dict[str, Row]]:
    places: dict[Place, dict[str, Row]] = {}
    for row in rows:
        places.setdefault(row.place, {})[row.architecture] = row
    return places


def fastest(rows: dict[str, Row], quantity: str) -> str:
    return min(rows, key=lambda name: rows[name].seconds(quantity))
