"""Communicators with which a model overlaps its collectives, waits for them, or omits them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kraken_train.parallel.communicator import Communicator
from kraken_train.parallel.sharding import ModelRank

OVERLAPPED = "overlapped"  # as the model is meant to run
BLOCKING = "blocking"  # nothing is computed while a collective is under way
SILENT = "silent"  # no communication: the computation alone


class ForwardingCommunicator:
    """Does what another communicator does; subclasses change some of it."""

    def __init__(self, inner: Communicator) -> None:
        self.inner = inner

    @property
    def model_rank(self) -> ModelRank:
        return self.inner.model_rank

    def copy_to_ranks(self, shared: Tensor) -> Tensor:
        return self.inner.copy_to_ranks(shared)

    def all_reduce(self, partial: Tensor) -> Tensor:
        return self.inner.all_reduce(partial)

    def start_all_reduce(self, streams: Tensor) -> Any:
        return self.inner.start_all_reduce(streams)

    def wait(self, handle: Any) -> Tensor:
        return self.inner.wait(handle)

    def reduction_dtype(self, tensor: Tensor) -> torch.dtype:
        return self.inner.reduction_dtype(tensor)

    def maximum(self, values: Tensor) -> Tensor:
        return self.inner.maximum(values)

    def gather(self, part: Tensor) -> Tensor:
        return self.inner.gather(part)


class SwitchedCommunicator(ForwardingCommunicator):
    """One of several communicators, chosen by `use`, so that the variants share the weights of one model."""

    def __init__(self, variants: Mapping[str, Communicator]) -> None:
        super().__init__(next(iter(variants.values())))
        self.variants = variants

    def use(self, variant: str) -> None:
        self.inner = self.variants[variant]


class WithoutOverlap(ForwardingCommunicator):
    """A real communicator whose `start_all_reduce` waits for the sum."""

    def start_all_reduce(self, streams: Tensor) -> Tensor:
        return self.inner.wait(self.inner.start_all_reduce(streams))

    def wait(self, handle: Tensor) -> Tensor:
        return handle
