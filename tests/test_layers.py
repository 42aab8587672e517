"""Stacked primitives against loops over ordinary PyTorch modules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kraken_train.inference.kv_cache import KVCache
from kraken_train.layers import StackedAttention, StackedFFN, StackedLayerNorm, StackedLinear, causal_attention
from kraken_train.placement import place_all


def randomized(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.0, 0.5)
    return module.double()


def attention_by_hand(qkv: Tensor, num_heads: int) -> Tensor:
    """One row and head at a time, softmax written out."""
    rows, tokens, width = qkv.shape
    size = width // 3
    head_dim = size // num_heads
    mixed = torch.zeros(rows, tokens, size, dtype=qkv.dtype)
    for row in range(rows):
        for head in range(num_heads):
            part = slice(head * head_dim, (head + 1) * head_dim)
            query, key, value = (qkv[row, :, i * size : (i + 1) * size][:, part] for i in range(3))
            for t in range(tokens):
                weights = torch.softmax(key[: t + 1] @ query[t] / math.sqrt(head_dim), dim=0)
                mixed[row, t, part] = weights @ value[: t + 1]
    return mixed


def test_stacked_linear() -> None:
    layer = randomized(StackedLinear(place_all(3), 5, 7))
    x = torch.randn(3, 2, 4, 5, dtype=torch.float64)
    for i, y in enumerate(layer(x)):
        torch.testing.assert_close(y, F.linear(x[i], layer.weight[i]), rtol=0, atol=1e-13)


def test_stacked_layer_norm() -> None:
    layer = randomized(StackedLayerNorm(place_all(3), 6, epsilon=1e-3))
    x = torch.randn(3, 2, 4, 6, dtype=torch.float64)
    for i, y in enumerate(layer(x)):
        torch.testing.assert_close(y, F.layer_norm(x[i], (6,), layer.weight[i], eps=1e-3), rtol=0, atol=1e-13)


@pytest.mark.parametrize("num_heads", [1, 3])
def test_causal_attention(num_heads: int) -> None:
    qkv = torch.randn(4, 6, 3 * 12, dtype=torch.float64)
    expected = attention_by_hand(qkv, num_heads)
    torch.testing.assert_close(causal_attention(qkv, num_heads), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("chunks", [[6], [1] * 6, [3, 1, 2], [1, 5]])
def test_attention_continues_from_a_cache(chunks: list[int]) -> None:
    qkv = torch.randn(4, 6, 3 * 12, dtype=torch.float64)
    cache = KVCache(4, 3, 6, 4, dtype=torch.float64, device=torch.device("cpu"))
    pieces = [causal_attention(piece, 3, cache) for piece in qkv.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), attention_by_hand(qkv, 3), rtol=0, atol=1e-13)


def test_a_full_cache_says_so() -> None:
    cache = KVCache(1, 1, 2, 4, dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="3 tokens do not fit into a cache for 2"):
        causal_attention(torch.randn(1, 3, 12), 1, cache)


def test_stacked_attention_and_ffn_keep_sub_layers_apart() -> None:
    attention = randomized(StackedAttention(place_all(3), 8, num_heads=2, norm_epsilon=1e-5))
    ffn = randomized(StackedFFN(place_all(3), 8, ffn_size=16, norm_epsilon=1e-5))
    x = torch.randn(3, 2, 5, 8, dtype=torch.float64)
    for i in range(3):
        normed = F.layer_norm(x[i], (8,), attention.norm.weight[i])
        heads = attention_by_hand(F.linear(normed, attention.qkv.weight[i]), 2)
        expected = F.linear(heads, attention.out.weight[i])
        torch.testing.assert_close(attention(x)[i], expected, rtol=0, atol=1e-12)

        up = F.linear(F.layer_norm(x[i], (8,), ffn.norm.weight[i]), ffn.up.weight[i])
        gelu = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
        torch.testing.assert_close(ffn(x)[i], F.linear(gelu, ffn.down.weight[i]), rtol=0, atol=1e-12)
