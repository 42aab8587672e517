"""The same model with its collectives overlapped, waited for, or left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kraken_train.exchange import Exchange
from kraken_train.placement import ModelRank

OVERLAPPED = "overlapped"  # as the model is meant to run
BLOCKING = "blocking"  # nothing is computed while a collective is under way
SILENT = "silent"  # no communication: the computation alone


class SwitchedExchange:
    """One of several exchanges, as last chosen by `use`, so that variants share the weights of one model."""

    def __init__(self, variants: Mapping[str, Exchange]) -> None:
        self.variants = variants
        self.current = next(iter(variants.values()))

    @property
    def model_rank(self) -> ModelRank:
        return self.current.model_rank

    def use(self, variant: str) -> None:
        self.current = self.variants[variant]

    def broadcast(self, shared: Tensor) -> Tensor:
        return self.current.broadcast(shared)

    def reduce(self, partial: Tensor) -> Tensor:
        return self.current.reduce(partial)

    def start(self, streams: Tensor) -> Any:
        return self.current.start(streams)

    def finish(self, handle: Any) -> Tensor:
        return self.current.finish(handle)

    def maximum(self, values: Tensor) -> Tensor:
        return self.current.maximum(values)

    def gather(self, part: Tensor) -> Tensor:
        return self.current.gather(part)


@dataclass
class WithoutOverlap:
    """A real exchange whose `start` waits for the sum."""

    inner: Exchange

    @property
    def model_rank(self) -> ModelRank:
        return self.inner.model_rank

    def broadcast(self, shared: Tensor) -> Tensor:
        return self.inner.broadcast(shared)

    def reduce(self, partial: Tensor) -> Tensor:
        return self.inner.reduce(partial)

    def start(self, streams: Tensor) -> Tensor:
        return self.inner.finish(self.inner.start(streams))

    def finish(self, handle: Tensor) -> Tensor:
        return handle

    def maximum(self, values: Tensor) -> Tensor:
        return self.inner.maximum(values)

    def gather(self, part: Tensor) -> Tensor:
        return self.inner.gather(part)
