"""Time to first token, Kraken against its baselines: python -m kraken_train.bench.ttft

One process runs one rank's share of each model for real and simulates the collectives on a named interconnect
(`interconnect=h100_nvswitch`). Under torchrun or the deepspeed launcher every rank runs its share and the collectives
are real: NCCL on GPUs, gloo on CPUs. All figures are labelled with that and with the device.

A prompt goes in and the most likely first token comes out; weights are random. Beside that time stand the computation
alone (no communication), Kraken without overlap, the time per output token after the prompt, and a breakdown by
operator. Where a share does not fit into memory, two smaller depths are run and extrapolated, and the results say so.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from kraken_train.bench import figures
from kraken_train.bench.grid import LAYERS, REFERENCE, SIZES, architectures, layer_settings, model_config, require_axis
from kraken_train.bench.link import Link
from kraken_train.bench.plan import Plan, make_plan, usable_bytes
from kraken_train.bench.results import MEASURED, SIMULATED, Case, Result, as_table, summarize, summary_lines
from kraken_train.bench.simulated_communicator import SimulatedCommunicator, make_link
from kraken_train.bench.timing import Conditions, compare, extrapolate
from kraken_train.bench.variants import BLOCKING, OVERLAPPED, SILENT, SwitchedCommunicator, WithoutOverlap
from kraken_train.common.cli import run_entry
from kraken_train.common.errors import ConfigError
from kraken_train.common.files import replace_synced
from kraken_train.common.free_text import FilePath
from kraken_train.common.output import open_output
from kraken_train.common.settings import to_dict
from kraken_train.common.validation import require_at_least, require_choice, require_positive
from kraken_train.inference.ranks import COLLECTIVES, connect, end_rank, started_ranks
from kraken_train.kernels.selection import choose_kernels
from kraken_train.model.architecture import ModelConfig
from kraken_train.parallel.communicator import Communicator
from kraken_train.parallel.device import DEVICES, choose_device
from kraken_train.parallel.ranks import Runtime, read_runtime
from kraken_train.parallel.sharding import ModelRank
from kraken_train.planning.interconnect import Interconnect
from kraken_train.training.precision import DTYPES, has_native_bf16

DEFAULT_DEGREES = (4, 8)
FREE = Interconnect("free", latency_us=0.0, bus_bandwidth=None, source="")
JSON_FILE, SPEED_UP_FILE, BREAKDOWN_FILE = "ttft.json", "speed_up.png", "breakdown.png"


@dataclass(frozen=True)
class TTFTConfig:
    """See conf/ttft.yaml."""

    architectures: tuple[str, ...]  # values of model.architecture, which docs/models.md lists
    sizes: tuple[str, ...]  # of the standard Transformer: tiny, 1.3b, 6.7b, 13b, 65b, 175b
    contexts: tuple[int, ...]  # tokens of the prompt
    # devices, and sub-layers of the Kraken; null: 4 and 8, or the number of ranks if there are several
    degrees: tuple[int, ...] | None
    layers: str  # paper: those of GPT-2 | modern: those of conf/model/base/modern.yaml, in all architectures
    batch_size: int  # prompts at once
    output_tokens: int  # tokens decoded after the prompt, for the time per output token
    vocab_size: int  # rows of the embedding
    repeats: int  # rounds over all that is compared; times are medians
    output_dir: FilePath  # folder for ttft.json, speed_up.png and breakdown.png
    device: str  # auto | cpu | cuda
    dtype: str | None  # bf16 | fp32; null: bf16 where the device computes it natively
    compile: bool | None  # torch.compile the parts of the layers; null: on a GPU
    cuda_graphs: bool | None  # replay the kernels as CUDA graphs; null: on a GPU
    # of several ranks: auto | library (NCCL or gloo) | symmetric (of small tensors over memory that all GPUs read);
    # auto: symmetric behind NVSwitch
    collectives: str
    simulated_blocks: int  # multiprocessors that a simulated collective occupies on a GPU
    interconnect: Interconnect
    # compute what lies between a Kraken's matrix products with Triton kernels; null: on a GPU where Triton is installed
    fused_kernels: bool | None = None

    def validate(self) -> None:
        """Rules that need no machine. Raises ConfigError."""
        for name in ("architectures", "sizes", "contexts", "degrees"):
            if getattr(self, name) is not None:  # as degrees may be
                require_axis(name, getattr(self, name))
        for architecture in self.architectures:
            require_choice("architectures", architecture, architectures())
        for size in self.sizes:
            require_choice("sizes", size, tuple(SIZES))
        for context in self.contexts:
            require_positive("contexts", context)
        require_choice("layers", self.layers, LAYERS)
        for degree in self.degrees or ():
            require_at_least("degrees", degree, 2)
        for name in ("batch_size", "output_tokens", "vocab_size", "repeats", "simulated_blocks"):
            require_positive(name, getattr(self, name))
        require_choice("device", self.device, DEVICES)
        require_choice("collectives", self.collectives, COLLECTIVES)
        if self.dtype is not None:
            require_choice("dtype", self.dtype, tuple(DTYPES))
        if not self.output_dir:
            raise ConfigError("output_dir is empty; give output_dir=FOLDER")
        self.interconnect.validate()

    def degrees_for(self, world_size: int) -> tuple[int, ...]:
        """Numbers of devices to compare on. Raises ConfigError where real ranks are not as many."""
        if world_size == 1:
            return self.degrees or DEFAULT_DEGREES
        if self.degrees not in (None, (world_size,)):
            raise ConfigError(
                f"degrees={list(self.degrees or ())} must be [{world_size}], the number of ranks that were started, "
                "since their collectives are real; start another number, or a single process, which simulates them"
            )
        return (world_size,)

    def conditions(self, device: torch.device, context: int) -> Conditions:
        """Raises ConfigError for what the device cannot do."""
        on_gpu = device.type == "cuda"
        if self.cuda_graphs and not on_gpu:
            raise ConfigError(f"cuda_graphs=true needs a GPU, and the device is {device.type}; use false or null")
        choose_kernels(self.fused_kernels, device, "fused_kernels")  # refuses what cannot be had here
        return Conditions(
            device=device,
            dtype=DTYPES[self.dtype or ("bf16" if has_native_bf16(device) else "fp32")],
            compile=on_gpu if self.compile is None else self.compile,
            cuda_graphs=on_gpu if self.cuda_graphs is None else self.cuda_graphs,
            batch_size=self.batch_size,
            context=context,
            output_tokens=self.output_tokens,
            repeats=self.repeats,
            fused_kernels=self.fused_kernels,
        )


@dataclass(frozen=True)
class Comparison:
    """One case with the models and conditions to run it."""

    case: Case
    models: dict[str, ModelConfig]  # by architecture
    conditions: Conditions

    def plan(self, usable: int) -> Plan:
        try:
            return make_plan(self.models, self.case.degree, self.conditions, usable)
        except ConfigError as error:
            raise ConfigError(f"sizes={self.case.size}, contexts={self.case.context}: {error}") from None


def comparisons(config: TTFTConfig, device: torch.device, world_size: int) -> list[Comparison]:
    """In the order of sizes, contexts, degrees. Raises ConfigError."""
    found, layers = [], layer_settings(config.layers)
    for size, context, degree in itertools.product(config.sizes, config.contexts, config.degrees_for(world_size)):
        conditions = config.conditions(device, context)
        models = {
            name: model_config(name, SIZES[size], degree, config.vocab_size, conditions.capacity).replace(**layers)
            for name in config.architectures
        }
        found.append(Comparison(Case(size, context, degree), models, conditions))
    return found


def run(
    comparison: Comparison, plan: Plan, communicator: SwitchedCommunicator, runtime: Runtime, kind: str
) -> list[Result]:
    """The figures of one case, at the model's depth."""
    results = []
    for group in plan.groups:
        at_depth = [
            compare(
                {name: comparison.models[name].at_depth(depth) for name in group},
                communicator,
                comparison.conditions,
                runtime,
            )
            for depth in plan.depths
        ]
        for name in group:
            model, found, scaled_from = comparison.models[name], at_depth[0][name], None
            if len(plan.depths) > 1:
                scaled_from = plan.depths
                found = extrapolate(found, at_depth[1][name], plan.depths, model.num_layers)
            results.append(Result(comparison.case, model, found, scaled_from, len(plan.groups) == 1, kind))
    return results


def real_communicator(real: Communicator) -> SwitchedCommunicator:
    silent = SimulatedCommunicator(FREE, real.model_rank, link=None)
    return SwitchedCommunicator({OVERLAPPED: real, BLOCKING: WithoutOverlap(real), SILENT: silent})


def simulated_communicator(interconnect: Interconnect, degree: int, link: Link) -> SwitchedCommunicator:
    first = ModelRank(0, degree)
    return SwitchedCommunicator(
        {
            OVERLAPPED: SimulatedCommunicator(interconnect, first, link),
            BLOCKING: SimulatedCommunicator(interconnect, first, link, overlap=False),
            SILENT: SimulatedCommunicator(interconnect, first, link=None),
        }
    )


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, threads: {torch.get_num_threads()})"


def describe(config: TTFTConfig, device: torch.device, conditions: Conditions, kind: str, ranks: int) -> dict[str, Any]:
    """The conditions of the figures, for JSON."""
    simulated = kind == SIMULATED
    return {
        "kind": kind,
        "device": device_name(device),
        "processes": ranks,
        "interconnect": {
            **to_dict(config.interconnect),
            "changed": config.interconnect.is_overridden,
        }
        if simulated
        else {"name": "NCCL" if device.type == "cuda" else "gloo", "collectives": config.collectives},
        "conditions": {
            "dtype": str(conditions.dtype).removeprefix("torch."),
            "compile": conditions.compile,
            "cuda_graphs": conditions.cuda_graphs,
            "fused_kernels": conditions.fused_kernels,
            "batch_size": conditions.batch_size,
            "output_tokens": conditions.output_tokens,
            "repeats": conditions.repeats,
            "simulated_blocks": config.simulated_blocks if simulated and device.type == "cuda" else None,
        },
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()},
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def title_of(config: TTFTConfig, device: torch.device, kind: str, ranks: int) -> str:
    if kind == SIMULATED:
        return (
            f"Time to first token: one rank's share measured on {device_name(device)},\n"
            f"AllReduce simulated ({config.interconnect})"
        )
    backend = "NCCL" if device.type == "cuda" else "gloo"
    return f"Time to first token: measured on {ranks} x {device_name(device)}, {backend}"


def measure_ttft(config: TTFTConfig) -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # some builds' profiler reports each of its starts and stops
    planned = comparisons(config, choose_device(config.device), read_runtime().world_size)
    open_output(Path(config.output_dir))
    with started_ranks(config.device) as runtime:
        results, title = run_all(config, planned, runtime)
        if runtime.is_first:
            Console(width=None if Console().is_terminal else 160).print(as_table(results, title))
            print("geometric means:", *summary_lines(results), sep="\n  ")
            draw(results, title, Path(config.output_dir))


def run_all(config: TTFTConfig, planned: list[Comparison], runtime: Runtime) -> tuple[list[Result], str]:
    """(results, title of the figures); after each case the JSON file is written with all finished ones."""
    device, ranks = runtime.device, runtime.world_size
    usable = usable_bytes(device, runtime)
    plans = [comparison.plan(usable) for comparison in planned]
    kind = MEASURED if ranks > 1 else SIMULATED
    link = make_link(device, config.simulated_blocks) if kind == SIMULATED else None
    real = connect(runtime, config.collectives)
    about = describe(config, device, planned[0].conditions, kind, ranks)
    results: list[Result] = []
    for number, (comparison, plan) in enumerate(zip(planned, plans, strict=True), start=1):
        if link is None:
            communicator = real_communicator(real)
        else:
            communicator = simulated_communicator(config.interconnect, comparison.case.degree, link)
        results += run(comparison, plan, communicator, runtime, kind)
        if runtime.is_first:
            print(f"{number}/{len(planned)}  {comparison.case}", flush=True)
            write_json(Path(config.output_dir) / JSON_FILE, about, results)
    return results, title_of(config, device, kind, ranks)


def write_json(path: Path, about: dict[str, Any], results: list[Result]) -> None:
    record = {**about, "summary": summarize(results), "results": [result.to_dict() for result in results]}
    replace_synced(path, json.dumps(record, indent=2, allow_nan=False) + "\n")


def draw(results: list[Result], title: str, folder: Path) -> None:
    if {REFERENCE} < {result.model.architecture for result in results}:
        figures.draw_speed_ups(results, title, folder / SPEED_UP_FILE)
    figures.draw_breakdowns(results, title, folder / BREAKDOWN_FILE)


def main() -> None:
    run_entry(measure_ttft, TTFTConfig, "ttft")
    end_rank()


if __name__ == "__main__":
    main()
