"""What the vLLM plugin refuses, without vLLM: each with its setting, its value and what would work."""

from __future__ import annotations

import pytest
import torch
from helpers import MODERN
from kraken_vllm.configuration import ARCHITECTURES, FORMAT_VERSION, KrakenConfig, require_servable
from kraken_vllm.decoder import LAYERS
from plugin_ranks import plugin_config

from checkpoints.exports import folder
from kraken_train.model import config as models
from kraken_train.model import registry
from kraken_train.model.ladder_config import LadderConfig
from kraken_train.model.track_config import TrackConfig

COMMON = {"vocab_size": 96, "context_length": 24, "num_layers": 3}
KRAKEN = models.KrakenConfig(6, hidden_size=16, heads_per_sub_layer=2, **COMMON)
STANDARD = models.GPTConfig(hidden_size=48, num_heads=12, num_kv_heads=6, **COMMON)


def test_an_architecture_is_served_or_refused() -> None:
    assert set(ARCHITECTURES) == set(LAYERS) <= set(registry.ARCHITECTURES)
    assert FORMAT_VERSION == folder.FORMAT_VERSION
    with pytest.raises(ValueError, match=r"architecture=mamba in config.json is not known .* kraken_train.generate"):
        KrakenConfig(architecture="mamba")


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_ranks_that_share_evenly_serve(size: int) -> None:
    require_servable(plugin_config(KRAKEN), size, 24)
    require_servable(plugin_config(STANDARD), size, 24)
    require_servable(plugin_config(STANDARD), 12)  # two ranks hold each key-value head


@pytest.mark.parametrize(
    ("config", "size", "message"),
    [
        (KRAKEN, 4, r"--tensor-parallel-size 4 does not divide num_sub_layers=6, .* use 1, 2, 3 or 6$"),
        (KRAKEN, 12, r"--tensor-parallel-size 12 does not divide num_sub_layers=6"),
        (STANDARD, 5, r"--tensor-parallel-size 5 does not divide num_heads=12, .* use 1, 2, 3, 4, 6 or 12$"),
        (STANDARD, 4, r"4 neither divides num_kv_heads=6 nor is a multiple of it, .* use 1, 2, 3, 6 or 12$"),
        (
            models.GPTConfig(hidden_size=48, num_heads=12, num_kv_heads=1, ffn_hidden_size=50, **COMMON),
            4, r"does not divide the FFN's inner width 50, .* use 1, 2, 5, 10, 25 or 50",
        ),
        (models.KrakenConfig(1, hidden_size=300, heads_per_sub_layer=1, **COMMON), 1, r"head_dim=300: .* up to 256"),
    ],
)  # fmt: skip
def test_refusals_name_the_setting(config: models.ModelConfig, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        require_servable(plugin_config(config), size)


def test_learned_positions_end_with_the_context() -> None:
    with pytest.raises(ValueError, match=r"--max-model-len 25: .* learned positions of 24 tokens"):
        require_servable(plugin_config(KRAKEN), 1, 25)
    rotary = models.KrakenConfig(2, hidden_size=16, heads_per_sub_layer=2, **COMMON, **MODERN)
    require_servable(plugin_config(rotary), 1, 25)


def test_unknown_configurations() -> None:
    description = folder.describe(STANDARD, {}, torch.float32)
    with pytest.raises(ValueError, match=r"architecture=squid .* serves kraken, standard, parallel, track"):
        KrakenConfig(**{**description, "architecture": "squid"})
    for version in (1, FORMAT_VERSION + 1):
        with pytest.raises(ValueError, match=rf"format_version={version} .* reads versions 2 to {FORMAT_VERSION}"):
            KrakenConfig(**{**description, "format_version": version})


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (KRAKEN, {"num_layers": 0}, r"num_layers=0 in config.json must be a whole number of at least 1"),
        (KRAKEN, {"heads_per_sub_layer": -2}, r"heads_per_sub_layer=-2 in"),
        (KRAKEN, {"num_sub_layers": 2.5}, r"num_sub_layers=2.5 in"),
        (KRAKEN, {"embedding_size": 0}, r"embedding_size=0 in"),
        (KRAKEN, {"vocab_size": "96"}, r"vocab_size='96' in"),
        (KRAKEN, {"norm": "batchnorm"}, r"norm='batchnorm' in config.json must be layernorm or rmsnorm"),
        (STANDARD, {"num_kv_heads": 5}, r"num_kv_heads=5 in config.json does not divide num_heads=12"),
        (STANDARD, {"num_heads": 0}, r"num_heads=0 in"),
        (STANDARD, {"num_heads": 18, "head_dim": None}, r"num_heads=18 in config.json does not divide hidden_size=48"),
        (TrackConfig(2, hidden_size=16, heads_per_track=2, **COMMON), {"sync_every": 0}, r"sync_every=0 in"),
        (LadderConfig(hidden_size=16, num_heads=2, **COMMON), {"ladder_layers": True}, r"ladder_layers=True in"),
    ],
)
def test_a_configuration_that_was_edited(config: models.ModelConfig, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KrakenConfig(**{**folder.describe(config, {}, torch.float32), **changes})
