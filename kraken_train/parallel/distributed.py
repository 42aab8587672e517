"""The communicator over the ranks of a model copy: it overlaps the AllReduce with the attention, forward and backward.

`start_all_reduce` and `wait` are a pair of autograd functions. The forward pass of `start_all_reduce` launches an
asynchronous all-reduce, and that of `wait` waits for it. The backward pass of `wait` launches the all-reduce of the
gradient, and that of `start_all_reduce` waits for it. The model calls `start_all_reduce` before the attention and
`wait` after it. Autograd runs the backward pass in the reverse order, so the sum overlaps with the attention in both
passes.

A Kraken of L layers takes 2 L all-reduces per micro-batch: forward L - 1 sums and the conjunction, backward L - 1 sums
and the embedding's gradient. A sharded vocabulary adds the sums of the embedding and of the head's gradient, and
gathers two numbers per token and rank for the loss.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from kraken_train.parallel.communicator import Communicator, LocalCommunicator
from kraken_train.parallel.mesh import ParallelMesh
from kraken_train.parallel.overlap_budget import Carveout
from kraken_train.parallel.sharding import ModelRank
from kraken_train.parallel.step_timer import EXCHANGE, StepTimer

# Newer PyTorch has another name for it, which older ones lack.
warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)


@dataclass
class Pending:
    """A sum under way; `work` is the collective of the forward pass, later that of the backward pass."""

    streams_dtype: torch.dtype
    work: Any = None
    buffer: Tensor | None = None  # becomes the sum


class DistributedCommunicator:
    """Sums over the ranks of `group`, in `dtype` or the tensors' own where that is wider or `dtype` is None.

    `collective` replaces `torch.distributed.all_reduce`, for tests. `timer` measures the time of waiting. While a sum
    of `start_all_reduce` is under way, GEMMs leave `sm_carveout` multiprocessors of the GPU to it.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        dtype: torch.dtype | None = None,
        collective: Callable[..., Any] | None = None,
        timer: StepTimer | None = None,
        sm_carveout: int = 0,
    ) -> None:
        self.group = group
        self.dtype = dtype
        self.collective = collective or dist.all_reduce
        self.timer = timer or StepTimer(torch.device("cpu"))
        self.carveout = Carveout(sm_carveout)

    @property
    def model_rank(self) -> ModelRank:
        return ModelRank(self.group.rank(), self.group.size())

    def copy_to_ranks(self, shared: Tensor) -> Tensor:
        return apply(CopyToRanks, shared, self)

    def all_reduce(self, partial: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return apply(AllReduce, partial, self)
        if not partial.is_contiguous() or partial.dtype != self.reduction_dtype(partial):
            return self.sum(partial)
        self.collective(partial, group=self.group)  # on the stream of the computation, which waits for it anyway
        return partial

    def start_all_reduce(self, streams: Tensor) -> Pending:
        pending = Pending(streams.dtype)
        pending.buffer = apply(StartAllReduce, streams, self, pending)
        return pending

    def wait(self, handle: Pending) -> Tensor:
        buffer, handle.buffer = handle.buffer, None
        return apply(WaitAllReduce, buffer, self, handle)

    def maximum(self, values: Tensor) -> Tensor:
        largest = values.detach().clone()
        self.wait_for(self.launch(largest, dist.ReduceOp.MAX))
        return largest

    def gather(self, part: Tensor) -> Tensor:
        part = part.detach().contiguous()
        parts = part.new_empty(self.group.size() * part.shape[0], *part.shape[1:])
        with self.timer.phase(EXCHANGE):
            dist.all_gather_into_tensor(parts, part, group=self.group)
        return cast(Tensor, parts.unflatten(0, (self.group.size(), -1)).movedim(0, -2).flatten(-2))

    def launch(self, buffer: Tensor, op: Any = dist.ReduceOp.SUM) -> Any:
        """Launch the all-reduce of `buffer` in place; `wait_for` the returned work before using the buffer."""
        return self.collective(buffer, op=op, group=self.group, async_op=True)

    def launch_beside(self, buffer: Tensor) -> Any:
        """The same for a sum that other computations hide, until `wait_for_hidden`."""
        work = self.launch(buffer)
        self.carveout.begin()
        return work

    def wait_for(self, work: Any) -> None:
        with self.timer.phase(EXCHANGE):
            work.wait()

    def wait_for_hidden(self, work: Any) -> None:
        self.carveout.end()
        self.wait_for(work)

    def sum(self, part: Tensor) -> Tensor:
        buffer = self.own_copy(part)
        self.wait_for(self.launch(buffer))
        return buffer.to(part.dtype)

    def own_copy(self, tensor: Tensor) -> Tensor:
        """`tensor` as a buffer that the collective may overwrite."""
        dtype = self.reduction_dtype(tensor)
        return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format).copy_(tensor)

    def reduction_dtype(self, tensor: Tensor) -> torch.dtype:
        return tensor.dtype if self.dtype is None else torch.promote_types(tensor.dtype, self.dtype)


def make_communicator(
    mesh: ParallelMesh, reduce_dtype: torch.dtype | None, timer: StepTimer | None = None
) -> Communicator:
    """The communicator of this rank's model copy.

    Sums are computed in `reduce_dtype` where it has more bits than the values; None: in the values' own format.
    """
    if mesh.model_rank.size == 1:
        return LocalCommunicator()
    group, carveout = mesh.get_model_parallel_group(), mesh.budget.sm_carveout
    return DistributedCommunicator(group, reduce_dtype, timer=timer, sm_carveout=carveout)


def apply(function: Any, *arguments: Any) -> Tensor:
    """`function.apply`, to which PyTorch gives no types."""
    return cast(Tensor, function.apply(*arguments))


class StartAllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams: Tensor, communicator: DistributedCommunicator, pending: Pending) -> Tensor:
        ctx.num_stacked, ctx.communicator, ctx.pending = streams.shape[0], communicator, pending
        buffer = streams.sum(dim=0, dtype=communicator.reduction_dtype(streams))
        pending.work = communicator.launch_beside(buffer)
        return buffer  # not the sum yet: only `WaitAllReduce` may read it

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        # Now `gradient`, the buffer that `WaitAllReduce.backward` returned, becomes the sum.
        ctx.communicator.wait_for_hidden(ctx.pending.work)
        ctx.pending.work = None
        return gradient.to(ctx.pending.streams_dtype).expand(ctx.num_stacked, *gradient.shape), None, None


class WaitAllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, buffer: Tensor, communicator: DistributedCommunicator, pending: Pending) -> Tensor:
        ctx.communicator, ctx.pending = communicator, pending
        communicator.wait_for_hidden(pending.work)
        pending.work = None
        return buffer.to(pending.streams_dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        buffer = ctx.communicator.own_copy(gradient)
        ctx.pending.work = ctx.communicator.launch_beside(buffer)
        return buffer, None, None


class CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shared: Tensor, communicator: DistributedCommunicator) -> Tensor:
        ctx.communicator = communicator
        return shared.view_as(shared)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.communicator.sum(gradient), None


class AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, communicator: DistributedCommunicator) -> Tensor:
        return communicator.sum(partial)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
