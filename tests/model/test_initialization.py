"""Initial weights: the same model wherever its sub-layers live, with the spread that the paper's code has."""

from __future__ import annotations

import math

import pytest
import torch

from kraken_train.model.config import GPTConfig, KrakenConfig, ModelConfig
from kraken_train.model.kraken import KrakenModel
from kraken_train.model.registry import build_model, even_share
from kraken_train.parallel.sharding import ModelRank, sharded_dims

CONFIG = KrakenConfig(4, 3, 64, 2, vocab_size=512, context_length=32)
CONFIGS = [
    CONFIG,
    GPTConfig(3, 64, 4, vocab_size=512, context_length=32),
    GPTConfig(3, 64, 4, vocab_size=512, context_length=32, architecture="parallel"),
    GPTConfig(3, 64, 8, vocab_size=512, context_length=32, num_kv_heads=4),
]


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.architecture)
def test_ranks_draw_slices_of_the_same_model(config: ModelConfig, num_ranks: int) -> None:
    whole = build_model(config, seed=5).state_dict()
    parts = []
    for rank in range(num_ranks):
        units, vocabulary = even_share(config, ModelRank(rank, num_ranks), vocab_parallel=True)
        parts.append(build_model(config, seed=5, units=units, vocabulary=vocabulary))
    cut = sharded_dims(parts[0])
    for name, expected in whole.items():
        held = [part.state_dict()[name] for part in parts]
        sharded_dim = cut[name]
        if sharded_dim is None:
            assert all(torch.equal(part, expected) for part in held), name
        else:
            assert torch.equal(torch.cat(held, dim=sharded_dim.axis), expected), name
    shared = {name for name, sharded_dim in cut.items() if sharded_dim is None}
    norms = {name for name in whole if "norm" in name and config.architecture != "kraken"}
    token_embedding = {"token_embedding.weight"} if num_ranks == 1 else set()
    assert shared == {"position_embedding.weight", "final_norm.weight"} | norms | token_embedding


def test_weights_are_independent_of_each_other_and_follow_the_seed() -> None:
    weights = KrakenModel(CONFIG, seed=5).state_dict()
    drawn = [slice_ for name, w in weights.items() if "qkv" in name for slice_ in w]
    for i, first in enumerate(drawn):
        for second in drawn[:i]:
            assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]) < 0.05
    again, other = KrakenModel(CONFIG, seed=5).state_dict(), KrakenModel(CONFIG, seed=6).state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert all(not torch.equal(weights[name], other[name]) for name in weights if "norm" not in name)


@pytest.mark.parametrize(
    ("config", "depth"),
    [(CONFIG, 3 * 4), (GPTConfig(3, 128, 2, 512, 32), 3), (GPTConfig(3, 128, 2, 512, 32, architecture="parallel"), 3)],
)
def test_standard_deviations(config: KrakenConfig | GPTConfig, depth: int) -> None:
    for name, weight in build_model(config, seed=1).state_dict().items():
        if "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight)), name
            continue
        residual = name.endswith(("attention.out.weight", "ffn.down.weight"))
        expected = 0.02 / math.sqrt(2 * depth) if residual else 0.02
        # Within five standard errors of an estimate from this many numbers.
        assert abs(weight.std() / expected - 1) < 5 / math.sqrt(2 * weight.numel()), name
        assert abs(weight.mean()) < 5 * expected / math.sqrt(weight.numel()), name
