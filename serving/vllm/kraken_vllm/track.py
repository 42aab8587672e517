"""A layer of Parallel Track (arXiv 2602.07306): each of P ranks holds N / P whole tracks. Imports no vLLM.

Shapes: n = N / P tracks of this rank, T tokens, D hidden size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kraken_vllm.backend import Backend
from kraken_vllm.kraken import KrakenAttention, KrakenFFN
from kraken_vllm.layers import Rotary

State = tuple[Tensor, Tensor]  # the tracks x_i, (n, T, D), and y, with which all began the block, (T, D)


class TrackLayer(nn.Module):
    """x_i = x_i + MHA_i(LN1_i x_i); x_i = x_i + FFN_i(LN2_i x_i).

    Before it, every `sync_every` layers, y = y + sum_i (x_i - y) over the tracks of all ranks, and x_i = y.
    """

    has_conjunction = False

    def __init__(self, config: Any, backend: Backend, prefix: str, index: int) -> None:
        super().__init__()
        self.sums_before = index > 0 and index % config.sync_every == 0
        self.all_reduce = backend.all_reduce
        self.attention = KrakenAttention(config, backend, f"{prefix}.attention")
        self.ffn = KrakenFFN(config, backend, f"{prefix}.ffn")

    @staticmethod
    def begin(embedding: Tensor, count: int) -> State:
        return embedding.expand(count, -1, -1), embedding

    def end(self, state: State) -> Tensor:
        tracks, begun = state
        return begun + self.all_reduce((tracks - begun).sum(dim=0))

    def forward(self, state: State, rotary: Rotary | None) -> State:
        tracks, begun = state
        if self.sums_before:
            begun = self.end(state)
            tracks = begun.expand(len(tracks), -1, -1)
        tracks = tracks + self.attention(tracks, rotary)
        return tracks + self.ffn(tracks), begun
