"""The table of all stages: measured, expected, goal, verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from kraken_train.bench.stages.record import DONE, Record
from kraken_train.bench.stages.stage import Goal, Stage

MET, MISSED, UNJUDGED, NO_GOAL = "met", "missed", "not judged on a CPU", ""
NOT_RUN, NOT_MEASURED = "not run", "not measured"


@dataclass(frozen=True)
class Row:
    stage: str
    figure: str
    measured: str
    expected: str
    goal: str
    source: str
    verdict: str


def verdict(goal: Goal, value: Any, on_cpu: bool) -> str:
    if value is None:
        return NOT_MEASURED
    if isinstance(value, str):  # why there is no figure
        return UNJUDGED if on_cpu else NOT_MEASURED
    if goal.at_least is None and goal.at_most is None:
        return NO_GOAL
    if on_cpu and not goal.on_cpu:
        return UNJUDGED
    return MET if goal.is_met(value) else MISSED


def rows(stages: Sequence[Stage], records: Mapping[str, Record | None], on_cpu: bool) -> Iterator[Row]:
    """A row for each figure, and for each goal without one."""
    for stage in stages:
        record = records.get(stage.name)
        if record is None or record.status != DONE:
            status = NOT_RUN if record is None else record.status
            yield Row(stage.name, stage.what, "", "", "", "", status)
            for title, goal in stage.goals.items():
                yield Row(stage.name, title, "", number(goal.expected), goal.limit, goal.source, NOT_MEASURED)
            continue
        for title in dict.fromkeys([*stage.goals, *record.figures]):
            value, goal = record.figures.get(title), stage.goals.get(title, Goal(""))
            found = verdict(goal, value, on_cpu) if title in stage.goals else NO_GOAL
            yield Row(stage.name, title, number(value), number(goal.expected), goal.limit, goal.source, found)


def number(value: Any) -> str:
    """Four digits, and no exponent."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def as_table(rows: Sequence[Row], title: str) -> Table:
    table = Table(title=title)
    for name in ("stage", "figure", "measured", "expected", "goal", "verdict"):
        table.add_column(name, justify="right" if name in ("measured", "expected") else "left", overflow="fold")
    before = None
    for row in rows:
        if before not in (None, row.stage):
            table.add_section()
        shown = row.stage if row.stage != before else ""
        table.add_row(shown, row.figure, row.measured, row.expected, row.goal, row.verdict)
        before = row.stage
    return table


def as_markdown(rows: Sequence[Row]) -> str:
    """The same for the documentation, with the sources."""
    lines = ["| stage | figure | measured | expected | goal | source | verdict |", "| --- " * 7 + "|"]
    for row in rows:
        cells = (row.stage, row.figure, row.measured, row.expected, row.goal, row.source, row.verdict)
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
