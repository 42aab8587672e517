"""In place of `cuda_calls`, for a CPU: functions of the same names, so that all other lines of the stages run there."""

from __future__ import annotations

import inspect
import platform
import time
from collections.abc import Callable

import torch
import torch.distributed as dist


def describe() -> dict[str, str]:
    return {"device": f"CPU ({platform.machine()})", "threads": str(torch.get_num_threads())}


def seconds(work: Callable[[], object], repeats: int) -> float:
    work()
    begin = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - begin) / repeats


def all_reduces(elements: int, group: dist.ProcessGroup) -> dict[str, Callable[[], object]]:
    """gloo under all names."""
    values = torch.zeros(elements, dtype=torch.bfloat16)
    return {name: lambda: dist.all_reduce(values, group=group) for name in ("NCCL", "one-shot", "two-shot", "multimem")}


def topology() -> str:
    return "not known: there are no GPUs"


def replaced() -> list[str]:
    """What has not run, since a function above has taken its place: FILE:LINE NAME, with the number of lines."""
    from kraken_train.bench.stages import cuda_calls  # noqa: PLC0415 (which a CPU otherwise does not import)

    found = []
    for name, function in inspect.getmembers(cuda_calls, inspect.isfunction):
        if function.__module__ == cuda_calls.__name__:
            lines, first = inspect.getsourcelines(function)
            found.append(f"{cuda_calls.__name__.replace('.', '/')}.py:{first} {name}, {len(lines)} lines")
    return found
