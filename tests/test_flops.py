"""The work that the MFU is computed from, against PyTorch's own count of a training step."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import random_ids, small_configs
from torch.utils.flop_counter import FlopCounterMode

from kraken_train.architectures import build_model
from kraken_train.flops import device_peak_flops, training_flops_per_token

BATCH = 2


@pytest.mark.parametrize("architecture", small_configs())
def test_matrix_products(architecture: str) -> None:
    config = small_configs()[architecture]
    model = build_model(config)
    ids = random_ids(config, BATCH, config.context_length)
    with FlopCounterMode(display=False) as counter:
        model.loss(ids, ids).backward()
    counted = counter.get_flop_counts()["Global"]
    products = sum(flops for operation, flops in counted.items() if "attention" not in str(operation))
    attention = 6 * config.num_layers * config.context_length * config.attention_width
    expected = training_flops_per_token(config) - attention
    assert products == expected * BATCH * config.context_length


def test_attention_is_counted() -> None:
    config = small_configs()["kraken"]
    longer = dataclasses.replace(config, context_length=config.context_length * 2)
    difference = training_flops_per_token(longer) - training_flops_per_token(config)
    # Scores and weighted sum, forward and backward (3x), a multiplication and an addition each (2x), and on average
    # a token sees half of the context.
    by_hand = 3 * 2 * 2 * config.num_layers * config.attention_width * config.context_length / 2
    assert difference == by_hand


def test_the_peak_of_a_cpu_is_measured() -> None:
    peak = device_peak_flops(torch.device("cpu"), "fp32")
    assert peak is not None and 1e8 < peak < 1e14
