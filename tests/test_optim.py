"""Which weights decay, and the learning rate over a run."""

from __future__ import annotations

import math

import pytest
from helpers import small_configs
from torch import nn

from kraken_train.architectures import build_model
from kraken_train.config import ScheduleConfig
from kraken_train.optim import learning_rate, parameter_groups
from kraken_train.placement import partitions


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
    assert shared == {name for name, cut in partitions(model).items() if cut is None}
    assert {"token_embedding.weight", "position_embedding.weight", "final_norm.weight"} <= shared


def test_an_unknown_module_is_refused() -> None:
    with pytest.raises(TypeError, match="no role in weight decay"):
        parameter_groups(nn.Sequential(nn.Conv1d(1, 1, 1)), 0.1)


def test_cosine() -> None:
    schedule = ScheduleConfig("cosine", warmup_steps=10, min_ratio=0.1, decay_steps=1)
    rates = [learning_rate(schedule, 2.0, step, 110) for step in range(110)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(1.1)  # half-way between 2.0 and 0.2
    assert 0.2 < rates[109] < 0.201
    assert learning_rate(schedule, 2.0, 110, 110) == learning_rate(schedule, 2.0, 500, 110) == pytest.approx(0.2)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[35] == pytest.approx(0.2 + 0.9 * (1 + math.cos(math.pi / 4)))


def test_warmup_stable_decay() -> None:
    schedule = ScheduleConfig("wsd", warmup_steps=5, min_ratio=0.0, decay_steps=20)
    rates = [learning_rate(schedule, 1.0, step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert set(rates[4:81]) == {1.0}
    assert rates[90] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.05) and rates[100] == 0.0


def test_constant_and_no_warmup() -> None:
    schedule = ScheduleConfig("constant", warmup_steps=0, min_ratio=0.1, decay_steps=1)
    assert {learning_rate(schedule, 0.5, step, 10) for step in range(10)} == {0.5}
    cosine = ScheduleConfig("cosine", warmup_steps=0, min_ratio=0.1, decay_steps=1)
    assert learning_rate(cosine, 0.5, 0, 10) == 0.5
