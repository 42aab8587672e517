"""The simulated link of a GPU: a kernel that occupies a few multiprocessors for a given time.

A real collective is a kernel too, of 512 threads on each of some multiprocessors. It is captured in CUDA graphs like
any other. The clock is %globaltimer, which advances in steps of 32 ns on an H100 and of 1 us on some older GPUs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kraken_train.bench.link import ALL_GATHER, ALL_REDUCE, Wait

NUM_WARPS = 16  # 512 threads, as NCCL's kernels have


@triton.jit
def spin(nanoseconds):  # type: ignore[no-untyped-def]
    start = tl.extra.cuda.globaltimer()
    while tl.extra.cuda.globaltimer() - start < nanoseconds:
        pass


# Two names, so that profiles distinguish them. Unspecialized, so that nothing is compiled during a capture.


@triton.jit(do_not_specialize=["nanoseconds"])
def all_reduce_spin(nanoseconds):  # type: ignore[no-untyped-def]
    spin(nanoseconds)


@triton.jit(do_not_specialize=["nanoseconds"])
def all_gather_spin(nanoseconds):  # type: ignore[no-untyped-def]
    spin(nanoseconds)


KERNELS = {ALL_REDUCE: all_reduce_spin, ALL_GATHER: all_gather_spin}


class SpinLink:
    """Asynchronous transfers run on a stream of high priority, the others on the stream of the computation.

    The streams of NCCL are of high priority too (`kraken_train.parallel.rendezvous.connect_ranks`).
    """

    def __init__(self, device: torch.device, blocks: int) -> None:
        self.blocks = blocks
        self.stream = torch.cuda.Stream(device, priority=-1)  # before the computation's, which is 0
        self.launch_seconds = 0.0
        for collective in KERNELS:
            self.spin(collective, 1e-6)  # compiles
        # The interconnect's latency is that of a launched collective, so a launch is part of it.
        self.launch_seconds = self.measure_launch()

    def begin(self, collective: str, seconds: float) -> Wait:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.spin(collective, seconds)
        return self.wait

    def wait(self) -> None:
        torch.cuda.current_stream().wait_stream(self.stream)

    def transfer(self, collective: str, seconds: float) -> None:
        self.spin(collective, seconds)

    def spin(self, collective: str, seconds: float) -> None:
        nanoseconds = max(0, round((seconds - self.launch_seconds) * 1e9))
        KERNELS[collective][(self.blocks,)](nanoseconds, num_warps=NUM_WARPS)

    def measure_launch(self, seconds: float = 50e-6, count: int = 50) -> float:
        """Seconds by which a spin in a CUDA graph takes longer than requested."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(count):
                self.spin(ALL_REDUCE, seconds)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        taken: list[float] = []
        for _ in range(5):
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end) / 1e3)
        return max(0.0, min(taken) / count - seconds)
