"""Derived models: widths that match the base's parameters, and what they cost."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conf_models import conf_model
from helpers import REPOSITORY, run_here, user_error
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from kraken_train.common.errors import ConfigError
from kraken_train.derive import Candidate, derive, nearest_with_best_heads
from kraken_train.model.config import parse_model
from kraken_train.model.registry import build_model
from kraken_train.model.track_config import TrackConfig


@pytest.mark.parametrize("base_name", ["gpt2-124m", "gpt2-350m", "gpt2-760m-parallel"])
@pytest.mark.parametrize("num_sub_layers", [2, 4, 6])
def test_candidates_fit(base_name: str, num_sub_layers: int) -> None:
    base = conf_model(base_name)
    candidates = derive(base, num_sub_layers)
    for candidate in candidates:
        config = candidate.config
        assert abs(config.num_parameters / base.num_parameters - 1) <= 0.02
        assert config.head_size % 8 == 0
        assert config.head_size * config.heads_per_sub_layer == config.hidden_size
        assert config.num_sub_layers == num_sub_layers
        assert config.num_layers == base.num_layers
        assert (config.vocab_size, config.context_length) == (base.vocab_size, base.context_length)
    assert {c.config.hidden_size for c in candidates} == widths_that_fit(base_name, num_sub_layers)
    best_heads = [c.config.head_size in (64, 128) for c in candidates]
    assert best_heads == sorted(best_heads, reverse=True)


def widths_that_fit(base_name: str, num_sub_layers: int) -> set[int]:
    """By trying all widths with the formula of the paper; heads of 32 to 256."""
    base, fitting = conf_model(base_name), set()
    for d in range(32, 2000, 8):
        count = base.num_layers * num_sub_layers * (8 * d * d + 2 * d) + (50304 + 1024) * d + num_sub_layers * d * d + d
        if abs(count / base.num_parameters - 1) <= 0.02 and any(d % k == 0 for k in range(32, 257, 8)):
            fitting.add(d)
    return fitting


def test_costs_of_a_known_case() -> None:
    best = derive(conf_model("gpt2-350m"), 4)[0]
    assert (best.config.hidden_size, best.config.heads_per_sub_layer) == (640, 5)
    assert best.attention_cost == 4 * 640 / 1024
    assert best.attention_time == best.attention_cost  # heads of 128 and of 64, both as kernels have them
    assert best.cache_bytes == 24 * 2 * 640 * 2  # layers, keys and values, width, bf16
    assert best.base_cache_bytes == 24 * 2 * (1024 // 4) * 2
    uneven = derive(conf_model("gpt2-350m"), 6)[0]
    assert uneven.base_cache_bytes == 24 * 2 * (3 * 64) * 2  # 16 heads on 6 devices: 3 on the fullest


def test_time_of_attention_with_wide_heads() -> None:
    """Kernels compute heads of 168 as heads of 192, at 0.6 of the rate."""
    base, config = conf_model("gpt2-124m"), conf_model("kraken-125m-4way")
    assert config.head_size == 168
    wide = Candidate(config, base)
    assert wide.attention_cost == 4 * 504 / 768
    assert wide.attention_time == pytest.approx(wide.attention_cost * 192 / 168 / 0.6)
    narrow = dataclasses.replace(wide, config=conf_model("kraken-125m-4way-hw"))
    assert narrow.attention_time == narrow.attention_cost == 4 * 512 / 768


@pytest.mark.parametrize("architecture", ["kraken", "track"])
@pytest.mark.parametrize("norm_epsilon", [1e-5, 1e-6])
def test_the_overrides_give_the_model(norm_epsilon: float, architecture: str) -> None:
    base = dataclasses.replace(conf_model("gpt2-124m"), norm_epsilon=norm_epsilon)
    best = derive(base, 6, tolerance=0.05, architecture=architecture)[0]
    wider = dataclasses.replace(best, config=dataclasses.replace(best.config, ffn_multiplier=3))
    for candidate in (best, wider):
        with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
            composed = compose("train", candidate.overrides.split())
        assert parse_model(OmegaConf.to_container(composed.model)) == candidate.config


@pytest.mark.parametrize("base_name", ["gpt-125m-modern", "ladder-125m-modern", "fal-125m-modern"])
def test_tracks(base_name: str) -> None:
    """N tracks of width d: N L (4 d k h + 3 d F + 2 d) + V d + d, and norms of queries and keys."""
    base = conf_model(base_name)
    candidates = derive(base, 4, max_attention_cost=1.0, architecture="track")
    assert candidates
    for candidate in candidates:
        config = candidate.config
        assert isinstance(config, TrackConfig)
        d, heads = config.hidden_size, config.heads_per_track * config.head_size
        layer = 4 * d * heads + 3 * d * config.ffn_size + 2 * d + 2 * config.head_size
        assert config.num_parameters == 4 * 12 * layer + 50304 * d + d
        assert abs(config.num_parameters / base.num_parameters - 1) <= 0.02
        assert 4 * heads <= 768


def test_a_wider_embedding() -> None:
    """It costs parameters, which the streams or their FFNs lack; weights are counted in a model."""
    base = conf_model("gpt-10m-modern", 4096)
    plain, wide = (derive(base, 4, max_attention_cost=1.0, embedding_size=size) for size in (None, base.hidden_size))
    for candidate in wide:
        with torch.device("meta"):
            model = build_model(candidate.config)
        assert candidate.config.embedding_size == model.token_embedding.weight.shape[1] == base.hidden_size
        assert candidate.config.num_parameters == sum(weight.numel() for weight in model.parameters())
        assert "model.embedding_size=288" in candidate.overrides.split()
    ffns = {candidate.config.hidden_size: candidate.config.ffn_size for candidate in plain}
    shared = [one for one in wide if one.config.hidden_size in ffns]
    assert shared
    assert all(one.config.ffn_size < ffns[one.config.hidden_size] for one in shared)
    given = ["model=gpt-10m-modern", "model.vocab_size=4096", "num_sub_layers=4", "embedding_size=288"]
    message = user_error(run_here("kraken_train.derive", *given, "architecture=track"))
    assert "with embedding_size, architecture=track" in message
    assert "kraken" in message
    assert "embedding_size=0 must be" in user_error(run_here("kraken_train.derive", *given[:-1], "embedding_size=0"))


def test_an_architecture_for_any_number_of_devices_is_refused() -> None:
    error = user_error(run_here("kraken_train.derive", "num_sub_layers=4", "architecture=ladder"))
    assert error == "architecture=ladder is not known; use kraken or track"


def test_nearest_with_best_heads() -> None:
    nearest = nearest_with_best_heads(conf_model("gpt2-124m"), 4)
    assert (nearest.config.hidden_size, nearest.config.heads_per_sub_layer) == (512, 4)


def test_none_fits() -> None:
    with pytest.raises(ConfigError, match=r"tolerance=0.001 .* nearest, hidden_size=416, differs by -1.8%.*0.019"):
        derive(conf_model("gpt2-124m"), 6, tolerance=0.001)
    with pytest.raises(ConfigError, match=r"differs by \+\d+\.\d%: use another num_sub_layers$"):
        derive(conf_model("gpt-tiny", vocab_size=64), 500)  # no tolerance below 1 would do
    with pytest.raises(ConfigError, match="architecture=kraken is no base"):
        derive(conf_model("kraken-125m-4way"), 4)


def test_no_tolerance_is_suggested_that_would_be_refused() -> None:
    arguments = ["model=gpt-tiny", "model.vocab_size=64", "num_sub_layers=8", "tolerance=0.99"]
    result = run_here("kraken_train.derive", *arguments)
    assert result.returncode == 0, result.stderr
    assert "to train the first" in result.stdout
    assert "tolerance=" not in result.stdout


def test_command() -> None:
    result = run_here("kraken_train.derive", "model=gpt-10m", "num_sub_layers=4", "model.vocab_size=16384")
    assert result.returncode == 0, result.stderr
    assert "192" in result.stdout
    assert "model.hidden_size=192 model.heads_per_sub_layer=3" in result.stdout


def test_the_size_that_kernels_compute_is_named() -> None:
    result = run_here("kraken_train.derive", "model=gpt2-124m", "num_sub_layers=4")
    assert "attention kernels compute its heads of 56 as heads of 64\n" in result.stdout
