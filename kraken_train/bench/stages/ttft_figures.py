"""Figures of records of `kraken_train.bench.ttft`: geometric means over their cases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kraken_train.bench.grid import REFERENCE
from kraken_train.bench.results import geometric_mean
from kraken_train.bench.stages.stage import Figures

KRAKEN = "kraken"
REAL_OVER_SIMULATED = "real over simulated time"
Results = Sequence[dict[str, Any]]  # of ttft.json
Case = tuple[str, int, int]
Times = dict[Case, float]


def times(results: Results, architecture: str, of: str = "ttft") -> Times:
    """Seconds by case."""
    return {
        (result["size"], result["context"], result["devices"]): result[of]["seconds"]
        for result in results
        if result["architecture"] == architecture
    }


def mean_ratio(above: Times, below: Times) -> float:
    return geometric_mean(above[case] / below[case] for case in above)


def best(records: Sequence[Results], architecture: str) -> Times:
    """By case, the shortest time over the records."""
    found = [times(results, architecture) for results in records]
    return {case: min(each[case] for each in found) for case in found[0]}


def exposed(results: Results) -> float:
    """Kraken's share of the first token's time that is communication which nothing hides."""
    return 1 - 1 / mean_ratio(times(results, KRAKEN), times(results, KRAKEN, "compute_alone"))


def compared(results: Results) -> Figures:
    return {
        "Kraken over standard": mean_ratio(times(results, REFERENCE), times(results, KRAKEN)) - 1,
        "Kraken: exposed communication": exposed(results),
    }


def against_best_collective(records: Sequence[Results]) -> Figures:
    """Each architecture with the collective that is best for it in each case, and Kraken's worst exposed share."""
    faster = mean_ratio(best(records, REFERENCE), best(records, KRAKEN))
    return {
        "Kraken over standard, best collective for each": faster - 1,
        "Kraken: exposed communication, with the slowest collective": max(map(exposed, records)),
    }


def real_over_simulated(real: Results, simulated: Results) -> Figures:
    architectures = dict.fromkeys(result["architecture"] for result in real)
    return {
        f"{name}, {REAL_OVER_SIMULATED}": mean_ratio(times(real, name), times(simulated, name))
        for name in architectures
    }
