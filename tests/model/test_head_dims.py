"""Heads that attention kernels do not take: which they are, and what is named instead."""

from __future__ import annotations

import dataclasses
import re

import pytest
from conf_models import conf_model

from kraken_train.model.config import GPTConfig, KrakenConfig, ModelConfig
from kraken_train.model.head_dims import head_size_note

SMALL = {"num_layers": 2, "vocab_size": 1024, "context_length": 128}
GROUPED = GPTConfig(hidden_size=600, num_heads=12, num_kv_heads=4, architecture="parallel", **SMALL)
WRONG: dict[str, tuple[ModelConfig, int]] = {
    "the paper's 125M 2-way": (conf_model("kraken-125m-2way"), 113),
    "the paper's 125M 6-way": (conf_model("kraken-125m-6way"), 209),
    "the paper's 350M 2-way": (conf_model("kraken-350m-2way"), 111),
    "the paper's 350M 4-way": (conf_model("kraken-350m-4way"), 161),
    "too large": (KrakenConfig(2, hidden_size=528, heads_per_sub_layer=2, **SMALL), 264),
    "standard": (GPTConfig(hidden_size=600, num_heads=12, **SMALL), 50),
    "parallel, grouped": (
        GPTConfig(hidden_size=600, num_heads=12, num_kv_heads=4, architecture="parallel", **SMALL),
        50,
    ),
    "grouped": (KrakenConfig(2, hidden_size=600, heads_per_sub_layer=6, kv_heads_per_sub_layer=3, **SMALL), 100),
    "tiny": (KrakenConfig(2, hidden_size=12, heads_per_sub_layer=6, kv_heads_per_sub_layer=6, **SMALL), 2),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_named_instead(name: str) -> None:
    config, size = WRONG[name]
    note = head_size_note(config)
    assert note is not None
    assert f"makes heads of {size}," in note
    before, after = note.split("nearest in parameters")
    settings = {key: int(value) for key, value in re.findall(r"model\.(\w+)=(\d+)", after)}
    assert set(settings) == set(re.findall(r"model\.(\w+)=", before))
    other = dataclasses.replace(config, **settings)  # which also validates it
    assert head_size_note(other) is None
    assert f"heads of {other.head_size}" in after
    difference = other.num_parameters / config.num_parameters - 1
    assert f"({difference:+.1%})" in after
    assert abs(difference) < 0.04 or name == "tiny"


@pytest.mark.parametrize("name", ["gpt2-124m", "gpt2-760m-parallel", "kraken-125m-4way", "kraken-760m-4way",
                                  "kraken-125m-2way-hw", "kraken-125m-6way-hw"])  # fmt: skip
def test_heads_that_kernels_take(name: str) -> None:
    assert head_size_note(conf_model(name)) is None
