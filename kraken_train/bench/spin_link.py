"""The simulated link of a GPU: a kernel that occupies a few multiprocessors, and memory, for a given time.

A real collective is a kernel too, of 512 threads on each of some multiprocessors. Its shared memory leaves no room for
products of matrices beside it, and it reads what it sends and writes what it receives. It is captured in CUDA graphs
like any other. The clock is %globaltimer, which advances in steps of 32 ns on an H100 and of 1 us on some older GPUs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kraken_train.bench.link import ALL_GATHER, ALL_REDUCE, Wait

NUM_WARPS = 16  # 512 threads, as NCCL's kernels have
AT_ONCE = 4096  # values of 4 bytes that a block moves at a time
SCRATCH = 2**24  # values of 4 bytes; longer transfers move the same ones again
LEAST_RESERVED = 100 * 1024  # bytes of shared memory; products of matrices take more than what remains


@triton.jit
def spin(source, target, values, nanoseconds, AT_ONCE: tl.constexpr, SCRATCH: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Copy `values` evenly over the time, and wait for its end."""
    start = tl.extra.cuda.globaltimer()
    blocks = tl.num_programs(0)
    rounds = tl.cdiv(values, blocks * AT_ONCE)
    for number in range(rounds):
        places = (number * blocks + tl.program_id(0)) * AT_ONCE + tl.arange(0, AT_ONCE)
        wrapped = places % SCRATCH
        moved = tl.load(source + wrapped, mask=places < values, other=0)
        tl.store(target + wrapped, moved, mask=places < values)
        due = (nanoseconds.to(tl.int64) * (number + 1)) // rounds
        while tl.extra.cuda.globaltimer() - start < due:
            pass
    while tl.extra.cuda.globaltimer() - start < nanoseconds:
        pass


# Two names, so that profiles distinguish them. Unspecialized, so that nothing is compiled during a capture.


@triton.jit(do_not_specialize=["values", "nanoseconds"])
def all_reduce_spin(source, target, values, nanoseconds, AT_ONCE: tl.constexpr, SCRATCH: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    spin(source, target, values, nanoseconds, AT_ONCE, SCRATCH)


@triton.jit(do_not_specialize=["values", "nanoseconds"])
def all_gather_spin(source, target, values, nanoseconds, AT_ONCE: tl.constexpr, SCRATCH: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    spin(source, target, values, nanoseconds, AT_ONCE, SCRATCH)


KERNELS = {ALL_REDUCE: all_reduce_spin, ALL_GATHER: all_gather_spin}


class SpinLink:
    """Asynchronous transfers run on a stream of high priority, the others on the stream of the computation.

    The streams of NCCL are of high priority too (`kraken_train.parallel.rendezvous.connect_ranks`).
    """

    def __init__(self, device: torch.device, blocks: int) -> None:
        self.blocks = blocks
        self.stream = torch.cuda.Stream(device, priority=-1)  # before the computation's, which is 0
        self.memory = [torch.zeros(SCRATCH, dtype=torch.int32, device=device) for _ in range(2)]
        reserved = reserved_bytes(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)
        self.kernels = {
            name: with_shared_memory(
                kernel.warmup(*self.memory, 0, 0, AT_ONCE, SCRATCH, grid=(blocks,), num_warps=NUM_WARPS), reserved
            )
            for name, kernel in KERNELS.items()
        }
        self.launch_seconds = 0.0
        for collective in KERNELS:
            self.spin(collective, 1e-6, 0)  # loads the kernel
        # The interconnect's latency is that of a launched collective, so a launch is part of it.
        self.launch_seconds = self.measure_launch()

    def begin(self, collective: str, seconds: float, moved: float) -> Wait:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.spin(collective, seconds, moved)
        return self.wait

    def wait(self) -> None:
        torch.cuda.current_stream().wait_stream(self.stream)

    def transfer(self, collective: str, seconds: float, moved: float) -> None:
        self.spin(collective, seconds, moved)

    def spin(self, collective: str, seconds: float, moved: float) -> None:
        nanoseconds = max(0, round((seconds - self.launch_seconds) * 1e9))
        kernel = self.kernels[collective]
        kernel[self.blocks, 1, 1](*self.memory, round(moved / 4), nanoseconds, AT_ONCE, SCRATCH)

    def measure_launch(self, seconds: float = 50e-6, count: int = 50) -> float:
        """Seconds by which a spin in a CUDA graph takes longer than requested."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(count):
                self.spin(ALL_REDUCE, seconds, 0)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        taken: list[float] = []
        for _ in range(5):
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end) / 1e3)
        return max(0.0, min(taken) / count - seconds)


def reserved_bytes(available: int) -> int:
    """Shared memory that a block reserves, of what one can have at most: more than half, so that no two meet."""
    return min(available, max(LEAST_RESERVED, available // 2 + 1024))


def with_shared_memory(kernel: Any, size: int) -> Any:
    """A compiled Triton kernel, not loaded yet, that is launched with `size` bytes of shared memory.

    Triton has no setting for it: it counts what a kernel uses. Loading and launching read these two attributes.
    """
    if kernel.metadata.shared < size:
        warps, ctas, _, *others = kernel.packed_metadata
        kernel.metadata = kernel.metadata._replace(shared=size)
        kernel.packed_metadata = (warps, ctas, size, *others)
    return kernel
