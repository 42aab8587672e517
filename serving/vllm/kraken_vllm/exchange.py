"""The sum over sub-layers, begun before the attention and awaited after it: two operators that torch.compile does not
look into.

On a GPU vLLM's all-reduce (one-shot, symmetric memory or NCCL, as it decides by size) runs on a stream of its own,
which is forked from the current one and joined with it by events. A CUDA graph may hold both or none: see `settings`.
Memory is safe without further synchronisation: `add_sum` takes `partial`, so that nobody reuses its memory before the
sum is there, and the sum's own memory, which belongs to the side stream, is reused by the next sum only, which waits
for all that the current stream did before.

On a CPU it is an asynchronous all-reduce of PyTorch's gloo group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from vllm.distributed import get_tp_group
from vllm.utils.torch_utils import direct_register_custom_op

HIGH_PRIORITY = -1  # its few blocks are placed before those of the products beside it

pending: list[Any] = []  # of gloo, at most one
side_streams: dict[torch.device, torch.cuda.Stream] = {}


def side_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in side_streams:
        side_streams[device] = torch.cuda.Stream(device, priority=HIGH_PRIORITY)
    return side_streams[device]


def start_sum(partial: Tensor) -> Tensor:
    """See `Backend.start_sum`."""
    group = get_tp_group()
    if partial.is_cuda:
        side = side_stream(partial.device)
        side.wait_stream(torch.cuda.current_stream(partial.device))
        with torch.cuda.stream(side):
            result: Tensor = group.device_communicator.all_reduce(partial)
            return result
    buffer = partial.clone()
    pending.append(dist.all_reduce(buffer, group=group.device_group, async_op=True))
    return buffer


def add_sum(partial: Tensor, started: Tensor, own: Tensor) -> Tensor:
    """See `Backend.add_sum`. A new tensor, since an operator's result may not be one of its arguments."""
    if started.is_cuda:
        torch.cuda.current_stream(started.device).wait_stream(side_stream(started.device))
    else:
        pending.pop().wait()
    return own + started


def like_first(partial: Tensor) -> Tensor:
    return torch.empty_like(partial)


def like_last(partial: Tensor, started: Tensor, own: Tensor) -> Tensor:
    return torch.empty_like(own)


direct_register_custom_op("kraken_start_sum", start_sum, fake_impl=like_first)
direct_register_custom_op("kraken_add_sum", add_sum, fake_impl=like_last)
