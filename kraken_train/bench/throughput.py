"""Compares the training speed of models: python -m kraken_train.bench.throughput

Each model takes real steps through the real engine, in turns with the others: tokens per second, the time of a step
by phase, model FLOPs utilisation and memory. Under torchrun or the deepspeed launcher the ranks share the models as in
training. With `engines=[deepspeed,torch]` the same steps are also taken in plain PyTorch, and the difference is what
DeepSpeed costs.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from kraken_train.bench.throughput_config import Entry, ThroughputConfig
from kraken_train.common.cli import run_entry
from kraken_train.common.errors import ConfigError
from kraken_train.common.files import replace_synced
from kraken_train.common.output import open_output
from kraken_train.common.settings import to_dict
from kraken_train.data.dataset import TrainingData
from kraken_train.model.flops import device_peak_flops, training_flops_per_token
from kraken_train.parallel.device import choose_device
from kraken_train.parallel.ranks import Runtime, read_runtime
from kraken_train.training.precision import choose_precision, has_native_bf16

if TYPE_CHECKING:
    from kraken_train.bench.throughput_results import Result

JSON_FILE, FIGURE_FILE = "throughput.json", "throughput.png"
LIKELY_MFU = 0.3
LONG = 20 * 60  # seconds; a longer run prints its expected time


def measure_throughput(config: ThroughputConfig) -> None:
    if choose_device(config.device).type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # which DeepSpeed reads when it is imported
    from kraken_train.training.engine import start_processes, stop_processes  # noqa: PLC0415

    runtime = read_runtime()
    data = TrainingData({Path(config.data_dir): 1}) if config.data_dir else None
    entries = config.entries(data.vocab_size if data else None)
    config.parallel.data_parallel_size(runtime.world_size)
    if config.authors and runtime.world_size > 1:
        raise ConfigError(f"authors: their step is measured on one rank, not on {runtime.world_size}; use authors=[]")
    open_output(Path(config.output_dir))
    start_processes(runtime)
    native_bf16 = runtime.all_true(has_native_bf16(runtime.device))
    config = replace(config, precision=choose_precision(config.precision, None, native_bf16).name)
    results = run(config, entries, runtime, data)
    if runtime.is_first:
        report(results, config, runtime)
    stop_processes(runtime)


def run(
    config: ThroughputConfig, entries: Sequence[Entry], runtime: Runtime, data: TrainingData | None = None
) -> list[Result]:
    """The figures of all entries, on all ranks. The ranks must have been started."""
    from kraken_train.bench.throughput_results import make_results  # noqa: PLC0415
    from kraken_train.bench.throughput_run import measure_all  # noqa: PLC0415

    peak = config.peak_tflops * 1e12 if config.peak_tflops else device_peak_flops(runtime.device, config.precision)
    peaks = runtime.gather(peak)
    peak_flops = None if None in peaks else sum(filter(None, peaks))
    batch = config.global_batch_size(config.parallel.data_parallel_size(runtime.world_size))
    tokens = {entry: batch * entry.model.context_length for entry in entries}
    if runtime.is_first and peak_flops is not None:
        warn_if_long(config, tokens, peak_flops)
    return make_results(measure_all(entries, config, runtime, data), tokens, runtime.world_size, peak_flops)


def warn_if_long(config: ThroughputConfig, tokens: dict[Entry, int], peak_flops: float) -> None:
    work = sum(training_flops_per_token(entry.model) * of for entry, of in tokens.items())
    seconds = work * config.rounds * (config.steps + 1) / (LIKELY_MFU * peak_flops)
    if seconds > LONG:
        print(
            f"this will take about {seconds / 3600:.1f} hours on this device; for less give models=[kraken-tiny-4way,"
            "gpt-tiny] or smaller values of micro_batch_size, gradient_accumulation_steps, steps and rounds",
            file=sys.stderr,
            flush=True,
        )


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, threads: {torch.get_num_threads()})"


def title_of(config: ThroughputConfig, runtime: Runtime) -> str:
    copies = config.parallel.data_parallel_size(runtime.world_size)
    ranks = "" if runtime.world_size == 1 else f"{runtime.world_size} x "
    return (
        f"Training on {ranks}{device_name(runtime.device)}: {config.precision}, {copies} x "
        f"{config.gradient_accumulation_steps} micro-batches of {config.micro_batch_size}"
        f"{', compiled' if config.engine.compiles(runtime.device.type) else ''}"
    )


def report(results: Sequence[Result], config: ThroughputConfig, runtime: Runtime) -> None:
    """The JSON file, the table and the figure."""
    from kraken_train.bench.throughput_figure import draw  # noqa: PLC0415
    from kraken_train.bench.throughput_results import as_table, engine_costs  # noqa: PLC0415

    folder, title = Path(config.output_dir), title_of(config, runtime)
    costs = engine_costs(results)
    record = {
        **describe(config, runtime, results),
        "results": [result.to_dict() for result in results],
        "deepspeed_over_torch": {name: vars(cost) for name, cost in costs.items()},
    }
    replace_synced(folder / JSON_FILE, json.dumps(record, indent=2, allow_nan=False) + "\n")
    Console(width=None if Console().is_terminal else 190).print(as_table(results, title))
    for name, cost in costs.items():
        print(f"{name}: a step with DeepSpeed takes {cost} times that in plain PyTorch")
    draw(results, title, folder / FIGURE_FILE)


def describe(config: ThroughputConfig, runtime: Runtime, results: Sequence[Result]) -> dict[str, Any]:
    """What the figures hold for."""
    import deepspeed  # noqa: PLC0415

    return {
        "device": device_name(runtime.device),
        "ranks": runtime.world_size,
        "data_parallel_size": config.parallel.data_parallel_size(runtime.world_size),
        "peak_tflops": None if results[0].peak_flops is None else results[0].peak_flops / 1e12,
        "settings": to_dict(config),
        "versions": {
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
        },
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def main() -> None:
    run_entry(measure_throughput, ThroughputConfig, "throughput")


if __name__ == "__main__":
    main()
