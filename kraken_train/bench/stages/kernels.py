"""The kernels of one training step, by the time that they take, and the fused ones beside what compilation makes."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Sequence
from types import ModuleType

from kraken_train.bench.breakdown import ATTENTION, GEMM, HEAD, IDLE, NORM, OTHER, Interval, break_down, record
from kraken_train.bench.kernels import Comparison, compare_kernels
from kraken_train.bench.stages.preset import StepSizes
from kraken_train.bench.stages.program import Measured
from kraken_train.bench.throughput_config import ThroughputConfig
from kraken_train.bench.throughput_run import ModelInTraining, make_mesh, make_samples, one_compilation_each
from kraken_train.common.cli import compose_command
from kraken_train.parallel.ranks import read_runtime
from kraken_train.training.engine import start_processes, stop_processes

SHOWN = 40  # kernels


def measure(sizes: StepSizes, calls: ModuleType) -> Measured:
    config = compose_command(sizes.settings, ThroughputConfig, "throughput")
    runtime = read_runtime()
    start_processes(runtime)
    (entry,) = config.entries()
    with one_compilation_each(1):
        samples = make_samples(entry.model, None)
        model = ModelInTraining(entry, config, samples, make_mesh(config.parallel, runtime), runtime)
        for _ in range(sizes.steps):
            model.step()
        intervals = record(model.step, runtime.device)
        model.close()
    compared: list[Comparison] = []
    if importlib.util.find_spec("triton") is not None:
        compared = compare_kernels(entry.model, config.micro_batch_size, runtime.device)
    stop_processes(runtime)
    parts = break_down(intervals)
    parts[GEMM] += parts.pop(HEAD)  # the last product of a prefill, which a step of training does not set apart
    figures = {f"{part}, ms": parts[part] * 1e3 for part in (GEMM, ATTENTION, NORM, OTHER, IDLE)}
    figures["whole step, ms"] = (max(i.end for i in intervals) - min(i.start for i in intervals)) * 1e3
    figures |= {f"{of.name}: times as fast as compiled": of.twin_seconds / of.seconds for of in compared}
    fused = [of.as_dict() for of in compared]
    return Measured(figures, {"model": str(entry), "kernels": kernel_table(intervals), "fused kernels": fused})


def kernel_table(intervals: Sequence[Interval]) -> list[dict[str, str | float]]:
    """The names that take longest: calls and milliseconds of all of them."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for interval in intervals:
        seconds[interval.name].append(interval.end - interval.start)
    order = sorted(seconds, key=lambda name: -sum(seconds[name]))
    return [{"name": name, "calls": len(seconds[name]), "ms": sum(seconds[name]) * 1e3} for name in order[:SHOWN]]
