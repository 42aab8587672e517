"""A function on the GPU as a CUDA graph: its kernels are captured once and then launched by a single call.

Small kernels take less time on the GPU than their launches on the CPU. A graph also contains kernels on other streams,
such as collectives, if these streams fork from and join the captured one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARM_UP_RUNS = 3  # compilation, libraries' workspaces and NCCL's connections cannot be captured


class CapturedFunction:
    """`function` of tensors with the shapes of `inputs`, captured with the memory that it writes to.

    `inputs` become the memory that each call copies its arguments into. Before each warm-up run, which is a real one,
    `before` is called. Graphs that share a `pool` share memory for intermediate results, so they must not run at the
    same time. All ranks of a model copy capture the same functions in the same order.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        inputs: tuple[Tensor, ...],
        pool: Any,
        before: Callable[[], Any] | None = None,
    ) -> None:
        self.inputs = inputs
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                if before is not None:
                    before()
                function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog thread queries events meanwhile, which raises an error in a stricter mode.
        with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.output = function(*inputs)

    def __call__(self, *arguments: Tensor) -> Tensor:
        for own, given in zip(self.inputs, arguments, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.output.clone()  # the next call writes to the same memory again
