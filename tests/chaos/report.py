"""What the cases have shown: a table of kinds and outcomes, and how to repeat each failure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from chaos.faults import FINISHED, KILLED, MESSAGE, REFUSED, SAVED
from chaos.harness import NOT_STRUCK, Result

COLUMNS = {
    FINISHED: "finished",
    SAVED: "saved, continued",
    MESSAGE: "message, continued",
    KILLED: "killed, continued",
    REFUSED: "refused, repaired",
    "failed": "FAILED",
}


def table(results: Iterable[Result], impossible: Mapping[str, str]) -> str:
    """A line for each kind of fault: how often it was tried, and with which outcome."""
    counts: dict[str, Counter[str]] = {}
    for result in results:
        column = "failed" if result.problems or result.outcome == NOT_STRUCK else result.outcome
        counts.setdefault(result.kind, Counter())[column] += 1
    rows = [["fault", "cases", *COLUMNS.values()]]
    for kind in sorted(counts):
        rows.append([kind, str(counts[kind].total()), *(str(counts[kind][column] or "") for column in COLUMNS)])
    total = sum(counts.values(), Counter())
    rows.append(["all", str(total.total()), *(str(total[column] or "") for column in COLUMNS)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *(f"{kind}  not possible here: {reason}" for kind, reason in sorted(impossible.items()))])


def describe(result: Result) -> str:
    """A line for a case; what has happened and how to repeat it, if it failed."""
    line = f"{result.kind} {result.seed} in {result.victim}: {'FAILED' if result.problems else result.outcome}"
    if not result.problems:
        return line
    details = [f"  {text}" for text in result.story] + [f"  PROBLEM: {text}" for text in result.problems]
    return "\n".join([line, *details, f"  again: {reproducer(result)}"])


def reproducer(result: Result) -> str:
    return f"make chaos KIND={result.kind} CASE={result.seed}"
