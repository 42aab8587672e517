"""The sizes that are compared, and the Krakens that match them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kraken_train.bench.grid import SIZES, matched_dimensions, model_config
from kraken_train.common.errors import ConfigError
from kraken_train.model.config import ModelConfig

PAPER = {"1.3b": (24, 2048), "6.7b": (32, 4096), "13b": (40, 5120), "65b": (80, 8192), "175b": (96, 12288)}


def layer_parameters(config: ModelConfig) -> int:
    """By the models' own count, norms included: what one more layer adds."""
    return replace(config, num_layers=3).num_parameters - replace(config, num_layers=2).num_parameters


@pytest.mark.parametrize("degree", [4, 8])
@pytest.mark.parametrize("name", PAPER)
def test_matched(name: str, degree: int) -> None:
    size = SIZES[name]
    assert (size.num_layers, size.hidden_size) == PAPER[name]
    kraken, standard, parallel = (
        model_config(architecture, size, degree, 50304, 2064) for architecture in ("kraken", "standard", "parallel")
    )
    assert standard.num_parameters == pytest.approx(float(name[:-1]) * 1e9, rel=0.05)  # it is what it is called
    assert standard.head_size == parallel.head_size == 128
    assert standard.num_heads % degree == 0
    assert kraken.num_sub_layers == degree
    assert kraken.num_layers == standard.num_layers
    assert layer_parameters(kraken) == pytest.approx(layer_parameters(standard), rel=0.03)
    assert kraken.head_size % 16 == 0
    assert kraken.head_size <= 128
    # No width that fits would have allowed a better head dimension.
    fitting = [d for d in range(16, 12288, 16) if abs(8 * degree * d * d / (12 * size.hidden_size**2) - 1) <= 0.03]
    best = next(k for k in (128, 96, 64, 112, 80, 48, 32, 16) if any(d % k == 0 for d in fitting))
    assert kraken.head_size == best


def test_small_and_impossible() -> None:
    for degree in (2, 4, 8):
        for architecture in ("kraken", "standard", "parallel"):
            name, units = model_config(architecture, SIZES["tiny"], degree, 512, 64).parallel_units
            assert units % degree == 0, name
    with pytest.raises(ConfigError, match=r"degrees=3 does not divide the 16 heads of sizes=1.3b"):
        model_config("standard", SIZES["1.3b"], 3, 50304, 64)
    with pytest.raises(ConfigError, match=r"degrees=64: no 64-way kraken whose width .* matches sizes=tiny within 3%"):
        matched_dimensions("kraken", SIZES["tiny"], 64)
