"""The cache against attention written out, on prompts of unequal lengths."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import rough_model, small_configs
from torch import Tensor

from kraken_train.inference.kv_cache import DecodeStore, KeyValueCache, PrefillStore, Step


def last_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What the last of t tokens sees: (H, K), (G, t, K) twice -> (H, K), one head at a time."""
    heads_per_group = len(query) // len(key)
    mixed = []
    for head, vector in enumerate(query):
        weights = torch.softmax(key[head // heads_per_group] @ vector / math.sqrt(len(vector)), dim=0)
        mixed.append(weights @ value[head // heads_per_group])
    return torch.stack(mixed)


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (3, 1)])
def test_prompts_of_unequal_lengths_and_what_follows(heads: int, kv_heads: int) -> None:
    rows_per_sequence, lengths, steps, head_dim = 2, [5, 1, 3], 4, 4
    rows = rows_per_sequence * len(lengths)
    query, key, value = (torch.randn(rows, n, 5 + steps, head_dim).double() for n in (heads, kv_heads, kv_heads))
    row_lengths = lengths * rows_per_sequence  # sequences of a sub-layer are side by side
    expected = [
        [
            last_attention(query[row, :, t], key[row, :, : t + 1], value[row, :, : t + 1])
            for t in range(row_lengths[row] + steps)
        ]
        for row in range(rows)
    ]
    step = Step(rows_per_sequence, len(lengths), 5 + steps, torch.float64, torch.device("cpu"))
    keys, values = torch.zeros(2, rows, kv_heads, 5 + steps, head_dim).double()
    padded = PrefillStore(keys, values).attend(*(whole[:, :, :5] for whole in (query, key, value)))
    for row, length in enumerate(row_lengths):
        for t in range(length):
            torch.testing.assert_close(padded[row, :, t], expected[row][t], rtol=0, atol=1e-13)
    step.lengths.copy_(torch.tensor(lengths))
    store = DecodeStore(keys, values, step)
    for number in range(steps):
        at = torch.tensor([length + number for length in row_lengths])
        step.begin()
        mixed = store.attend(*(whole[torch.arange(rows), :, at][:, :, None] for whole in (query, key, value)))
        step.end()
        for row in range(rows):
            torch.testing.assert_close(mixed[row, :, 0], expected[row][at[row]], rtol=0, atol=1e-13)


def test_size() -> None:
    config = small_configs()["kraken-gqa"]
    cache = KeyValueCache(rough_model(config, torch.bfloat16), batch_size=5, capacity=11)
    assert len(cache.prefill) == len(cache.decode) == config.num_layers
    for before, after in zip(cache.prefill, cache.decode, strict=True):
        assert before.keys is after.keys
        assert before.values is after.values
        assert before.keys.shape == before.values.shape == (3 * 5, 2, 11, 8)
        assert before.keys.dtype == torch.bfloat16
