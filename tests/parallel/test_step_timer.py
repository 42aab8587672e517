"""Seconds by phase: nested phases count for the inner one only, and nothing is counted unless asked for."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from kraken_train.parallel import step_timer
from kraken_train.parallel.step_timer import BACKWARD, EXCHANGE, FORWARD, OTHER, StepTimer


def test_nested_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.accumulate([0, 1, 2, 4, 8, 16])  # 0, 1, 3, 7, 15, 31
    monkeypatch.setattr(step_timer, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    timed = StepTimer(torch.device("cpu"))
    timed.active = True
    with timed.phase(FORWARD), timed.phase(EXCHANGE):  # 0 to 1, 1 to 3, and forward again to 7
        pass
    with timed.phase(BACKWARD):  # 15 to 31, after 8 of nothing
        pass
    assert timed.take() == {FORWARD: 5.0, EXCHANGE: 2.0, OTHER: 8.0, BACKWARD: 16.0}
    assert timed.take() == {}


def test_nothing_is_counted_unless_active() -> None:
    timed = StepTimer(torch.device("cpu"))
    with timed.phase(FORWARD):
        pass
    assert timed.take() == {}
