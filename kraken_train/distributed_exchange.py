"""The exchange over the ranks of a model copy, with the AllReduce hidden in the forward and in the backward pass.

`start` and `finish` are a pair of autograd functions. The forward of `start` begins an asynchronous all-reduce and the
forward of `finish` waits for it; the backward of `finish` begins the all-reduce of the gradient and the backward of
`start` waits for it. The model calls `start` before the attention and `finish` after it, and autograd runs backward in
the reverse order, so both ways the sum is under way while the attention computes.

A Kraken of L layers takes 2 L all-reduces per micro-batch: forward L - 1 sums and the conjunction, backward L - 1 sums
and the embedding's gradient. A vocabulary that is cut adds the sums of the embedding and of the head's gradient, and
gathers two numbers per token and rank for the loss.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kraken_train.config import ParallelConfig
from kraken_train.exchange import Exchange, LocalExchange
from kraken_train.mesh import ParallelMesh
from kraken_train.phases import EXCHANGE, Phases
from kraken_train.placement import ModelRank
from kraken_train.precision import DTYPES

# Newer PyTorch has another name for it, which older ones lack.
warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)


@dataclass
class Pending:
    """A sum under way; `work` is the collective of the forward pass, later that of the backward pass."""

    streams_dtype: torch.dtype
    work: Any = None
    buffer: Tensor | None = None  # becomes the sum


class DistributedExchange:
    """Sums over the ranks of `group`, in `dtype` or the tensors' own where that is wider or `dtype` is None.

    `all_reduce` stands for `torch.distributed.all_reduce`; tests pass slower ones. `phases` learn how long is waited.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        dtype: torch.dtype | None = None,
        all_reduce: Callable[..., Any] | None = None,
        phases: Phases | None = None,
    ) -> None:
        self.group = group
        self.dtype = dtype
        self.all_reduce = all_reduce or dist.all_reduce
        self.phases = phases or Phases(torch.device("cpu"))

    @property
    def model_rank(self) -> ModelRank:
        return ModelRank(self.group.rank(), self.group.size())

    def broadcast(self, shared: Tensor) -> Tensor:
        return Broadcast.apply(shared, self)

    def reduce(self, partial: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return Reduce.apply(partial, self)
        if not partial.is_contiguous() or partial.dtype != self.reduction_dtype(partial):
            return self.sum(partial)
        self.all_reduce(partial, group=self.group)  # on the stream of the computation, which waits for it anyway
        return partial

    def start(self, streams: Tensor) -> Pending:
        pending = Pending(streams.dtype)
        pending.buffer = Start.apply(streams, self, pending)
        return pending

    def finish(self, handle: Pending) -> Tensor:
        buffer, handle.buffer = handle.buffer, None
        return Finish.apply(buffer, self, handle)

    def maximum(self, values: Tensor) -> Tensor:
        largest = values.detach().clone()
        self.wait(self.begin(largest, dist.ReduceOp.MAX))
        return largest

    def gather(self, part: Tensor) -> Tensor:
        part = part.detach().contiguous()
        parts = part.new_empty(self.group.size() * part.shape[0], *part.shape[1:])
        with self.phases.phase(EXCHANGE):
            dist.all_gather_into_tensor(parts, part, group=self.group)
        return parts.unflatten(0, (self.group.size(), -1)).movedim(0, -2).flatten(-2)

    def begin(self, buffer: Tensor, op: Any = dist.ReduceOp.SUM) -> Any:
        """Begin to replace `buffer` by its sum over the ranks; it is there after `wait()` of what this returns."""
        return self.all_reduce(buffer, op=op, group=self.group, async_op=True)

    def wait(self, work: Any) -> None:
        with self.phases.phase(EXCHANGE):
            work.wait()

    def sum(self, part: Tensor) -> Tensor:
        buffer = self.own_copy(part)
        self.wait(self.begin(buffer))
        return buffer.to(part.dtype)

    def own_copy(self, tensor: Tensor) -> Tensor:
        """`tensor` as a buffer that the collective may overwrite."""
        dtype = self.reduction_dtype(tensor)
        return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format).copy_(tensor)

    def reduction_dtype(self, tensor: Tensor) -> torch.dtype:
        return tensor.dtype if self.dtype is None else torch.promote_types(tensor.dtype, self.dtype)


def make_exchange(parallel: ParallelConfig, mesh: ParallelMesh, phases: Phases | None = None) -> Exchange:
    """What connects this rank with the others of its model copy."""
    if mesh.model_rank.size == 1:
        return LocalExchange()
    dtype = None if parallel.reduce_dtype is None else DTYPES[parallel.reduce_dtype]
    return DistributedExchange(mesh.get_model_parallel_group(), dtype, phases=phases)


class Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams: Tensor, exchange: DistributedExchange, pending: Pending) -> Tensor:
        ctx.num_stacked, ctx.exchange, ctx.pending = streams.shape[0], exchange, pending
        buffer = streams.sum(dim=0, dtype=exchange.reduction_dtype(streams))
        pending.work = exchange.begin(buffer)
        return buffer  # not the sum yet: only `Finish` may look at it

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.exchange.wait(ctx.pending.work)  # now `gradient`, the buffer that `Finish.backward` returned, is the sum
        ctx.pending.work = None
        return gradient.to(ctx.pending.streams_dtype).expand(ctx.num_stacked, *gradient.shape), None, None


class Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, buffer: Tensor, exchange: DistributedExchange, pending: Pending) -> Tensor:
        ctx.exchange, ctx.pending = exchange, pending
        exchange.wait(pending.work)
        pending.work = None
        return buffer.to(pending.streams_dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        buffer = ctx.exchange.own_copy(gradient)
        ctx.pending.work = ctx.exchange.begin(buffer)
        return buffer, None, None


class Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shared: Tensor, exchange: DistributedExchange) -> Tensor:
        ctx.exchange = exchange
        return shared.view_as(shared)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.sum(gradient), None


class Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, exchange: DistributedExchange) -> Tensor:
        return exchange.sum(partial)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
