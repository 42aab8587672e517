"""Initial weights: the same model wherever its sub-layers live, with the spread that the paper's code has."""

from __future__ import annotations

import math

import pytest
import torch

from kraken_train.architectures import build_model
from kraken_train.config import GPTConfig, KrakenConfig
from kraken_train.model import KrakenModel
from kraken_train.placement import place_evenly

CONFIG = KrakenConfig(4, 3, 64, 2, vocab_size=512, context_length=32)
STACKED = ("layers.", "conjunction.")


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_ranks_draw_slices_of_the_same_model(num_ranks: int) -> None:
    whole = KrakenModel(CONFIG, seed=5).state_dict()
    for rank in range(num_ranks):
        placement = place_evenly(4, num_ranks, rank)
        for name, part in KrakenModel(CONFIG, placement=placement, seed=5).state_dict().items():
            ids = placement.sub_layer_ids
            expected = whole[name][ids.start : ids.stop] if name.startswith(STACKED) else whole[name]
            assert torch.equal(part, expected), name


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
