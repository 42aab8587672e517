"""A layer of the baselines, and its parts, with tensor parallelism by heads and columns of the FFN. Imports no vLLM.

Shapes: T tokens, D hidden size, h heads and g key-value heads of this rank, K head dimension as the attention kernel
has it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kraken_vllm.backend import Backend
from kraken_vllm.layers import Heads, Linear, Norm, Rotary, ffn_inner


class GPTAttention(nn.Module):
    """(T, D) -> (T, D), this rank's part of a sum."""

    def __init__(self, config: Any, backend: Backend, prefix: str) -> None:
        super().__init__()
        share, width = backend.share, config.hidden_size
        heads, kv_heads = share.of(config.heads_per_stream), share.kv_heads(config.kv_heads_per_stream)
        self.split = (heads // kv_heads, 1, 1)
        self.heads = Heads(config, backend, heads, kv_heads, f"{prefix}.heads")
        padding, head_dim, true = self.heads.padding, self.heads.head_dim, config.head_dim
        self.qkv = Linear(
            backend, width, kv_heads * sum(self.split) * head_dim, f"{prefix}.qkv",
            lambda full: padding.pad(share.heads_by_group(full, true), 1).flatten(0, 1),
        )  # fmt: skip
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm, self.k_norm = (
                Norm("rmsnorm", head_dim, self.heads.qk_epsilon, lambda full: padding.pad(full, 0)) for _ in range(2)
            )
        self.out = Linear(
            backend, heads * head_dim, width, f"{prefix}.out", lambda full: padding.pad(share.along(full, 1), 1)
        )

    def forward(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        by_group = self.qkv(x).view(len(x), -1, sum(self.split), self.heads.head_dim)  # (T, g, h / g + 2, K)
        query, key, value = (part.flatten(1, 2) for part in by_group.split(self.split, dim=2))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        result: Tensor = self.out(self.heads(query, key, value, rotary))
        return result


class GPTFFN(nn.Module):
    """(T, D) -> (T, D), this rank's part of a sum."""

    def __init__(self, config: Any, backend: Backend, prefix: str) -> None:
        super().__init__()
        share, width = backend.share, config.hidden_size
        inner = share.of(config.intermediate_size)
        swiglu = config.ffn == "swiglu"
        self.gate = Linear(backend, width, inner, f"{prefix}.gate", share.along) if swiglu else None
        self.up = Linear(backend, width, inner, f"{prefix}.up", share.along)
        self.down = Linear(backend, inner, width, f"{prefix}.down", lambda full: share.along(full, 1))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(ffn_inner(x, self.gate, self.up))
        return result


class GPTLayer(nn.Module):
    """The parts of a layer with one residual stream."""

    norms: tuple[str, ...]
    has_conjunction = False

    def __init__(self, config: Any, backend: Backend, prefix: str, index: int) -> None:
        super().__init__()
        self.all_reduce = backend.all_reduce
        for name in self.norms:
            setattr(self, name, Norm(config.norm, config.hidden_size, config.norm_epsilon))
        self.attention = GPTAttention(config, backend, f"{prefix}.attention")
        self.ffn = GPTFFN(config, backend, f"{prefix}.ffn")

    @staticmethod
    def begin(embedding: Tensor, count: int) -> Any:
        return embedding

    def end(self, state: Any) -> Tensor:
        stream: Tensor = state
        return stream


class LayerOfTwoNorms(GPTLayer):
    """One before the attention, one before the FFN; subclasses define `forward`."""

    norms = ("attention_norm", "ffn_norm")
    attention_norm: Norm
    ffn_norm: Norm


class StandardLayer(LayerOfTwoNorms):
    """x = x + MHA(LN1 x); x = x + FFN(LN2 x), (T, D) -> (T, D)."""

    def forward(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        x = x + self.all_reduce(self.attention(self.attention_norm(x), rotary))
        return x + self.all_reduce(self.ffn(self.ffn_norm(x)))


class ParallelLayer(GPTLayer):
    """x = x + MHA(LN x) + FFN(LN x), (T, D) -> (T, D)."""

    norms = ("norm",)
    norm: Norm

    def forward(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        normed = self.norm(x)
        return x + self.all_reduce(self.attention(normed, rotary) + self.ffn(normed))
