"""The calls of CUDA that only the stages make. A CPU cannot run them: `cpu_calls` has others of the same names there.

Nothing else in the stages differs between a GPU and a CPU, so this file is all that runs for the first time on a GPU.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem


def describe() -> dict[str, str]:
    """What the GPU and its libraries are."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "multiprocessors": str(properties.multi_processor_count),
        "memory": f"{properties.total_memory / 2**30:.1f} GiB",
        "capability": f"{properties.major}.{properties.minor}",
        "devices": str(torch.cuda.device_count()),
        "CUDA": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
    }


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Of one call of `work`, by the device's clock, over `repeats` calls after one that does not count."""
    work()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeats):
        work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / repeats


def all_reduces(elements: int, group: dist.ProcessGroup) -> dict[str, Callable[[], object]]:
    """By algorithm: what sums a bf16 tensor of so many elements over all ranks."""
    plain = torch.zeros(elements, dtype=torch.bfloat16, device="cuda")
    shared = symm_mem.empty(elements, dtype=torch.bfloat16, device=plain.device).zero_()
    name, ops = group.group_name, torch.ops.symm_mem
    handle = symm_mem.rendezvous(shared, name)
    found: dict[str, Callable[[], object]] = {
        "NCCL": lambda: dist.all_reduce(plain, group=group),
        "one-shot": lambda: ops.one_shot_all_reduce(shared, "sum", name),
        "two-shot": lambda: ops.two_shot_all_reduce_(shared, "sum", name),
    }
    if handle.multicast_ptr != 0:  # NVSwitches that sum
        found["multimem"] = lambda: ops.multimem_all_reduce_(shared, "sum", name)
    return found


def topology() -> str:
    """Which links connect the GPUs."""
    if shutil.which("nvidia-smi") is None:
        return "not known: there is no nvidia-smi"
    command = ["nvidia-smi", "topo", "-m"]
    shown = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    return shown.stdout or shown.stderr
