"""A layer of a Kraken: each of P ranks holds N / P whole sub-layers. Imports no vLLM.

Shapes: n = N / P sub-layers of this rank, T tokens, D hidden size, H heads of a sub-layer, G key-value heads of it,
K head dimension as the attention kernel has it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kraken_vllm.backend import Backend
from kraken_vllm.late_sum import LateSum
from kraken_vllm.layers import Heads, Rotary, StackedLinear, StackedNorm, ffn_inner


class KrakenAttention(nn.Module):
    """MHA_i(LN1_i(x_i)) of the rank's sub-layers, (n, T, D) -> (n, T, D), as n H heads of one attention."""

    def __init__(self, config: Any, backend: Backend, prefix: str) -> None:
        super().__init__()
        share, width, epsilon = backend.share, config.hidden_size, config.norm_epsilon
        count = share.of(config.streams)
        heads, kv_heads = config.heads_per_stream, config.kv_heads_per_stream
        self.split = (heads, kv_heads, kv_heads)
        self.heads = Heads(config, backend, count * heads, count * kv_heads, f"{prefix}.heads")
        padding, head_dim = self.heads.padding, self.heads.head_dim
        self.norm = StackedNorm(count, config.norm, width, epsilon, share.along)
        self.qkv = StackedLinear(
            backend, count, width, sum(self.split) * head_dim, f"{prefix}.qkv",
            lambda full: padding.pad(share.along(full), 1),
        )  # fmt: skip
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm, self.k_norm = (
                StackedNorm(
                    count, "rmsnorm", head_dim, self.heads.qk_epsilon, lambda full: padding.pad(share.along(full), 1)
                )
                for _ in range(2)
            )
        self.out = StackedLinear(
            backend, count, heads * head_dim, width, f"{prefix}.out", lambda full: padding.pad(share.along(full), 2)
        )

    def forward(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        count, tokens, _ = x.shape
        by_head = self.qkv(self.norm(x)).view(count, tokens, sum(self.split), -1)
        query, key, value = by_head.split(self.split, dim=2)  # (n, T, H, K), the others (n, T, G, K)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (part.transpose(0, 1).flatten(1, 2) for part in (query, key, value))
        mixed = self.heads(query, key, value, rotary)
        result: Tensor = self.out(mixed.view(tokens, count, -1).transpose(0, 1))
        return result


class KrakenFFN(nn.Module):
    """FFN_i(LN2_i(z_i)), (n, T, D) -> (n, T, D)."""

    def __init__(self, config: Any, backend: Backend, prefix: str) -> None:
        super().__init__()
        share, width, inner = backend.share, config.hidden_size, config.intermediate_size
        count = share.of(config.streams)

        def linear(in_features: int, out_features: int, name: str) -> StackedLinear:
            return StackedLinear(backend, count, in_features, out_features, f"{prefix}.{name}", share.along)

        self.norm = StackedNorm(count, config.norm, width, config.norm_epsilon, share.along)
        self.gate = linear(width, inner, "gate") if config.ffn == "swiglu" else None
        self.up = linear(width, inner, "up")
        self.down = linear(inner, width, "down")

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(ffn_inner(self.norm(x), self.gate, self.up))
        return result


class KrakenLayer(nn.Module):
    """a_i = MHA_i(LN1_i(x_i)); x_i = x_i + a_i + FFN_i(LN2_i(a_i + sum_j x_j)), (n, T, D) -> (n, T, D).

    With `ffn_reads_stream` the FFN reads LN2_i(x_i + a_i + sum_j x_j).
    The sum over the sub-layers of all ranks is under way while the attention computes (arXiv 2408.07802, section 3).
    """

    has_conjunction = True

    def __init__(self, config: Any, backend: Backend, prefix: str, index: int) -> None:
        super().__init__()
        # Streams that start as the embedding are equal before the first layer, and it counts once, not N times.
        self.reads_embedding = index == 0 and config.embedding_size is None
        self.reads_stream = config.ffn_reads_stream
        self.sum = LateSum(backend, config.overlap)
        self.attention = KrakenAttention(config, backend, f"{prefix}.attention")
        self.ffn = KrakenFFN(config, backend, f"{prefix}.ffn")

    @staticmethod
    def begin(embedding: Tensor, count: int) -> Tensor:
        return embedding.expand(count, -1, -1)

    def end(self, state: Tensor) -> Tensor:
        return state  # the conjunction joins them

    def forward(self, streams: Tensor, rotary: Rotary | None) -> Tensor:
        partial = streams[0] if self.reads_embedding else streams.sum(dim=0)
        begun = partial if self.reads_embedding else self.sum.begin(partial)
        attended = self.attention(streams, rotary)
        residual = streams + attended
        own = residual if self.reads_stream else attended
        with_sum = own + partial if self.reads_embedding else self.sum.add(partial, begun, own)
        result: Tensor = residual + self.ffn(with_sum)
        return result
