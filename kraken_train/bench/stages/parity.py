"""The same training on several ranks as in one process: every way to share the ranks, with every kind of memory.

Each rank also takes the steps alone, in plain PyTorch without fused kernels, with the whole batch; the losses must
agree.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from kraken_train.bench.plain_engine import PlainEngine
from kraken_train.bench.stages.preset import ParitySizes
from kraken_train.bench.stages.program import Measured
from kraken_train.common.cli import compose_command
from kraken_train.config import TrainConfig
from kraken_train.model.architecture import ModelConfig
from kraken_train.model.config import GPTConfig, KrakenConfig
from kraken_train.model.registry import build_model, even_share
from kraken_train.parallel.distributed import make_communicator
from kraken_train.parallel.mesh import ParallelMesh
from kraken_train.parallel.ranks import Runtime, read_runtime
from kraken_train.parallel.sharding import ModelRank
from kraken_train.parallel.step_timer import StepTimer
from kraken_train.training.engine import Engine, start_processes, stop_processes
from kraken_train.training.precision import reduce_dtype

VOCABULARY = 512  # a multiple of all numbers of ranks
LAYERS = 2
HEADS = 2  # of a sub-layer
LEARNING_RATE = 1e-3
# precision, ZeRO stage, whether the vocabulary is cut, fused kernels (where Triton is installed)
MODES = (("fp32", 1, False, True), ("fp32", 2, True, False), ("bf16", 1, True, True), ("bf16", 2, False, False))


def measure(sizes: ParitySizes, calls: ModuleType) -> Measured:
    runtime = read_runtime()
    start_processes(runtime)
    worst: dict[str, float] = {}
    cases: dict[str, float] = {}
    batch, has_triton = runtime.world_size, importlib.util.find_spec("triton") is not None
    for name, model in models(sizes).items():
        for precision, zero_stage, vocab_parallel, fused in MODES:
            alone = losses_alone(model, sizes.steps, batch, precision, runtime)
            for ranks in divisors(runtime.world_size):
                settings = (
                    f"engine.zero_stage={zero_stage}",
                    f"parallel.vocab_parallel={str(vocab_parallel).lower()}",
                    f"engine.fused_kernels={str(fused and has_triton).lower()}",
                    f"parallel.sub_layer_parallel_size={ranks}",
                )
                shared = losses_shared(model, sizes.steps, batch, training(batch, precision, *settings), runtime)
                differs = max(abs(ours / theirs - 1) for ours, theirs in zip(shared, alone, strict=True))
                cases[f"{name}, {ranks} ranks a copy, {precision}, {settings}"] = differs
                worst[precision] = max(worst.get(precision, 0.0), differs)
    stop_processes(runtime)
    figures = {f"{name}: largest relative difference of a loss": value for name, value in worst.items()}
    return Measured(figures, {"ranks": runtime.world_size, "relative differences": cases})


def models(sizes: ParitySizes) -> dict[str, ModelConfig]:
    common: dict[str, Any] = {"num_layers": LAYERS, "vocab_size": VOCABULARY, "context_length": sizes.context_length}
    units, width = sizes.num_sub_layers, sizes.hidden_size
    return {
        "Kraken": KrakenConfig(units, hidden_size=width, heads_per_sub_layer=HEADS, **common),
        "standard": GPTConfig(hidden_size=units * width // 2, num_heads=units, **common),
    }


def divisors(number: int) -> Iterator[int]:
    return (part for part in range(1, number + 1) if number % part == 0)


def training(samples: int, precision: str, *settings: str) -> TrainConfig:
    common = ["data_dir=none", "run_dir=none", f"global_batch_size={samples}", "micro_batch_size=1"]
    return compose_command([*common, f"precision={precision}", *settings], TrainConfig, "train")


@dataclass(frozen=True)
class Alone:
    """What `PlainEngine` asks of a mesh, for a process that trains the whole model."""

    data_size: int = 1
    model_rank: ModelRank = field(default_factory=lambda: ModelRank(0, 1))


def losses_alone(model: ModelConfig, steps: int, samples: int, precision: str, runtime: Runtime) -> list[float]:
    mesh, timer = cast(ParallelMesh, Alone()), StepTimer(runtime.device)
    engine = PlainEngine(
        build_model(model), training(samples, precision, "engine.fused_kernels=false"), mesh, runtime, timer
    )
    take_steps(engine, model, steps, samples, range(samples), runtime)
    return engine.results()


def losses_shared(model: ModelConfig, steps: int, samples: int, config: TrainConfig, runtime: Runtime) -> list[float]:
    ranks = config.parallel.sub_layer_parallel_size
    mesh = ParallelMesh(runtime.device.type, runtime.world_size // ranks, ranks)
    units, vocabulary = even_share(model, mesh.model_rank, config.parallel.shares_vocabulary(model.vocab_size))
    communicator = make_communicator(mesh, reduce_dtype(config.parallel))
    engine = Engine(build_model(model, 0, units, communicator, vocabulary), config, mesh, runtime)
    take_steps(engine, model, steps, samples, range(mesh.data_rank, samples, mesh.data_size), runtime)
    found = [result.loss for result in engine.results()]
    engine.deepspeed.destroy()
    return found


def take_steps(engine: Any, model: ModelConfig, steps: int, samples: int, own: range, runtime: Runtime) -> None:
    """Steps of `samples` random samples, of which this rank takes its `own`, one at a time."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        tokens = torch.randint(model.vocab_size, (samples, model.context_length + 1), generator=generator)
        for number in own:
            engine.accumulate(*inputs_and_targets(tokens[number : number + 1].to(runtime.device)))
        engine.step(LEARNING_RATE)


def inputs_and_targets(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T + 1) -> twice (B, T)."""
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
