"""The paper's two baselines, GPT-2 without biases: the standard Transformer and its parallel form.

    standard  x = x + MHA(LN1 x);  x = x + FFN(LN2 x)
    parallel  x = x + MHA(LN x) + FFN(LN x)

Shapes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from kraken_train.config import GPTConfig
from kraken_train.initialization import initialize
from kraken_train.layers import KeyValueStore, causal_attention
from kraken_train.model import LanguageModel


class GPTModel(LanguageModel):
    """Either form, by `config.architecture`."""

    def __init__(self, config: GPTConfig, seed: int = 0) -> None:
        super().__init__(config.vocab_size, config.context_length, config.hidden_size, config.norm_epsilon)
        self.config = config
        layer = StandardLayer if config.architecture == "standard" else ParallelLayer
        self.layers = nn.ModuleList(layer(config) for _ in range(config.num_layers))
        initialize(self, seed, residual_depth=config.num_layers)

    @property
    def num_layers(self) -> int:
        return self.config.num_layers

    def hidden(self, embedding: Tensor, caches: Sequence[KeyValueStore | None]) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = embedding
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, cache)
        return x


class StandardLayer(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = layer_norm(config)
        self.attention = Attention(config)
        self.ffn_norm = layer_norm(config)
        self.ffn = FFN(config)

    def forward(self, x: Tensor, cache: KeyValueStore | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cache)
        return x + self.ffn(self.ffn_norm(x))


class ParallelLayer(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm = layer_norm(config)
        self.attention = Attention(config)
        self.ffn = FFN(config)

    def forward(self, x: Tensor, cache: KeyValueStore | None) -> Tensor:
        normed = self.norm(x)
        return x + self.attention(normed, cache) + self.ffn(normed)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cache: KeyValueStore | None) -> Tensor:
        return self.out(causal_attention(self.qkv(x), self.num_heads, cache))


class FFN(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.ffn_size, bias=False)
        self.down = nn.Linear(config.ffn_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


def layer_norm(config: GPTConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, config.norm_epsilon, bias=False)
