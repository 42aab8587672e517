"""The paper's two baselines, GPT-2 without biases: the standard Transformer and its parallel form.

    standard  x = x + MHA(LN1 x);  x = x + FFN(LN2 x)
    parallel  x = x + MHA(LN x) + FFN(LN x)

Over several ranks both are cut as in Megatron-LM (arXiv 1909.08053, section 3): attention by heads, the FFN by its
inner width. The standard form waits for two all-reduces per layer, the parallel form for one, and as many backward.

Shapes: B batch, T tokens, D hidden size, w <= D width of the heads here.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from kraken_train.config import GPTConfig
from kraken_train.exchange import Exchange, LocalExchange
from kraken_train.initialization import initialize
from kraken_train.layers import KeyValueStore, causal_attention
from kraken_train.model import LanguageModel
from kraken_train.placement import Placement, place_all
from kraken_train.tensor_parallel import ColumnParallelLinear, QKVLinear, RowParallelLinear


class GPTModel(LanguageModel):
    """Either form, by `config.architecture`.

    `heads` says which attention heads are here (default: all), and with them which part of the FFN; `vocabulary`,
    `exchange` and `seed` as in `KrakenModel`.
    """

    def __init__(
        self,
        config: GPTConfig,
        heads: Placement | None = None,
        exchange: Exchange | None = None,
        seed: int = 0,
        vocabulary: Placement | None = None,
    ) -> None:
        super().__init__(config, exchange or LocalExchange(), vocabulary)
        self.config = config
        self.heads = heads or place_all(config.num_heads)
        layer = StandardLayer if config.architecture == "standard" else ParallelLayer
        self.layers = nn.ModuleList(  # type: ignore[assignment]
            layer(config, self.heads) for _ in range(config.num_layers)
        )
        initialize(self, seed, residual_depth=config.num_layers)

    def hidden(self, embedding: Tensor, caches: Sequence[KeyValueStore | None]) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        layer_form = self.standard_layer if self.config.architecture == "standard" else self.parallel_layer
        x = embedding
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer_form(layer, x, cache)
        return x

    def standard_layer(self, layer: StandardLayer, x: Tensor, cache: KeyValueStore | None) -> Tensor:
        normed = self.exchange.broadcast(layer.attention_norm(x))
        x = x + self.exchange.reduce(self.run_part(layer.attention, normed, cache))
        normed = self.exchange.broadcast(layer.ffn_norm(x))
        return x + self.exchange.reduce(self.run_part(layer.ffn, normed))

    def parallel_layer(self, layer: ParallelLayer, x: Tensor, cache: KeyValueStore | None) -> Tensor:
        normed = self.exchange.broadcast(layer.norm(x))
        attended = self.run_part(layer.attention, normed, cache)
        return x + self.exchange.reduce(attended + self.run_part(layer.ffn, normed))


class StandardLayer(nn.Module):
    def __init__(self, config: GPTConfig, heads: Placement) -> None:
        super().__init__()
        self.attention_norm = layer_norm(config)
        self.attention = Attention(config, heads)
        self.ffn_norm = layer_norm(config)
        self.ffn = FFN(config, heads)


class ParallelLayer(nn.Module):
    def __init__(self, config: GPTConfig, heads: Placement) -> None:
        super().__init__()
        self.norm = layer_norm(config)
        self.attention = Attention(config, heads)
        self.ffn = FFN(config, heads)


class Attention(nn.Module):
    """The heads here, (B, T, D) -> their part of (B, T, D)."""

    def __init__(self, config: GPTConfig, heads: Placement) -> None:
        super().__init__()
        self.num_heads = heads.count
        columns = heads.in_units_of(config.head_dim)  # w of them here
        self.qkv = QKVLinear(config.hidden_size, columns)
        self.out = RowParallelLinear(columns, config.hidden_size)

    def forward(self, x: Tensor, cache: KeyValueStore | None = None) -> Tensor:
        return self.out(causal_attention(self.qkv(x), self.num_heads, cache))


class FFN(nn.Module):
    """The inner columns that go with the heads here, (B, T, D) -> their part of (B, T, D)."""

    def __init__(self, config: GPTConfig, heads: Placement) -> None:
        super().__init__()
        inner = heads.in_units_of(config.ffn_size // config.num_heads)
        self.up = ColumnParallelLinear(config.hidden_size, inner)
        self.down = RowParallelLinear(inner, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


def layer_norm(config: GPTConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, config.norm_epsilon, bias=False)
