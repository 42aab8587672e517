"""The time of an all-reduce by its size, of each algorithm that there is, and the links between the devices."""

from __future__ import annotations

from types import ModuleType

import torch
import torch.distributed as dist

from kraken_train.bench.stages.preset import CurveSizes
from kraken_train.bench.stages.program import Measured
from kraken_train.bench.stages.stage import Figures
from kraken_train.inference.ranks import started_ranks

NCCL = "NCCL"


def measure(sizes: CurveSizes, calls: ModuleType) -> Measured:
    with started_ranks() as runtime:
        group = dist.group.WORLD
        if group is None:
            raise RuntimeError("an all-reduce takes several ranks; start this program under torchrun")
        curve: dict[str, dict[int, float]] = {}
        for size in sizes.bytes:
            for name, work in calls.all_reduces(size // torch.bfloat16.itemsize, group).items():
                slowest = max(runtime.gather(calls.seconds(work, sizes.repeats)))
                curve.setdefault(name, {})[size] = slowest
        ranks = runtime.world_size
        del group
    small, large = min(sizes.bytes), max(sizes.bytes)
    traffic = 2 * (ranks - 1) / ranks  # bytes that a rank moves for a byte of the tensor (nccl-tests, PERFORMANCE.md)
    figures: Figures = {f"{name}, {small // 1024} KiB, us": of[small] * 1e6 for name, of in curve.items()}
    figures[f"{NCCL}, bus bandwidth, GB/s"] = traffic * large / curve[NCCL][large] / 1e9
    best = {size: min(curve, key=lambda name, size=size: curve[name][size]) for size in sizes.bytes}  # type: ignore[misc]
    figures |= {f"fastest at {size // 1024} KiB": name for size, name in best.items()}
    return Measured(figures, {"seconds": curve, "ranks": ranks, "topology": calls.topology()})
