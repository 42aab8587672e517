"""Small sums among the GPUs of one machine without NCCL: over memory that every GPU can read.

NCCL's all-reduce takes about 12 us for a few bytes on H100, half of which is its protocol. Over PyTorch's symmetric
memory (`torch.distributed._symmetric_memory`) a sum is one kernel, chosen by its size:

| size                         | algorithm | what a GPU does                                                          |
|------------------------------|-----------|--------------------------------------------------------------------------|
| up to `ONE_SHOT_BYTES`       | one-shot  | reads the values of all others, and sums them in the order of the ranks  |
| up to `MULTIMEM_BYTES`       | multimem  | lets NVSwitch sum a part, and send it to all (needs an H100 or later)    |
| above, other types, maximum  | library   | NCCL's all-reduce, or gloo's                                             |

All ranks get the same bits with each of them. `SymmetricExchange` takes the place of `torch.distributed.all_reduce` in
a `DistributedCommunicator`; it serves inference of every architecture. Only `SymmetricBuffer` and `SideStream` need a
GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from kraken_train.parallel.distributed import DistributedCommunicator

KIB, MIB = 2**10, 2**20
ONE_SHOT, MULTIMEM, LIBRARY = "one-shot", "multimem", "library"
# By the number of ranks, up to which each entry holds: one reads the values of all others, so it is for fewer bytes
# with more of them. vLLM has the same bounds for its own kernels before Hopper's.
ONE_SHOT_BYTES = {4: 512 * KIB, 8: 256 * KIB}
MULTIMEM_BYTES = 32 * MIB  # NCCL is as fast above
TYPES = (torch.float32, torch.bfloat16)  # that the kernels sum


@dataclass(frozen=True)
class Links:
    """What connects the GPUs of a model copy."""

    ranks: int
    multicast: bool  # whether NVSwitch sums what they hold


def algorithm_for(values: Tensor, links: Links) -> str:
    """Of the sum of `values` over the ranks."""
    if values.dtype not in TYPES or values.nbytes % 4 or not values.nbytes or not values.is_contiguous():
        return LIBRARY
    for ranks, limit in ONE_SHOT_BYTES.items():
        if links.ranks <= ranks and values.nbytes <= limit:
            return ONE_SHOT
    return MULTIMEM if links.multicast and values.nbytes <= MULTIMEM_BYTES else LIBRARY


class Buffer(Protocol):
    """Memory that all ranks see."""

    def sum(self, values: Tensor, algorithm: str) -> None:
        """Sum `values` over the ranks, in place, on the current stream."""
        ...


class Work(Protocol):
    def wait(self) -> Any: ...


class Lane(Protocol):
    """Where sums run during the computation."""

    def begin(self, work: Callable[[], None]) -> Work: ...


class SymmetricBuffer:
    """Up to `size` bytes on each GPU of `group`. All ranks create and use their buffers in the same order."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, size: int) -> None:
        from torch.distributed import _symmetric_memory as symmetric_memory  # noqa: PLC0415 (which GPUs alone need)

        self.group_name = group.group_name
        self.memory = symmetric_memory.empty(size, dtype=torch.uint8, device=device)
        self.handle = symmetric_memory.rendezvous(self.memory, self.group_name)

    def sum(self, values: Tensor, algorithm: str) -> None:
        shared, flat = self.memory[: values.nbytes].view(values.dtype), values.view(-1)
        shared.copy_(flat)
        # Both wait at their beginning until all ranks have copied, and at their end until all have read.
        if algorithm == ONE_SHOT:
            torch.ops.symm_mem.one_shot_all_reduce_out(shared, "sum", self.group_name, flat)
        else:
            torch.ops.symm_mem.multimem_all_reduce_(shared, "sum", self.group_name)
            flat.copy_(shared)


class SideStream:
    """A stream of high priority beside that of the computation, as NCCL's is."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device, priority=-1)

    def begin(self, work: Callable[[], None]) -> Work:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            work()
            return StreamWork(self.stream.record_event())


@dataclass(frozen=True)
class StreamWork:
    done: torch.cuda.Event

    def wait(self) -> None:
        """Let the current stream wait; the CPU does not."""
        torch.cuda.current_stream().wait_event(self.done)


class SymmetricExchange:
    """An all-reduce in place, called as `torch.distributed.all_reduce` is, that chooses the algorithm by size.

    `waited` serves sums that the computation waits for, on its own stream, and `overlapped` those in `lane`: a buffer
    holds one sum at a time. `library` is the all-reduce for all else.
    """

    def __init__(
        self,
        links: Links,
        waited: Buffer,
        overlapped: Buffer,
        lane: Lane,
        library: Callable[..., Any] = dist.all_reduce,
    ) -> None:
        self.links = links
        self.waited = waited
        self.overlapped = overlapped
        self.lane = lane
        self.library = library

    def __call__(self, values: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        algorithm = algorithm_for(values, self.links) if op == dist.ReduceOp.SUM else LIBRARY
        if algorithm == LIBRARY:
            return self.library(values, op=op, group=group, async_op=async_op)
        if async_op:
            return self.lane.begin(lambda: self.overlapped.sum(values, algorithm))
        self.waited.sum(values, algorithm)
        return None


class SymmetricCommunicator(DistributedCommunicator):
    """For inference over `exchange`; gathers by it too where that is one-shot."""

    def __init__(self, group: dist.ProcessGroup, exchange: SymmetricExchange) -> None:
        super().__init__(group, collective=exchange)
        self.exchange = exchange

    def gather(self, part: Tensor) -> Tensor:
        """As a sum of what each rank has beside zeros, which changes no value but -0."""
        place = self.model_rank
        parts = part.new_zeros(*part.shape[:-1], place.size, part.shape[-1])
        if algorithm_for(parts, self.exchange.links) != ONE_SHOT:
            return super().gather(part)
        parts[..., place.rank, :] = part
        self.exchange(parts, group=self.group)
        return parts.flatten(-2)


def open_exchange(group: dist.ProcessGroup, device: torch.device, links: Links) -> SymmetricExchange:
    """On all ranks of `group` at once, whose `GPU.links` said that they can."""
    size = MULTIMEM_BYTES if links.multicast else max(ONE_SHOT_BYTES.values())
    waited, overlapped = (SymmetricBuffer(group, device, size) for _ in range(2))
    return SymmetricExchange(links, waited, overlapped, SideStream(device))


@dataclass(frozen=True)
class GPU:
    """What a rank tells the others of its GPU."""

    host: str
    index: int
    capability: int  # the major number
    multicast: bool
    reads: tuple[int, ...]  # indices of the GPUs whose memory it can read

    @classmethod
    def of(cls, host: str, device: torch.device) -> GPU:
        from torch._C._autograd import DeviceType  # noqa: PLC0415
        from torch._C._distributed_c10d import _SymmetricMemory  # noqa: PLC0415 (which GPUs alone need)

        index = torch.cuda.current_device() if device.index is None else device.index
        others = [other for other in range(torch.cuda.device_count()) if other != index]
        return cls(
            host,
            index,
            torch.cuda.get_device_capability(index)[0],
            _SymmetricMemory.has_multicast_support(DeviceType.CUDA, index),
            tuple(other for other in others if torch.cuda.can_device_access_peer(index, other)),
        )


def links_of(gpus: list[GPU | None]) -> Links | None:
    """What connects the GPUs of all ranks; None where these cannot read each other's memory.

    They must be different GPUs of one host, and each rank must see those of the others.
    """
    known = [gpu for gpu in gpus if gpu is not None]
    indices = {gpu.index for gpu in known}
    if len(known) < len(gpus) or len({gpu.host for gpu in known}) > 1 or len(indices) < len(gpus):
        return None
    if any(gpu.capability < 8 or indices - {gpu.index} - set(gpu.reads) for gpu in known):
        return None
    if not 1 < len(gpus) <= max(ONE_SHOT_BYTES):
        return None
    return Links(len(gpus), all(gpu.multicast and gpu.capability >= 9 for gpu in known))
