"""The work that the MFU is computed from, against PyTorch's own count of a training step."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import random_ids, small_configs
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kraken_train.model.flops import (
    attention_flops_per_token,
    device_peak_flops,
    matrix_flops_per_token,
    training_flops_per_token,
)
from kraken_train.model.registry import build_model

BATCH = 2


@pytest.mark.parametrize("architecture", small_configs())
def test_work_of_a_step(architecture: str) -> None:
    config = small_configs()[architecture]
    model = build_model(config)
    ids = random_ids(config, BATCH, config.context_length)
    # This kernel consists of products that are counted, and computes all scores, of which the mask leaves half.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.loss(ids, ids).backward()
    expected = matrix_flops_per_token(config) + 2 * attention_flops_per_token(config)
    assert counter.get_total_flops() == expected * BATCH * config.context_length
    parts = matrix_flops_per_token(config) + attention_flops_per_token(config)
    assert training_flops_per_token(config) == parts


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
    assert peak is not None
    assert 1e8 < peak < 1e14
