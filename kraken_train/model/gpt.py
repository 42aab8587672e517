"""The paper's two baselines, GPT-2 without biases: the standard Transformer and its parallel form.

    standard  x = x + MHA(LN1 x);  x = x + FFN(LN2 x)
    parallel  x = x + MHA(LN x) + FFN(LN x)

Over several ranks both are sharded as in Megatron-LM (arXiv 1909.08053, section 3): attention by heads, the FFN by its
inner width. The standard form waits for two all-reduces per layer, the parallel form for one, and as many backward.

Shapes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kraken_train.model.architecture import ModelConfig
from kraken_train.model.gpt_config import GPTConfig
from kraken_train.model.initialization import initialize
from kraken_train.model.language_model import LanguageModel
from kraken_train.model.layers import AttentionScope, Layer, Norm, causal_attention, ffn_inner
from kraken_train.model.rotary import Rotary, rotate
from kraken_train.parallel.communicator import Communicator, LocalCommunicator
from kraken_train.parallel.sharding import UnitRange, all_units
from kraken_train.parallel.tensor_parallel import ColumnParallelLinear, QKVLinear, RowParallelLinear
from kraken_train.parallel.weight_role import WeightRole


class GPTModel(LanguageModel):
    """Either form, by `config.architecture`.

    `groups` says which key-value heads are here (default: all), and with them which heads and which part of the FFN;
    `vocabulary`, `communicator` and `seed` as in `KrakenModel`.
    """

    def __init__(
        self,
        config: GPTConfig,
        groups: UnitRange | None = None,
        communicator: Communicator | None = None,
        seed: int = 0,
        vocabulary: UnitRange | None = None,
    ) -> None:
        super().__init__(config, communicator or LocalCommunicator(), vocabulary)
        self.groups = groups or all_units(config.kv_heads)
        layer = LAYERS[config.architecture]
        self.layers = nn.ModuleList(  # type: ignore[assignment]
            layer(config, self.groups, self.communicator) for _ in range(config.num_layers)
        )
        initialize(self, seed, residual_depth=config.num_layers)

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        return 1, self.groups.count, self.config.head_size

    def hidden(self, embedding: Tensor, rotary: Rotary | None, scopes: Sequence[AttentionScope | None]) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x, added = embedding, embedding.new_zeros(())
        all_gains = qk_gains(self.layers, self.config, self.communicator)
        for layer, scope, gains in zip(self.layers, scopes, all_gains, strict=True):
            x, added = layer(x, added, rotary, scope, gains)
        return x + added


def qk_gains(layers: Sequence[Layer], config: ModelConfig, communicator: Communicator) -> Sequence[Tensor | None]:
    """Gains of the norms of queries and keys, (2, K), of each layer; None where there are no such norms.

    All ranks have the same ones, for different heads. Copied together, they take one sum of gradients a model.
    """
    if not config.qk_norm:
        return [None] * len(layers)
    gains = [norm.weight for layer in layers for norm in (layer.attention.q_norm, layer.attention.k_norm)]  # type: ignore[union-attr]
    copied = communicator.copy_to_ranks(torch.stack(cast(list[Tensor], gains)))
    return cast(Sequence[Tensor], copied.unflatten(0, (-1, 2)).unbind())


# In both layers `added` is what the part before adds to x: the next norm makes the sum, so that compilation can fuse
# the two. Both are (B, T, D).


class StandardLayer(Layer):
    """x = x + MHA(LN1 x);  x = x + FFN(LN2 x)"""

    def __init__(self, config: GPTConfig, groups: UnitRange, communicator: Communicator) -> None:
        super().__init__()
        self.communicator = communicator
        self.attention_norm = AddNorm(config)
        self.attention = Attention(config, groups)
        self.ffn_norm = AddNorm(config)
        self.ffn = FFN(config, groups)

    def forward(
        self, x: Tensor, added: Tensor, rotary: Rotary | None, scope: AttentionScope | None, qk_gains: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x, normed = self.attention_norm(x, added)
        normed = self.communicator.copy_to_ranks(normed)
        added = self.communicator.all_reduce(self.run(self.attention, normed, rotary, scope, qk_gains))
        x, normed = self.ffn_norm(x, added)
        normed = self.communicator.copy_to_ranks(normed)
        return x, self.communicator.all_reduce(self.run(self.ffn, normed))


class ParallelLayer(Layer):
    """x = x + MHA(LN x) + FFN(LN x)"""

    def __init__(self, config: GPTConfig, groups: UnitRange, communicator: Communicator) -> None:
        super().__init__()
        self.communicator = communicator
        self.norm = AddNorm(config)
        self.attention = Attention(config, groups)
        self.ffn = FFN(config, groups)

    def forward(
        self, x: Tensor, added: Tensor, rotary: Rotary | None, scope: AttentionScope | None, qk_gains: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x, normed = self.norm(x, added)
        normed = self.communicator.copy_to_ranks(normed)
        attended = self.run(self.attention, normed, rotary, scope, qk_gains)
        return x, self.communicator.all_reduce(self.run(self.ffn, normed, attended))


LAYERS: dict[str, type[StandardLayer] | type[ParallelLayer]] = {"standard": StandardLayer, "parallel": ParallelLayer}


class AddNorm(Norm):
    """x and what is added to it, (B, T, D) each -> (x + added, norm(x + added))."""

    def forward(self, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        total = x + added
        return total, super().forward(total)


class QKNorm(nn.Module):
    """RMSNorm over the head dimension, (..., K); the gain, for all heads, is its weight by way of `qk_gains`."""

    weight_role = WeightRole.NORM

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.head_size))
        self.epsilon = config.norm_epsilon

    def forward(self, x: Tensor, gain: Tensor) -> Tensor:
        return F.rms_norm(x, gain.shape, gain, eps=self.epsilon)


class Attention(nn.Module):
    """The heads here, (B, T, D) -> their part of (B, T, D)."""

    def __init__(self, config: ModelConfig, groups: UnitRange) -> None:
        super().__init__()
        heads_per_group = config.heads // config.kv_heads
        self.qkv = QKVLinear(config.hidden_size, groups, heads_per_group, config.head_size)
        self.q_norm = QKNorm(config) if config.qk_norm else None
        self.k_norm = QKNorm(config) if config.qk_norm else None
        self.out = RowParallelLinear(groups.in_units_of(heads_per_group * config.head_size), config.hidden_size)

    def forward(
        self, x: Tensor, rotary: Rotary | None, scope: AttentionScope | None, qk_gains: Tensor | None
    ) -> Tensor:
        query, key, value = self.qkv(x)
        if qk_gains is not None and self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query, qk_gains[0]), self.k_norm(key, qk_gains[1])
        if rotary is not None:
            query, key = (rotate(part, rotary, heads_axis=-3) for part in (query, key))
        attended: Tensor = self.out(causal_attention(query, key, value, scope))
        return attended


class FFN(nn.Module):
    """The inner columns that go with the heads here, (B, T, D) -> their part of (B, T, D).

    In the parallel form that of the attention, `attended`, is added.
    """

    def __init__(self, config: ModelConfig, groups: UnitRange) -> None:
        super().__init__()
        inner = groups.in_units_of(config.ffn_size // config.kv_heads)
        self.gate = ColumnParallelLinear(config.hidden_size, inner) if config.ffn == "swiglu" else None
        self.up = ColumnParallelLinear(config.hidden_size, inner)
        self.down = RowParallelLinear(inner, config.hidden_size)

    def forward(self, x: Tensor, attended: Tensor | None = None) -> Tensor:
        part: Tensor = self.down(ffn_inner(x, self.gate, self.up))
        return part if attended is None else attended + part
