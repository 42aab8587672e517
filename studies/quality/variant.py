"""A Kraken with the changes that the quality study asks about; `variant_config` states the formula.

Shapes: N sub-layers in all, n of them here, B batch, T tokens, D hidden size, W width of the embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kraken_train.model.initialization import initialize
from kraken_train.model.kraken import Conjunction
from kraken_train.model.language_model import LanguageModel
from kraken_train.model.layers import (
    AttentionScope,
    Layer,
    StackedAttention,
    StackedFFN,
    StackedLinear,
    StackedNorm,
    ffn_inner,
)
from kraken_train.model.rotary import Rotary
from kraken_train.parallel.communicator import Communicator, LocalCommunicator
from kraken_train.parallel.sharding import ShardedDim, UnitRange, all_units
from kraken_train.parallel.weight_role import WeightRole
from studies.quality.variant_config import VariantConfig


class VariantModel(LanguageModel):
    def __init__(
        self,
        config: VariantConfig,
        units: UnitRange | None = None,
        communicator: Communicator | None = None,
        seed: int = 0,
        vocabulary: UnitRange | None = None,
    ) -> None:
        super().__init__(config, communicator or LocalCommunicator(), vocabulary)
        self.units = units or all_units(config.num_sub_layers)
        width, outer = config.hidden_size, config.embedding_width
        self.stream_maps = StackedLinear(self.units, outer, width) if config.has_maps else None
        self.layers = nn.ModuleList(  # type: ignore[assignment]
            VariantLayer(config, self.units, self.communicator, index) for index in range(config.num_layers)
        )
        self.conjunction = Conjunction(self.units, width, outer)
        initialize(self, seed, residual_depth=config.residual_depth or config.num_layers * config.num_sub_layers)
        if self.stream_maps is not None:  # the standard deviation of a stream is that of the embedding
            with torch.no_grad():
                self.stream_maps.weight.mul_(1 / (0.02 * outer**0.5))

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        return self.units.count, self.config.kv_heads, self.config.head_size

    def hidden(self, embedding: Tensor, rotary: Rotary | None, scopes: Sequence[AttentionScope | None]) -> Tensor:
        """(B, T, W) -> (B, T, W)."""
        embedding = self.communicator.copy_to_ranks(embedding)
        streams = embedding.expand(self.units.count, -1, -1, -1).contiguous()
        total: Tensor | None = embedding  # all streams start as the embedding, and it counts once, not N times
        if self.stream_maps is not None:
            streams, total = self.stream_maps(streams), None
        late: Tensor | None = None
        for layer, scope in zip(self.layers, scopes, strict=True):
            streams, late = layer(streams, total, late, rotary, scope)
            total = None
        return self.communicator.all_reduce(self.conjunction(streams).sum(dim=0))


class Gain(nn.Module):
    """x times a learned vector per sub-layer that begins as `start`: (B, T, D) or (n, B, T, D) -> (n, B, T, D)."""

    weight_role = WeightRole.NORM

    def __init__(self, units: UnitRange, size: int, start: float) -> None:
        super().__init__()
        self.sharded_dim = ShardedDim(units, axis=0)
        self.weight = nn.Parameter(torch.empty(units.count, size))  # begins as ones, as all gains
        self.start = start

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.weight + (self.start - 1))[:, None, None]


class FixedGain(nn.Module):
    """x times `start`."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.start = start

    def forward(self, x: Tensor) -> Tensor:
        return x * self.start


def make_gain(config: VariantConfig, units: UnitRange, start: float | None) -> nn.Module | None:
    if start is None:
        return None
    return Gain(units, config.hidden_size, start) if config.learned_gains else FixedGain(start)


class VariantAttention(StackedAttention):
    """MHA_i(LN1_i(x_i + g s')), (n, B, T, D) -> (n, B, T, D)."""

    def __init__(self, units: UnitRange, config: VariantConfig, is_first: bool) -> None:
        super().__init__(units, config)
        self.late_gain = None if is_first else make_gain(config, units, config.late_start)

    def forward(  # type: ignore[override]
        self, x: Tensor, late: Tensor | None, rotary: Rotary | None = None, scope: AttentionScope | None = None
    ) -> Tensor:
        if self.late_gain is not None and late is not None:
            x = x + self.late_gain(late)
        return super().forward(x, rotary, scope)


class VariantFFN(StackedFFN):
    """x_i + a_i + FFN_i(LN2_i(a_i + g s + g x_i)) + g s, each (n, B, T, D), but s (B, T, D)."""

    def __init__(self, units: UnitRange, config: VariantConfig) -> None:
        super().__init__(units, config, config.ffn_reads_stream)
        width, inner = config.hidden_size, config.ffn_size
        self.sum_gain = make_gain(config, units, config.sum_start)
        self.own_gain = make_gain(config, units, config.own_start)
        self.residual_gain = make_gain(config, units, config.residual_start)
        self.is_concatenated = config.concatenated
        self.sum_norm = None
        if config.separate_norms or config.concatenated:
            self.sum_norm = StackedNorm(units, width, config.norm, config.norm_epsilon)
        if config.concatenated:
            self.gate = None if self.gate is None else StackedLinear(units, 2 * width, inner)
            self.up = StackedLinear(units, 2 * width, inner)

    def forward(self, streams: Tensor, attended: Tensor, total: Tensor) -> Any:  # type: ignore[override]
        own = streams + attended if self.reads_stream else attended
        own = own if self.own_gain is None else own + self.own_gain(streams)
        exchanged = total if self.sum_gain is None else self.sum_gain(total)
        if self.sum_norm is None:
            normed = self.norm(own + exchanged)
        else:
            normed, exchanged = self.norm(own), self.sum_norm(exchanged.expand(len(streams), -1, -1, -1))
            normed = torch.cat((normed, exchanged), dim=-1) if self.is_concatenated else normed + exchanged
        x = streams + attended + self.down(ffn_inner(normed, self.gate, self.up))
        return x if self.residual_gain is None else x + self.residual_gain(total)


class VariantLayer(Layer):
    def __init__(self, config: VariantConfig, units: UnitRange, communicator: Communicator, index: int) -> None:
        super().__init__()
        self.communicator = communicator
        self.shares_attention = index < config.shared_attention_layers
        self.attention = VariantAttention(units, config, index == 0)
        self.ffn = VariantFFN(units, config)

    def forward(
        self,
        streams: Tensor,
        total: Tensor | None,
        late: Tensor | None,
        rotary: Rotary | None,
        scope: AttentionScope | None,
    ) -> tuple[Tensor, Tensor]:
        """The streams after the layer, and the sum s that it has used."""
        pending = None if total is not None else self.communicator.start_all_reduce(streams)
        attended = self.run(self.attention, streams, late, rotary, scope)
        total = self.communicator.wait(pending) if total is None else total
        if self.shares_attention:
            shared = self.communicator.copy_to_ranks(self.communicator.all_reduce(attended.sum(dim=0)))
            attended = shared.expand(len(streams), -1, -1, -1)
        return self.run(self.ffn, streams, attended, total), total

    def residual(self, output: tuple[Tensor, Tensor]) -> Tensor:
        return output[0]
