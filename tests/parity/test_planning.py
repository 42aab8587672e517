"""What `kraken_train.planning` predicts against what real training steps on real ranks take and say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from kraken_train.planning.memory import predict_memory, shards
from kraken_train.planning.traffic import predict_traffic
from parity.memory_checks import CASES, LEAST_BYTES, QUICK, Case

NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]


def result(launched: Callable[..., Any], name: str) -> dict[str, Any]:
    ranks = CASES[name].ranks
    return launched(ranks)["memory"][name] if name in QUICK else launched(f"slow memory {ranks}")["more-memory"][name]


@pytest.mark.parametrize("name", NAMES)
def test_memory(launched: Callable[..., Any], name: str) -> None:
    measured, case = result(launched, name), CASES[name]
    predicted = predict_memory(case.model, case.layout)
    assert shards(case.model, case.layout).elements == measured["parameters"]
    # The tracker counts every tensor, so only what the model of DeepSpeed leaves out can differ.
    assert predicted.total == pytest.approx(measured["peak"], rel=0.02)
    kept = predicted.weights + predicted.optimizer
    if case.layout.keeps_accumulator:
        kept += predicted.gradients
    assert kept == pytest.approx(measured["state"], rel=0.001)
    assert predicted.total > 1.1 * kept, "nothing but the state is tested"


@pytest.mark.parametrize("name", NAMES)
def test_traffic(launched: Callable[..., Any], name: str) -> None:
    case = CASES[name]
    real: Counter[tuple[str, int]] = Counter()
    for kind, size, number in result(launched, name)["collectives"]:
        if not is_over_one_copy(case, kind, size):
            real[group(kind, size)] += number if kind != "broadcast" else size
    predicted: Counter[tuple[str, int]] = Counter()
    for collective in predict_traffic(case.model, case.layout):
        if collective.size >= LEAST_BYTES:
            predicted[group(collective.kind, collective.size)] += (
                collective.count if collective.kind != "broadcast" else collective.bytes
            )
    assert predicted == real


def group(kind: str, size: int) -> tuple[str, int]:
    """ZeRO-2 hands out shared gradients parameter by parameter: of broadcasts only all bytes are compared."""
    return (kind, 0) if kind == "broadcast" else (kind, size)


def is_over_one_copy(case: Case, kind: str, size: int) -> bool:
    """DeepSpeed's sum of the gradients over a single copy."""
    alone = case.layout.data_parallel_size == 1 and not case.layout.keeps_accumulator
    return alone and kind == "all-reduce" and size == 4 * shards(case.model, case.layout).elements
