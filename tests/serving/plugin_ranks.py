"""The decoder of the vLLM plugin on ranks that are threads, without vLLM."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from kraken_vllm.configuration import KrakenConfig
from kraken_vllm.decoder import Decoder
from kraken_vllm.shares import Share
from torch import Tensor, nn
from torch.nn import functional as F

from checkpoints.exports.folder import describe
from kraken_train.model.config import ModelConfig


def plugin_config(config: ModelConfig, **more: Any) -> KrakenConfig:
    """As from the config.json of an export."""
    return KrakenConfig(**describe(config, {}, torch.float32), **more)


class Attention(nn.Module):
    """Of one sequence."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int, scale: float) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.scale = heads, kv_heads, head_dim, scale

    def forward(self, *parts: Tensor) -> Tensor:
        query, key, value = (part.view(len(part), -1, self.head_dim).transpose(0, 1) for part in parts)
        assert len(query) == self.heads
        assert len(key) == len(value) == self.kv_heads
        group = self.heads // self.kv_heads
        key, value = key.repeat_interleave(group, dim=0), value.repeat_interleave(group, dim=0)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale)
        return mixed.transpose(0, 1).flatten(1)


class Exchange:
    """Sums among the threads of `size` ranks, in the order in which they ask."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.parts: list[Tensor | None] = [None] * size

    def sum(self, rank: int, partial: Tensor) -> Tensor:
        self.parts[rank] = partial
        self.barrier.wait()
        total: Tensor = sum(part for part in self.parts if part is not None)  # type: ignore[assignment]
        self.barrier.wait()
        return total


class ThreadBackend:
    """`kraken_vllm.backend.Backend` of one rank; `events` are what it was asked for, in order."""

    def __init__(self, rank: int, exchange: Exchange, is_quantized: bool) -> None:
        self.share = Share(rank, len(exchange.parts))
        self.exchange = exchange
        self.is_quantized = is_quantized
        self.started: Tensor | None = None
        self.events: list[str] = []

    def attention(self, heads: int, kv_heads: int, head_dim: int, scale: float, prefix: str) -> nn.Module:
        attention = Attention(heads, kv_heads, head_dim, scale)
        attention.register_forward_hook(lambda *_: self.events.append("attention"))
        return attention

    def linear(self, in_features: int, out_features: int, prefix: str) -> nn.Linear:
        return nn.Linear(in_features, out_features, bias=False)

    def all_reduce(self, partial: Tensor) -> Tensor:
        self.events.append("all_reduce")
        return self.exchange.sum(self.share.rank, partial)

    def start_sum(self, partial: Tensor) -> Tensor:
        self.events.append("start_sum")
        assert self.started is None
        self.started = partial.clone()
        return torch.full_like(partial, torch.nan)  # nobody may look at it yet

    def add_sum(self, partial: Tensor, pending: Tensor, own: Tensor) -> Tensor:
        self.events.append("add_sum")
        assert self.started is not None
        assert torch.equal(partial, self.started)  # not overwritten meanwhile
        total, self.started = self.exchange.sum(self.share.rank, self.started), None
        return own + total


def hidden_on_ranks(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    ids: Tensor,
    size: int,
    is_quantized: bool = False,
    overlap: bool = True,
) -> tuple[list[Tensor], list[list[str]]]:
    """Token ids (T,) -> what the head sees, (T, D), on each rank; and each rank's events."""
    exchange = Exchange(size)
    results: list[Any] = [None] * size
    backends = [ThreadBackend(rank, exchange, is_quantized) for rank in range(size)]

    def run(rank: int) -> None:
        try:
            decoder = Decoder(plugin_config(config, overlap=overlap), backends[rank]).double()
            decoder.load((name, weight) for name, weight in weights.items() if name != "lm_head.weight")
            with torch.no_grad():
                results[rank] = decoder(ids, torch.arange(len(ids)))
        except BaseException as error:
            exchange.barrier.abort()
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, threading.BrokenBarrierError):
            raise result
    return results, [backend.events for backend in backends]
