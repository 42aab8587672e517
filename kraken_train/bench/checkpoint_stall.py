"""How long training stands still for a checkpoint: python -m kraken_train.bench.checkpoint_stall model=NAME

A model in training is saved as `kraken_train.train` saves it, by the same writer, in rounds that each hold a save with
`checkpoint.asynchronous=false` and one with `true`, in changing order. The stall is the time from the
end of a step until the next one may begin. The steps after each save are timed too, since a write in the background
takes processor time and memory bandwidth from them. Under torchrun or the launcher the ranks share the model as in
training, and the slowest rank counts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from kraken_train.bench.throughput import device_name
from kraken_train.bench.throughput_config import DEEPSPEED, Entry, ThroughputConfig
from kraken_train.common.cli import run_entry
from kraken_train.common.errors import ConfigError
from kraken_train.common.files import replace_synced
from kraken_train.common.free_text import FilePath
from kraken_train.common.output import open_output
from kraken_train.common.settings import to_dict
from kraken_train.common.validation import require_choice, require_positive
from kraken_train.config import PRECISIONS
from kraken_train.model.config import ModelSettings, parse_model
from kraken_train.parallel.device import DEVICES, choose_device
from kraken_train.parallel.ranks import Runtime, read_runtime
from kraken_train.recipe.optimizers import AnyOptimizer
from kraken_train.settings.engine import EngineConfig
from kraken_train.settings.parallel import ParallelConfig
from kraken_train.training.precision import choose_precision, has_native_bf16, processor_name

if TYPE_CHECKING:
    from kraken_train.bench.checkpoint_rounds import Measured

JSON_FILE = "checkpoint-stall.json"
RATIO = "stall, asynchronous / synchronous, %"


@dataclass(frozen=True)
class CheckpointStallConfig:
    """See conf/checkpoint_stall.yaml."""

    model: ModelSettings
    vocab_size: int  # of a model without one
    micro_batch_size: int  # samples per rank and optimizer step, of random tokens
    # bf16 (with fp32 master weights and accumulation) | fp32 | auto: bf16 where all devices compute it natively
    precision: str
    steps: int  # optimizer steps that are timed after each save; a write in the background should end within them
    rounds: int  # of a save of each kind; figures are medians
    output_dir: FilePath  # folder for checkpoint-stall.json; the checkpoints are written to its disk, and deleted
    device: str  # auto | cpu | cuda
    optim: AnyOptimizer
    parallel: ParallelConfig
    engine: EngineConfig

    def validate(self) -> None:
        """Raises ConfigError."""
        for name in ("vocab_size", "micro_batch_size", "steps", "rounds"):
            require_positive(name, getattr(self, name))
        require_choice("precision", self.precision, PRECISIONS)
        require_choice("device", self.device, DEVICES)
        if not self.output_dir:
            raise ConfigError("output_dir is empty; give output_dir=FOLDER")
        for part in (self.optim, self.parallel, self.engine):
            part.validate()

    def entry(self) -> Entry:
        """The model. Raises ConfigError where it does not fit the settings of `parallel`."""
        settings = dict(self.model)
        if settings.get("vocab_size") is None:
            settings["vocab_size"] = self.vocab_size
        model = parse_model(settings)
        self.parallel.require_fits(model)
        return Entry(f"{model.architecture} of {model.num_parameters:,} parameters", model, DEEPSPEED)

    @property
    def training(self) -> ThroughputConfig:
        """The settings with which `kraken_train.bench.throughput` trains a model."""
        return ThroughputConfig(
            models=(),
            reference=None,
            engines=(DEEPSPEED,),
            authors=(),
            vocab_size=self.vocab_size,
            context_length=None,
            micro_batch_size=self.micro_batch_size,
            gradient_accumulation_steps=1,
            precision=self.precision,
            steps=self.steps,
            rounds=self.rounds,
            data_dir=None,
            output_dir=self.output_dir,
            device=self.device,
            peak_tflops=None,
            optim=self.optim,
            parallel=self.parallel,
            engine=self.engine,
        )


@dataclass(frozen=True)
class Spread:
    """Of a figure over the rounds."""

    median: float
    low: float  # quartiles
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


def spread(values: Sequence[float]) -> Spread:
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return Spread(median, low, high)


def figures(measured: Measured) -> dict[str, Spread]:
    """The ratio and the time lost compare the two saves of the same round, when the machine was equally fast."""
    pairs = list(zip(*measured.rounds.values(), strict=True))
    return {
        "stall of a synchronous save, s": spread([waiting.stall for waiting, _ in pairs]),
        "stall of an asynchronous save, s": spread([beside.stall for _, beside in pairs]),
        RATIO: spread([100 * beside.stall / waiting.stall for waiting, beside in pairs]),
        "lost by an asynchronous save in all, s": spread([beside.total - waiting.steps for waiting, beside in pairs]),
        "written by a synchronous save, MB/s": spread(
            [measured.checkpoint_bytes / 1e6 / waiting.stall for waiting, _ in pairs]
        ),
    }


def measure_stalls(config: CheckpointStallConfig) -> None:
    if choose_device(config.device).type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # which DeepSpeed reads when it is imported
    from kraken_train.training.engine import start_processes, stop_processes  # noqa: PLC0415

    runtime = read_runtime()
    entry = config.entry()
    config.parallel.data_parallel_size(runtime.world_size)
    open_output(Path(config.output_dir))
    start_processes(runtime)
    native_bf16 = runtime.all_true(has_native_bf16(runtime.device))
    config = replace(config, precision=choose_precision(config.precision, None, native_bf16).name)
    from kraken_train.bench.checkpoint_rounds import measure  # noqa: PLC0415

    measured = measure(entry, config.training, Path(config.output_dir), runtime)
    if runtime.is_first:
        report(measured, entry, config, runtime)
    stop_processes(runtime)


def report(measured: Measured, entry: Entry, config: CheckpointStallConfig, runtime: Runtime) -> None:
    """The table and the JSON file."""
    found = figures(measured)
    ranks = "one rank" if runtime.world_size == 1 else f"{runtime.world_size} ranks"
    megabytes = measured.checkpoint_bytes / 1e6
    table = Table(
        title=f"{entry.name}, {config.precision}, a checkpoint of {megabytes:.0f} MB, {ranks}, "
        f"{device_name(runtime.device)}, {processor_name()}"
    )
    for column in ("figure", f"median of {config.rounds} rounds (quartiles)"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for name, of in found.items():
        table.add_row(name, str(of))
    Console(width=100).print(table)
    record: dict[str, Any] = {
        "settings": to_dict(config),
        "device": device_name(runtime.device),
        "processor": processor_name(),
        "torch": torch.__version__,
        "ranks": runtime.world_size,
        "checkpoint_bytes": measured.checkpoint_bytes,
        "figures": {name: asdict(of) for name, of in found.items()},
        "rounds": {kind: [asdict(times) for times in of] for kind, of in measured.rounds.items()},
    }
    replace_synced(Path(config.output_dir) / JSON_FILE, json.dumps(record, indent=1, allow_nan=False) + "\n")


def main() -> None:
    run_entry(measure_stalls, CheckpointStallConfig, "checkpoint_stall")


if __name__ == "__main__":
    main()
