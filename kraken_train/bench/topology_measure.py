"""What `kraken_train.bench.topology` predicts, measured on one device with simulated collectives.

The device runs one rank's real share of each model, in turn with those of the other architectures. Prompts and further
tokens are those of `kraken_train.bench.ttft`. A training step is the forward and backward pass of a micro-batch, and
an update by AdamW of fp32 weights.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from kraken_train.bench.link import Link
from kraken_train.bench.plan import usable_bytes
from kraken_train.bench.results import SIMULATED, Case
from kraken_train.bench.share import load_share
from kraken_train.bench.simulated_training import SimulatedTrainingCommunicator
from kraken_train.bench.timing import WARMUP_ROUNDS, Conditions, Rounds, seconds_on, variants_of
from kraken_train.bench.topology_row import Place, Row, training_layout
from kraken_train.bench.ttft import Comparison, run, simulated_communicator
from kraken_train.bench.variants import BLOCKING, OVERLAPPED, SILENT, SwitchedCommunicator
from kraken_train.common.errors import ConfigError
from kraken_train.kernels.selection import use_kernels
from kraken_train.model.architecture import ModelConfig
from kraken_train.model.registry import even_share
from kraken_train.parallel.ranks import Runtime
from kraken_train.parallel.sharding import ModelRank
from kraken_train.planning.interconnect import Interconnect
from kraken_train.planning.layout import TrainingLayout
from kraken_train.planning.memory import predict_memory
from kraken_train.planning.serving_time import PassTime
from kraken_train.planning.traffic import within_copy

LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Bench:
    """Where and how it is measured."""

    link: Link
    runtime: Runtime
    conditions: Conditions  # but for the batch size and the context, which are the place's

    @property
    def precision(self) -> str:
        return "bf16" if self.conditions.dtype is torch.bfloat16 else "fp32"


def measure(models: Mapping[str, ModelConfig], place: Place, interconnect: Interconnect, bench: Bench) -> list[Row]:
    """A row for each architecture. Raises ConfigError where a share does not fit into memory."""
    comparison = serving(models, place, bench)
    plan = comparison.plan(usable_bytes(bench.conditions.device, bench.runtime))
    communicator = simulated_communicator(interconnect, place.degree, bench.link)
    figures = {
        result.model.architecture: result.figures
        for result in run(comparison, plan, communicator, bench.runtime, SIMULATED)
    }
    steps = time_steps(models, place, interconnect, bench)
    return [
        Row(name, place, steps[name], split(figures[name].ttft), split(figures[name].output_token)) for name in models
    ]


def require_memory(models: Mapping[str, ModelConfig], place: Place, bench: Bench) -> None:
    """Raises ConfigError unless a share of each model fits into memory, in serving and in training."""
    usable = usable_bytes(bench.conditions.device, bench.runtime)
    serving(models, place, bench).plan(usable)
    memory_groups(at_context(models, place), training_layout(place, bench.precision), usable)


def serving(models: Mapping[str, ModelConfig], place: Place, bench: Bench) -> Comparison:
    conditions = bench.conditions.at(place.batch_size, place.context)
    served = {name: config.replace(context_length=conditions.capacity) for name, config in models.items()}
    return Comparison(Case(place.size, place.context, place.degree), served, conditions)


def at_context(models: Mapping[str, ModelConfig], place: Place) -> dict[str, ModelConfig]:
    return {name: config.replace(context_length=place.context) for name, config in models.items()}


def split(rounds: Mapping[str, Rounds]) -> PassTime:
    """Times by variant -> what is computed, and of the communication what is waited for and what overlapping saves."""
    overlapped, silent = rounds[OVERLAPPED], rounds[SILENT]
    hidden = rounds.get(BLOCKING, overlapped) - overlapped
    return PassTime(float(np.median(silent)), float(np.median(overlapped - silent)), float(np.median(hidden)))


class TimedTraining:
    """One rank's share of a model with its optimizer.

    `broadcasts` are the bytes of each broadcast with which the engine makes equal gradients equal to the bit.
    """

    def __init__(
        self,
        config: ModelConfig,
        communicator: SwitchedCommunicator,
        conditions: Conditions,
        broadcasts: Sequence[int] = (),
    ) -> None:
        self.communicator = communicator
        self.broadcasts = broadcasts
        _, vocabulary = even_share(config, communicator.model_rank, vocab_parallel=True)
        self.model = load_share(config, communicator, conditions.dtype, conditions.device, vocabulary)
        self.model.train().requires_grad_(True)
        use_kernels(self.model, conditions.fused_kernels, conditions.device, "fused_kernels")
        if conditions.compile:
            self.model.compile_parts()
        self.weights: list[Tensor] = list(self.model.parameters())
        self.masters: list[Tensor] = [nn.Parameter(weight.detach().float()) for weight in self.weights]
        self.optimizer = torch.optim.AdamW(self.masters, LEARNING_RATE, fused=True)
        shape = (conditions.batch_size, conditions.context + 1)
        ids = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
        self.ids, self.targets = ids[:, :-1].to(conditions.device), ids[:, 1:].to(conditions.device)

    def step(self, variant: str) -> None:
        self.communicator.use(variant)
        self.model.loss(self.ids, self.targets).backward()
        with torch.no_grad():
            for size in self.broadcasts:
                cast(SimulatedTrainingCommunicator, self.communicator.inner).broadcast(size)
            for master, weight in zip(self.masters, self.weights, strict=True):
                master.grad, weight.grad = cast(Tensor, weight.grad).float(), None
            self.optimizer.step()
            torch._foreach_copy_(self.weights, self.masters)


def time_steps(
    models: Mapping[str, ModelConfig], place: Place, interconnect: Interconnect, bench: Bench
) -> dict[str, PassTime]:
    """By architecture; in turn where all fit into memory together."""
    conditions = bench.conditions.at(place.batch_size, place.context)
    layout, trained_models = training_layout(place, bench.precision), at_context(models, place)
    found: dict[str, dict[str, Rounds]] = {}
    for names in memory_groups(trained_models, layout, usable_bytes(conditions.device, bench.runtime)):
        gc.collect()
        communicator = training_communicator(interconnect, place.degree, bench.link)
        trained = {}
        for name in names:
            model = trained_models[name]
            broadcasts = [one.size for one in within_copy(model, layout) if one.kind == "broadcast"]
            trained[name] = TimedTraining(model, communicator, conditions, broadcasts)
        entries = [(name, variant) for name in names for variant in variants_of(models[name])]
        for round_number in range(WARMUP_ROUNDS + conditions.repeats):
            # In an order that changes each round, so that it favours no model.
            for name, variant in random.Random(round_number).sample(entries, len(entries)):
                seconds = seconds_on(conditions.device, partial(trained[name].step, variant))
                if round_number >= WARMUP_ROUNDS:
                    samples = found.setdefault(name, {})
                    samples[variant] = np.append(samples.get(variant, np.empty(0)), seconds)
    return {name: split(found[name]) for name in models}


def memory_groups(models: Mapping[str, ModelConfig], layout: TrainingLayout, usable: int) -> list[tuple[str, ...]]:
    """Architectures whose training is in memory together: all, or each on its own. Raises ConfigError."""
    needs = {name: predict_memory(config, layout).total for name, config in models.items()}
    if sum(needs.values()) <= usable:
        return [tuple(models)]
    name, largest = max(needs.items(), key=lambda item: item[1])
    if largest > usable:
        raise ConfigError(
            f"training the share of one of {layout.sub_layer_parallel_size} devices takes {largest / 1e9:.1f} GB "
            f"({name}, {layout.micro_batch_size} x {models[name].context_length} tokens), and there are "
            f"{usable / 1e9:.1f} GB for it; use smaller sizes, contexts or batch_sizes, more degrees, or measure=false"
        )
    return [(name,) for name in models]


def training_communicator(interconnect: Interconnect, degree: int, link: Link) -> SwitchedCommunicator:
    first = ModelRank(0, degree)
    return SwitchedCommunicator(
        {
            OVERLAPPED: SimulatedTrainingCommunicator(interconnect, first, link),
            BLOCKING: SimulatedTrainingCommunicator(interconnect, first, link, overlap=False),
            SILENT: SimulatedTrainingCommunicator(interconnect, first, link=None),
        }
    )
