"""The rules of muP, and the sizes of the base that they need."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from helpers import small_configs

from kraken_train.common.errors import ConfigError
from kraken_train.model.config import GPTConfig, KrakenConfig, ModelConfig
from kraken_train.model.initialization import scale_initial_weights, weight_kind
from kraken_train.model.registry import build_model
from kraken_train.model.weight_kind import WeightKind
from kraken_train.recipe.optimizers import AdamWConfig
from kraken_train.recipe.parametrization import STANDARD, Parametrization, parametrization_of

OPTIM = AdamWConfig(1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0)
MUP = dataclasses.replace(OPTIM, parametrization="mup", base_hidden_size=64, base_num_layers=2, base_num_sub_layers=4)
KRAKEN = KrakenConfig(4, 2, 64, 2, vocab_size=128, context_length=16)


def initial_weights(config: ModelConfig, optim: AdamWConfig) -> dict[str, torch.Tensor]:
    model, parametrization = build_model(config, seed=3), parametrization_of(optim, config)
    scale_initial_weights(model, lambda kind: parametrization.multipliers(kind).initial)
    return model.state_dict()


def test_nothing_changes_at_the_base() -> None:
    for kind in WeightKind:
        by = STANDARD.multipliers(kind)
        assert (by.initial, by.learning_rate, by.epsilon, by.weight_decay) == (1, 1, 1, 1)
    assert parametrization_of(MUP, KRAKEN) == parametrization_of(OPTIM, KRAKEN.replace(num_layers=5)) == STANDARD
    standard = build_model(KRAKEN, seed=3).state_dict()
    assert all(torch.equal(weight, standard[name]) for name, weight in initial_weights(KRAKEN, MUP).items())


def test_initial_values_follow_the_size() -> None:
    """Against the formulas of docs/learning-rate-transfer.md, written out: from the base, and not relative to what the
    standard parametrization gives the larger model."""
    large = KRAKEN.replace(hidden_size=256, num_layers=6, num_sub_layers=8, heads_per_sub_layer=8, embedding_size=400)
    for name, weight in initial_weights(large, MUP).items():
        if name.endswith("norm.weight"):
            expected = 1 / 4 if name == "final_norm.weight" else 1.0
            assert torch.equal(weight, torch.full_like(weight, expected)), name
            continue
        expected = 1 / math.sqrt(400) if name == "embedding_maps.weight" else 0.02
        if name.startswith("layers"):
            expected /= math.sqrt(4)
        if name.endswith(("attention.out.weight", "ffn.down.weight")):
            expected /= math.sqrt(2 * 2 * 4) * 3  # the base's depth and sub-layers, and three times as many layers
        if name == "conjunction.weight":
            expected /= math.sqrt(4) * 2
        assert weight.std().item() == pytest.approx(expected, rel=0.05), name


@pytest.mark.parametrize("name", small_configs())
def test_every_weight_has_a_kind(name: str) -> None:
    kinds = {
        path: weight_kind(path, module)
        for path, module in build_model(small_configs()[name]).named_modules()
        if any(True for _ in module.parameters(recurse=False))
    }
    assert kinds["token_embedding"] is WeightKind.EMBEDDING
    assert kinds["final_norm"] is WeightKind.FINAL_NORM
    assert kinds.get("lm_head", WeightKind.EMBEDDING) is WeightKind.EMBEDDING
    assert kinds.get("conjunction", WeightKind.CONJUNCTION) is WeightKind.CONJUNCTION
    for path, kind in kinds.items():
        if path.startswith("layers"):
            residual = path.endswith(("attention.out", "ffn.down"))
            expected = WeightKind.NORM if "norm" in path else WeightKind.RESIDUAL if residual else WeightKind.HIDDEN
            assert kind is expected, path


def test_learning_rates_and_weight_decay() -> None:
    larger = Parametrization(width=4, depth=3, streams=2)
    rates = {kind: larger.multipliers(kind).learning_rate for kind in WeightKind}
    assert rates == {
        WeightKind.EMBEDDING: 1, WeightKind.NORM: 1, WeightKind.HIDDEN: 1 / 4, WeightKind.RESIDUAL: 1 / 12,
        WeightKind.CONJUNCTION: 1 / 8, WeightKind.FINAL_NORM: 1 / 4, WeightKind.EMBEDDING_MAP: 1 / 4,
    }  # fmt: skip
    assert all(larger.multipliers(kind).weight_decay * rate == pytest.approx(1) for kind, rate in rates.items())


def test_what_is_missing_or_does_not_fit() -> None:
    assert parametrization_of(MUP, KRAKEN.replace(num_sub_layers=6)) == Parametrization(1, 1, 1.5)
    gpt = GPTConfig(6, 32, 4, vocab_size=128, context_length=16)
    assert parametrization_of(dataclasses.replace(MUP, base_num_sub_layers=None), gpt) == Parametrization(0.5, 3, 1)
    with pytest.raises(ConfigError, match=r"mup needs optim.base_num_sub_layers, .* .in this model it is 4"):
        parametrization_of(dataclasses.replace(MUP, base_num_sub_layers=None), KRAKEN)
    with pytest.raises(ConfigError, match=r"mup needs optim.base_hidden_size"):
        parametrization_of(dataclasses.replace(OPTIM, parametrization="mup"), KRAKEN)
    with pytest.raises(
        ConfigError, match=r"optim.base_num_sub_layers=4: model.architecture=standard has no sub-layers"
    ):
        parametrization_of(MUP, gpt)
    with pytest.raises(ConfigError, match=r"optim.parametrization=muP is not known; use standard or mup"):
        dataclasses.replace(OPTIM, parametrization="muP").validate()
    with pytest.raises(ConfigError, match=r"optim.base_num_layers=0 must be greater than 0"):
        dataclasses.replace(MUP, base_num_layers=0).validate()
