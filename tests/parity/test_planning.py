"""What `kraken_train.planning` predicts against what real training steps on real ranks take and say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from kraken_train.planning.memory import FP32, Memory, Shards, predict_memory, shards
from kraken_train.planning.teacher import teacher_traffic
from kraken_train.planning.traffic import predict_traffic
from parity.memory_checks import CASES, LEAST_BYTES, QUICK, Case

NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]


def result(launched: Callable[..., Any], name: str) -> dict[str, Any]:
    ranks = CASES[name].ranks
    return launched(ranks)["memory"][name] if name in QUICK else launched(f"slow memory {ranks}")["more-memory"][name]


@pytest.mark.parametrize("name", NAMES)
def test_memory(launched: Callable[..., Any], name: str) -> None:
    measured, case = result(launched, name), CASES[name]
    with case.with_bucket():
        predicted, own = predict_memory(case.model, case.layout), shards(case.model, case.layout)
        has_buckets = own.reduces_during_backward
    assert own.elements == measured["parameters"]
    assert has_buckets == (case.bucket is not None)
    if has_buckets:  # the largest bucket need not become full when most else is alive
        assert 0.99 * measured["peak"] < predicted.total < 1.12 * measured["peak"]
    else:  # the tracker counts every tensor, so only what the model of DeepSpeed leaves out can differ
        in_gloo = during_gloos_sum(case, predicted, own)
        assert max(predicted.total, in_gloo) == pytest.approx(measured["peak"], rel=0.02)
    kept = predicted.weights + predicted.optimizer
    if case.layout.keeps_accumulator:
        kept += predicted.gradients
    assert kept == pytest.approx(measured["state"], rel=0.001)
    assert predicted.total > 1.1 * kept, "nothing but the state is tested"


def during_gloos_sum(case: Case, predicted: Memory, own: Shards) -> int:
    """Bytes while gloo scatters the sums of a group's gradients, of which it makes a copy; NCCL makes none."""
    if not case.layout.keeps_accumulator or case.layout.data_parallel_size == 1:
        return 0
    in_bf16 = 2 * own.elements if case.layout.accumulation_steps == 1 else 0
    return predicted.weights + predicted.optimizer + predicted.gradients + in_bf16 + FP32 * max(own.padded)


@pytest.mark.parametrize("name", NAMES)
def test_traffic(launched: Callable[..., Any], name: str) -> None:
    case = CASES[name]
    real: Counter[tuple[str, int]] = Counter()
    for kind, size, number in result(launched, name)["collectives"]:
        if not is_over_one_copy(case, kind, size):
            real[group(kind, size)] += number if kind != "broadcast" else size
    with case.with_bucket():
        traffic = predict_traffic(case.model, case.layout)
        if (teacher := case.layout.teacher_of(case.model)) is not None:
            traffic += teacher_traffic(teacher, case.layout)
    predicted: Counter[tuple[str, int]] = Counter()
    for collective in traffic:
        if collective.size >= LEAST_BYTES:
            predicted[group(collective.kind, collective.size)] += (
                collective.count if collective.kind != "broadcast" else collective.bytes
            )
    if case.bucket is not None:  # which gradients come together in a bucket is not predicted
        assert sum_bytes(predicted) == pytest.approx(sum_bytes(real), rel=1e-5)
        predicted, real = (without_sums(collectives) for collectives in (predicted, real))
    assert predicted == real


@pytest.mark.slow
@pytest.mark.parametrize("name", ["short-2-copies-zero2", "short-2-copies-zero2-fp32"])
def test_buckets_save_memory(launched: Callable[..., Any], name: str) -> None:
    """Beside the same training with one bucket for all gradients."""
    with_buckets = name.replace("2-copies-zero2", "buckets")
    assert result(launched, with_buckets)["peak"] < 0.9 * result(launched, name)["peak"]


def sum_bytes(collectives: Counter[tuple[str, int]]) -> int:
    return sum(size * number for (kind, size), number in collectives.items() if kind == "all-reduce")


def without_sums(collectives: Counter[tuple[str, int]]) -> Counter[tuple[str, int]]:
    return Counter({key: number for key, number in collectives.items() if key[0] != "all-reduce"})


def group(kind: str, size: int) -> tuple[str, int]:
    """ZeRO-2 hands out shared gradients parameter by parameter: of broadcasts only all bytes are compared."""
    return (kind, 0) if kind == "broadcast" else (kind, size)


def is_over_one_copy(case: Case, kind: str, size: int) -> bool:
    """DeepSpeed's sum of the gradients over a single copy."""
    alone = case.layout.data_parallel_size == 1 and not case.layout.keeps_accumulator
    return alone and kind == "all-reduce" and size == 4 * shards(case.model, case.layout).elements
