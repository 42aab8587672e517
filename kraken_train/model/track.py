"""Parallel Track: N narrow Transformers that run apart for D layers at a time and then are summed.

Source: Wang et al., "Parallel Track Transformers: Enabling Fast GPU Inference with Reduced Synchronization", arXiv
2602.07306. In a block of D = `sync_every` layers, with y the residual stream that all tracks begin it with:

    x_i = y
    D times   x_i = x_i + MHA_i(LN1_i x_i);  x_i = x_i + FFN_i(LN2_i x_i)
    y = y + sum_i (x_i - y)

y starts as the embedding, and the logits are those of the last y. Where D does not divide the layers, the last block
has fewer. Our choices where we had the paper's summary alone: tracks are summed, not averaged; what they began a block
with counts once, not N times, since it would grow with N^(L / D); nothing but the sum joins the tracks, no norm and no
matrix; and the width of a track is that of the embedding.

Each rank has its part of the gradient of y, and the sums over the ranks are those of its gradients, too: one in each
block and direction, and nothing is computed meanwhile.

Shapes: N tracks in all, n of them here, B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from kraken_train.model.initialization import initialize
from kraken_train.model.language_model import LanguageModel
from kraken_train.model.layers import AttentionScope, Layer, StackedAttention, StackedFFN
from kraken_train.model.rotary import Rotary
from kraken_train.model.tensor_parallel import last_sum
from kraken_train.model.track_config import TrackConfig
from kraken_train.parallel.communicator import Communicator, LocalCommunicator
from kraken_train.parallel.sharding import UnitRange, all_units


class TrackModel(LanguageModel):
    """See the module's formulas.

    `units` are the tracks of this rank (default: all); `communicator`, `seed` and `vocabulary` as in `KrakenModel`.
    """

    def __init__(
        self,
        config: TrackConfig,
        units: UnitRange | None = None,
        communicator: Communicator | None = None,
        seed: int = 0,
        vocabulary: UnitRange | None = None,
    ) -> None:
        super().__init__(config, communicator or LocalCommunicator(), vocabulary)
        self.units = units or all_units(config.num_tracks)
        self.layers = nn.ModuleList(  # type: ignore[assignment]
            TrackLayer(config, self.units, self.communicator, index) for index in range(config.num_layers)
        )
        initialize(self, seed, residual_depth=config.num_layers * config.num_tracks)

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        return self.units.count, self.config.kv_heads, self.config.head_size

    def hidden(self, embedding: Tensor, rotary: Rotary | None, scopes: Sequence[AttentionScope | None]) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        begun = self.communicator.copy_to_ranks(embedding)
        tracks = begin_block(begun, self.units.count)
        for layer, scope in zip(self.layers, scopes, strict=True):
            tracks, begun = layer(tracks, begun, rotary, scope)
        return last_sum(self.communicator, begun, (tracks - begun).sum(dim=0))


def begin_block(begun: Tensor, tracks: int) -> Tensor:
    """y (B, T, D) -> x_i (n, B, T, D), laid out as in every layer, so that one compilation serves all."""
    return begun.expand(tracks, -1, -1, -1).contiguous()


class TrackLayer(Layer):
    """x_i = x_i + MHA_i(LN1_i x_i);  x_i = x_i + FFN_i(LN2_i x_i) of the tracks here, behind the sum of a block."""

    def __init__(self, config: TrackConfig, units: UnitRange, communicator: Communicator, index: int) -> None:
        super().__init__()
        self.communicator = communicator
        self.sums_before = index > 0 and index % config.sync_every == 0
        self.attention = StackedAttention(units, config)
        self.ffn = StackedFFN(units, config)

    def forward(
        self, tracks: Tensor, begun: Tensor, rotary: Rotary | None, scope: AttentionScope | None
    ) -> tuple[Tensor, Tensor]:
        """x_i (n, B, T, D) and y (B, T, D) -> the same after the layer."""
        if self.sums_before:
            begun = begun + self.communicator.wait(self.communicator.start_all_reduce(tracks - begun))
            tracks = begin_block(begun, len(tracks))
        attended = self.run(self.attention, tracks, rotary, scope)
        # Its formula, x_i + a_i + FFN_i(LN2_i(a_i + s)), with x_i in place of Kraken's sum s.
        return self.run(self.ffn, tracks, attended, tracks), begun

    def residual(self, output: tuple[Tensor, Tensor]) -> Tensor:
        tracks, begun = output
        return begun + self.communicator.wait(self.communicator.start_all_reduce(tracks - begun))
