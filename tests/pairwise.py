"""Combinations of settings such that any two values of any two settings meet in one of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any


def pairwise(settings: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """A covering array of strength 2, built greedily (AETG, IEEE Transactions on Software Engineering 23(7), 1997)."""
    names = list(settings)
    todo = {
        frozenset({(a, i), (b, j)})
        for a, b in itertools.combinations(names, 2)
        for i in range(len(settings[a]))
        for j in range(len(settings[b]))
    }
    chosen = []
    while todo:
        row = dict(min(todo, key=sorted))  # begins with a pair that is missing
        for name in names:
            if name not in row:
                row[name] = max(range(len(settings[name])), key=partial(new_pairs, todo, row, name))
        todo -= {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
        chosen.append({name: settings[name][row[name]] for name in names})
    return chosen


def new_pairs(todo: set[frozenset[tuple[str, int]]], row: dict[str, int], name: str, value: int) -> int:
    """Missing pairs that `row` would cover if `name` had this value."""
    return sum(frozenset({(name, value), other}) in todo for other in row.items())
