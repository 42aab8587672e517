"""Kraken: every layer is N independent, narrower sub-layers whose outputs are summed once per layer.

Source: Prabhakar, Zhang, Wentzlaff, "Kraken: Inherently Parallel Transformers For Efficient Multi-Device
Inference", NeurIPS 2024, arXiv 2408.07802, section 3.

    layer 1      a_i = MHA_i(LN1_i(e));    x_i = e + a_i + FFN_i(LN2_i(e + a_i))
    layer l > 1  s = sum_j x_j;  a_i = MHA_i(LN1_i(x_i));  x_i = x_i + a_i + FFN_i(LN2_i(a_i + s))
    conjunction  y = sum_i W_i x_i;  logits = LN(y) E^T

Two settings are not the paper's. With `ffn_reads_stream` every FFN reads LN2_i(x_i + a_i + s), s = e in layer 1. With
`embedding_size` e and y are wider than the streams, which start as x_i = M_i e; layer 1 is then like the others.

The all-reduce of the sum s starts before the attention and is needed only after it, so the attention hides it.

Shapes: N sub-layers in all, n of them here, B batch, T tokens, D hidden size, E width of the embedding (default: D).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from kraken_train.kernels.selection import fits_kernels
from kraken_train.model.initialization import initialize
from kraken_train.model.kraken_config import KrakenConfig
from kraken_train.model.language_model import LanguageModel
from kraken_train.model.layers import Ahead, AttentionScope, Layer, StackedAttention, StackedFFN, StackedLinear
from kraken_train.model.rotary import Rotary
from kraken_train.model.weight_kind import WeightKind
from kraken_train.parallel.communicator import Communicator, LocalCommunicator
from kraken_train.parallel.sharding import UnitRange, all_units

if TYPE_CHECKING:
    from kraken_train.kernels.fused import FusedKernels


class KrakenModel(LanguageModel):
    """See the module's formulas.

    `units` are the sub-layers of this rank and `vocabulary` its rows of the embedding (default: all); `communicator`
    sums over the ranks (default: there is one). The initial weights are drawn from `seed` and depend on none of these.
    """

    def __init__(
        self,
        config: KrakenConfig,
        units: UnitRange | None = None,
        communicator: Communicator | None = None,
        seed: int = 0,
        vocabulary: UnitRange | None = None,
    ) -> None:
        super().__init__(config, communicator or LocalCommunicator(), vocabulary)
        self.units = units or all_units(config.num_sub_layers)
        self.embedding_maps = None
        if config.embedding_size is not None:
            self.embedding_maps = EmbeddingMaps(self.units, config.embedding_size, config.hidden_size)
        self.layers = nn.ModuleList(  # type: ignore[assignment]
            KrakenLayer(config, self.units, self.communicator) for _ in range(config.num_layers)
        )
        self.conjunction = Conjunction(self.units, config.hidden_size, config.embedding_width)
        initialize(self, seed, residual_depth=config.num_layers * config.num_sub_layers)

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        return self.units.count, self.config.kv_heads, self.config.head_size

    def hidden(self, embedding: Tensor, rotary: Rotary | None, scopes: Sequence[AttentionScope | None]) -> Tensor:
        """(B, T, E) -> (B, T, E)."""
        embedding = self.communicator.copy_to_ranks(embedding)
        streams = Streams(self.first_streams(embedding))
        # Where all streams start as the embedding it counts once, not N times.
        total: Tensor | None = embedding if self.embedding_maps is None else None
        for layer, follower, scope in zip(self.layers, [*self.layers, None][1:], scopes, strict=True):
            streams, total = layer(streams, total, rotary, scope, follower), None
        return self.communicator.all_reduce(self.conjunction(streams.x).sum(dim=0))

    def first_streams(self, embedding: Tensor) -> Tensor:
        """x_i before the first layer, (B, T, E) -> (n, B, T, D)."""
        # Laid out as in every later layer, so that one compilation serves all.
        copies = embedding.expand(self.units.count, -1, -1, -1).contiguous()
        return copies if self.embedding_maps is None else self.embedding_maps(copies)

    def use_fused_kernels(self) -> bool:
        if not fits_kernels(self.units.count, self.config.hidden_size):
            return False
        from kraken_train.kernels.fused import FusedKernels  # noqa: PLC0415 (imports Triton, which may be missing)

        for layer in self.layers:
            for module in layer.modules():
                if isinstance(module, KrakenLayer | StackedAttention | StackedFFN):
                    module.kernels = FusedKernels
        return True


class EmbeddingMaps(StackedLinear):
    """M_i of all sub-layers here. At the start a stream has the variance of the embedding."""

    weight_kind = WeightKind.EMBEDDING_MAP

    @property
    def initial_std(self) -> float:
        return math.sqrt(1 / self.weight.shape[-1])


class Conjunction(StackedLinear):
    """W_i of all sub-layers here, whose outputs are summed."""

    weight_kind = WeightKind.CONJUNCTION


class Streams(NamedTuple):
    """The streams between two layers, and what fused kernels have computed of them for the next one."""

    x: Tensor  # x_i, (n, B, T, D)
    part: Tensor | None = None  # their sum here, (B, T, D)
    normed: Tensor | None = None  # LN1_i(x_i), (n, B, T, D)


class KrakenLayer(Layer):
    """a_i = MHA_i(LN1_i(x_i));  x_i = x_i + a_i + FFN_i(LN2_i(a_i + s)) of the sub-layers here."""

    kernels: type[FusedKernels] | None = None

    def __init__(self, config: KrakenConfig, units: UnitRange, communicator: Communicator) -> None:
        super().__init__()
        self.communicator = communicator
        self.attention = StackedAttention(units, config)
        self.ffn = StackedFFN(units, config, reads_stream=config.ffn_reads_stream)

    def forward(
        self,
        streams: Streams,
        total: Tensor | None,
        rotary: Rotary | None,
        scope: AttentionScope | None,
        follower: KrakenLayer | None,
    ) -> Streams:
        """x_i -> x_i; `total` is s (B, T, D) where it is known, else it is summed here.

        With fused kernels it computes the first norm of `follower`, the next layer, too.
        """
        pending = None
        if total is None:
            part = streams.x if streams.part is None else streams.part[None]
            pending = self.communicator.start_all_reduce(part)
        is_normed = streams.normed is not None
        attended = self.run(self.attention, streams.normed if is_normed else streams.x, rotary, scope, is_normed)
        total = self.communicator.wait(pending) if total is None else total
        self.show(attention=attended, sum=total)
        # Where activations are not kept, the norm is not either: the next attention computes it, and computes it again.
        if self.kernels is None or follower is None or (self.recompute and torch.is_grad_enabled()):
            return Streams(self.run(self.ffn, streams.x, attended, total))
        ahead = Ahead(follower.attention.norm.weight, self.communicator.reduction_dtype(streams.x))
        return Streams(*self.run(self.ffn, streams.x, attended, total, ahead))

    def residual(self, output: Streams) -> Tensor:
        return output.x
