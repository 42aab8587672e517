"""Which weights decay, and the learning rate over a run."""

from __future__ import annotations

import math
from typing import Any

import pytest
from helpers import small_configs
from torch import nn

from kraken_train.model.registry import build_model
from kraken_train.parallel.sharding import sharded_dims
from kraken_train.recipe.batch_ramp import Position
from kraken_train.recipe.schedules import ConstantSchedule, CosineSchedule, WSDSchedule
from kraken_train.training.optim import describe_jump, parameter_groups, reduce_bucket_elements


@pytest.mark.parametrize(
    ("sizes", "zero_stage", "elements"),
    [
        ([3, 4], 1, 7), ([3, 4], 2, 7),  # all gradients of a small model at once
        ([60_000_000] * 10, 1, 500_000_000), ([600, 24_999_500, 600], 2, 25_000_000),
        ([38_000_000, 10_000_000], 2, 38_000_000),  # the largest gradient fits
    ],
)  # fmt: skip
def test_buckets_of_gradients(sizes: list[int], zero_stage: int, elements: int) -> None:
    assert reduce_bucket_elements(sizes, zero_stage) == elements


@pytest.mark.parametrize("architecture", small_configs())
def test_decay_goes_by_role_and_covers_each_parameter_once(architecture: str) -> None:
    model = build_model(small_configs()[architecture])
    groups = parameter_groups(model, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(names)
    undecayed = [p for group in groups for p in group["params"] if group["weight_decay"] == 0.0]
    assert {group["weight_decay"] for group in groups} == {0.1, 0.0}
    assert {names[id(p)] for p in undecayed} == {name for name in names.values() if "norm" in name}
    if architecture == "kraken":
        assert any(p.dim() == 2 for p in undecayed)  # a stacked norm looks like a matrix
    shared = {names[id(p)] for group in groups if group["shared"] for p in group["params"]}
    assert shared == {name for name, cut in sharded_dims(model).items() if cut is None}
    assert {"token_embedding.weight", "final_norm.weight"} <= shared


def test_an_unknown_module_is_refused() -> None:
    with pytest.raises(TypeError, match="no role in weight decay"):
        parameter_groups(nn.Sequential(nn.Conv1d(1, 1, 1)), 0.1)


def test_cosine() -> None:
    schedule = CosineSchedule(warmup_steps=10, min_ratio=0.1)
    rates = [schedule.learning_rate(2.0, step, 110) for step in range(110)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(1.1)  # half-way between 2.0 and 0.2
    assert 0.2 < rates[109] < 0.201
    assert schedule.learning_rate(2.0, 110, 110) == schedule.learning_rate(2.0, 500, 110) == pytest.approx(0.2)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[35] == pytest.approx(0.2 + 0.9 * (1 + math.cos(math.pi / 4)))


def test_warmup_stable_decay() -> None:
    schedule = WSDSchedule(warmup_steps=5, min_ratio=0.0, decay_steps=20)
    rates = [schedule.learning_rate(1.0, step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert set(rates[4:81]) == {1.0}
    assert rates[90] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.05)
    assert rates[100] == 0.0


def test_constant_and_no_warmup() -> None:
    schedule = ConstantSchedule(warmup_steps=0)
    assert {schedule.learning_rate(0.5, step, 10) for step in range(10)} == {0.5}
    cosine = CosineSchedule(warmup_steps=0, min_ratio=0.1)
    assert cosine.learning_rate(0.5, 0, 10) == 0.5


def settings_of(name: str = "cosine", lr: float = 1.0, max_steps: int = 100, **schedule: Any) -> dict[str, Any]:
    of_all = {"name": name, "warmup_steps": 10, "min_ratio": 0.1, "decay_steps": 20, **schedule}
    known = {"cosine": 3, "wsd": 4, "constant": 2}[name]
    schedule = {key: of_all[key] for key in list(of_all)[:known]}
    return {"optim": {"lr": lr}, "schedule": schedule, "max_steps": max_steps, "global_batch_size": 8}


@pytest.mark.parametrize(
    ("before", "now", "step", "rates"),
    [
        (settings_of(), settings_of(max_steps=190), 100, ("0.1", "0.55")),  # a cosine that was at its end
        (settings_of(), settings_of(max_steps=190), 10, None),  # at the peak of both
        (settings_of(), settings_of(max_steps=190), 5, None),  # within the warm-up
        (settings_of(), settings_of(), 55, None),
        (settings_of(), settings_of(max_steps=101), 20, None),  # hardly another rate
        (settings_of(), settings_of(min_ratio=0.2), 100, ("0.1", "0.2")),
        (settings_of(), settings_of("constant"), 55, ("0.55", "1")),
        (settings_of(), settings_of("wsd"), 55, ("0.55", "1")),
        (settings_of("wsd"), settings_of("wsd", max_steps=200), 90, ("0.55", "1")),
        (settings_of("wsd"), settings_of("wsd", max_steps=200), 80, None),
        (settings_of("wsd", min_ratio=0.0), settings_of("wsd", max_steps=110, min_ratio=0.0), 100, ("0", "0.5")),
        (settings_of("wsd", decay_steps=1), settings_of("wsd", decay_steps=40), 80, ("1", "0.55")),
        (settings_of("constant"), settings_of("constant", max_steps=200, min_ratio=0.5), 99, None),
        (settings_of("constant"), settings_of("constant", lr=3e-4), 99, ("1", "0.0003")),
        (settings_of(), settings_of(warmup_steps=20), 9, ("1", "0.5")),
    ],
)
def test_a_jump_at_a_resumption_is_told(
    before: dict[str, Any], now: dict[str, Any], step: int, rates: tuple[str, str] | None
) -> None:
    told = describe_jump(before, now, Position(step, 0), context_length=16)
    if rates is None:
        assert told is None
    else:
        assert told is not None
        assert f"at step {step + 1}: {rates[0]} by the settings of the checkpoint, {rates[1]} by those of now" in told
