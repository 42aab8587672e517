"""Verdicts."""

from __future__ import annotations

import pytest

from kraken_train.bench.stages.record import DONE, FAILED, Record
from kraken_train.bench.stages.stage import Goal, Stage
from kraken_train.bench.stages.table import MET, MISSED, NO_GOAL, NOT_MEASURED, NOT_RUN, UNJUDGED, as_markdown, rows

RATIO = Goal("a source", expected=1.8, at_least=1.9)


def stage(goals: dict[str, Goal]) -> Stage:
    return Stage("speed", 1, "what it is", lambda place: [], lambda place: {}, goals)


def record(status: str = DONE, **figures: object) -> Record:
    return Record("speed", status, 1.0, (), figures, "", "a device", "now")


@pytest.mark.parametrize(
    ("goal", "value", "on_cpu", "expected"),
    [
        (RATIO, 1.9, False, MET),
        (RATIO, 1.89, False, MISSED),
        (RATIO, 2.5, True, UNJUDGED),
        (RATIO, None, False, NOT_MEASURED),
        (Goal("", at_most=0.05), 0.06, False, MISSED),
        (Goal("", at_most=0.05, on_cpu=True), 0.04, True, MET),
        (Goal("", at_least=True), True, False, MET),
        (Goal("", at_least=True, on_cpu=True), False, True, MISSED),
        (Goal("", at_least=0.95, at_most=1.05), 1.1, False, MISSED),
        (Goal("", expected=3.0), 2.0, False, NO_GOAL),
    ],
)
def test_verdict(goal: Goal, value: object, on_cpu: bool, expected: str) -> None:
    (row,) = rows([stage({"a figure": goal})], {"speed": record(**{"a figure": value})}, on_cpu)
    assert row.verdict == expected


def test_rows_of_a_stage_without_figures() -> None:
    for found, expected in ((None, NOT_RUN), (record(FAILED), FAILED)):
        first, second = rows([stage({"ratio": RATIO})], {"speed": found}, False)
        assert (first.stage, first.verdict) == ("speed", expected)
        assert (second.figure, second.verdict, second.goal) == ("ratio", NOT_MEASURED, "at least 1.9")


def test_markdown_has_all_columns() -> None:
    found = list(rows([stage({"ratio": RATIO})], {"speed": record(ratio=2.0, backend="a|b")}, False))
    table = as_markdown(found)
    assert "| speed | ratio | 2 | 1.8 | at least 1.9 | a source | met |" in table
    assert "a\\|b" in table
