"""Lengths of time, for people."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """`3 d 4 h`, `5 h 12 min`, `8 min` or `30 s`."""
    seconds = max(0, int(seconds))
    for size, unit, part, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit} {seconds % size // part} {smaller}"
    return f"{seconds // 60} min" if seconds >= 60 else f"{seconds} s"
