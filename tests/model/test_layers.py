"""Stacked primitives against loops over ordinary PyTorch modules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kraken_train.model.kraken_config import KrakenConfig
from kraken_train.model.layers import StackedAttention, StackedFFN, StackedLinear, StackedNorm, causal_attention
from kraken_train.parallel.sharding import all_units


def randomized(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.0, 0.5)
    return module.double()


def attention_by_hand(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One row and head at a time, softmax written out: (rows, H, T, K), (rows, G, T, K) twice -> (rows, T, H K)."""
    rows, heads, tokens, head_dim = query.shape
    mixed = torch.zeros(rows, tokens, heads, head_dim, dtype=query.dtype)
    for row in range(rows):
        for head in range(heads):
            shared = head * key.shape[1] // heads
            for t in range(tokens):
                scores = key[row, shared, : t + 1] @ query[row, head, t] / math.sqrt(head_dim)
                mixed[row, t, head] = torch.softmax(scores, dim=0) @ value[row, shared, : t + 1]
    return mixed.flatten(2)


def random_heads(heads: int, kv_heads: int) -> list[Tensor]:
    return [torch.randn(4, count, 6, 4, dtype=torch.float64) for count in (heads, kv_heads, kv_heads)]


def test_stacked_linear() -> None:
    layer = randomized(StackedLinear(all_units(3), 5, 7))
    x = torch.randn(3, 2, 4, 5, dtype=torch.float64)
    for i, y in enumerate(layer(x)):
        torch.testing.assert_close(y, F.linear(x[i], layer.weight[i]), rtol=0, atol=1e-13)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_stacked_norm(norm: str) -> None:
    layer = randomized(StackedNorm(all_units(3), 6, norm, epsilon=1e-3))
    x = torch.randn(3, 2, 4, 6, dtype=torch.float64)
    for i, y in enumerate(layer(x)):
        centred = x[i] - x[i].mean(-1, keepdim=True) if norm == "layernorm" else x[i]
        expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * layer.weight[i]
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (6, 2), (3, 1)])
def test_causal_attention(heads: int, kv_heads: int) -> None:
    query, key, value = random_heads(heads, kv_heads)
    expected = attention_by_hand(query, key, value)
    torch.testing.assert_close(causal_attention(query, key, value), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_stacked_attention_and_ffn_keep_sub_layers_apart(kv_heads: int) -> None:
    config = KrakenConfig(3, 1, 8, 4, vocab_size=8, context_length=8, kv_heads_per_sub_layer=kv_heads)
    attention, ffn = randomized(StackedAttention(all_units(3), config)), randomized(StackedFFN(all_units(3), config))
    x, attended = torch.randn(2, 3, 2, 5, 8, dtype=torch.float64)
    total = torch.randn(2, 5, 8, dtype=torch.float64)
    for i in range(3):
        normed = F.layer_norm(x[i], (8,), attention.norm.weight[i])
        widths = (8, 2 * kv_heads, 2 * kv_heads)
        projected = [F.linear(normed, part) for part in attention.qkv.weight[i].split(widths)]
        heads = attention_by_hand(*(part.unflatten(-1, (-1, 2)).transpose(1, 2) for part in projected))
        expected = F.linear(heads, attention.out.weight[i])
        torch.testing.assert_close(attention(x)[i], expected, rtol=0, atol=1e-12)

        up = F.linear(F.layer_norm(attended[i] + total, (8,), ffn.norm.weight[i]), ffn.up.weight[i])
        gelu = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
        expected = x[i] + attended[i] + F.linear(gelu, ffn.down.weight[i])
        torch.testing.assert_close(ffn(x, attended, total)[i], expected, rtol=0, atol=1e-12)
