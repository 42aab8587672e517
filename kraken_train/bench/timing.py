"""Times of prefill and decoding, in rounds over all architectures and variants that are compared.

Each architecture is run in its variants (`kraken_train.bench.variants`): their differences are the exposed and the
hidden communication. Shapes: B batch, T tokens, R rounds.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kraken_train.bench.breakdown import ATTENTION, HEAD_START_CYCLES, PARTS, Interval, break_down, record
from kraken_train.bench.share import load_share
from kraken_train.bench.simulated_communicator import SimulatedCommunicator, Traffic
from kraken_train.bench.variants import BLOCKING, OVERLAPPED, SILENT, SwitchedCommunicator
from kraken_train.inference.engine import ExecutionConfig, InferenceEngine
from kraken_train.model.architecture import ModelConfig
from kraken_train.parallel.ranks import Runtime

WARMUP_ROUNDS = 2
PROFILES = 3
KERNEL_NAMES = 4  # that are kept; one or two are what a model uses

Rounds = npt.NDArray[np.float64]  # seconds in each round that counts, (R,)


@dataclass(frozen=True)
class Figures:
    """The times of one architecture. All variants run in each round, so differences are computed round by round."""

    ttft: Mapping[str, Rounds]  # by variant
    output_token: Mapping[str, Rounds]
    breakdown: Mapping[str, float]  # seconds of a prefill, by operator
    traffic: Mapping[str, float]  # of a prefill
    attention_kernels: tuple[str, ...]  # names in a profile, which show the backend


@dataclass(frozen=True)
class Conditions:
    """What is the same for all architectures of a comparison."""

    device: torch.device
    dtype: torch.dtype
    compile: bool
    cuda_graphs: bool
    batch_size: int  # sequences
    context: int  # tokens of the prompt
    output_tokens: int  # decoded after it, for the time per output token
    repeats: int  # rounds that count
    fused_kernels: bool | None = False

    def at(self, batch_size: int, context: int) -> Conditions:
        return replace(self, batch_size=batch_size, context=context)

    @property
    def capacity(self) -> int:
        """Tokens that the key-value cache has room for."""
        return self.context + self.output_tokens

    @property
    def execution(self) -> ExecutionConfig:
        return ExecutionConfig(self.compile, self.cuda_graphs, (self.context,), self.fused_kernels)


def variants_of(config: ModelConfig) -> tuple[str, ...]:
    """The variants of a model; one without overlap already waits for each all-reduce."""
    return (OVERLAPPED, SILENT, BLOCKING) if config.overlaps_communication else (OVERLAPPED, SILENT)


class TimedModel:
    """One rank's share of a model with an engine for each variant."""

    def __init__(self, config: ModelConfig, communicator: SwitchedCommunicator, conditions: Conditions) -> None:
        device, size = conditions.device, (conditions.batch_size, conditions.context)
        self.conditions = conditions
        self.communicator = communicator
        self.model = load_share(config, communicator, conditions.dtype, device)
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(config.vocab_size, size, generator=generator).to(device)
        self.lengths = torch.full((conditions.batch_size,), conditions.context, device=device)
        self.last = self.ids[:, -1]
        self.traffic = self.count_traffic()
        self.engines: dict[str, InferenceEngine] = {}
        for variant in variants_of(config):
            communicator.use(variant)  # CUDA graphs keep the variant with which they are captured
            self.engines[variant] = self.make_engine(conditions.execution)

    def make_engine(self, execution: ExecutionConfig) -> InferenceEngine:
        return InferenceEngine(self.model, self.conditions.batch_size, self.conditions.capacity, execution)

    @torch.inference_mode()
    def count_traffic(self) -> Traffic:
        """The collectives of one prefill."""
        counter = self.communicator.variants[SILENT]
        if not isinstance(counter, SimulatedCommunicator):
            raise TypeError(f"{type(counter).__name__} does not count")
        self.communicator.use(SILENT)
        counter.traffic = Traffic()
        # Neither captured nor compiled, so that every call reaches the communicator.
        plain = ExecutionConfig(compile=False, cuda_graphs=False, prefill_lengths=(self.conditions.context,))
        first_tokens(self.make_engine(plain), self.ids, self.lengths)
        return replace(counter.traffic)  # a copy, since later prefills are counted too

    @torch.inference_mode()
    def prefill(self, variant: str) -> Tensor:
        """Prompt in, first token ids (B,) out."""
        self.communicator.use(variant)
        self.last = first_tokens(self.engines[variant], self.ids, self.lengths)
        return self.last

    @torch.inference_mode()
    def decode(self, variant: str) -> Tensor:
        """Decodes `output_tokens` further tokens; returns the ids of the last ones, (B,)."""
        self.communicator.use(variant)
        engine = self.engines[variant]
        for _ in range(self.conditions.output_tokens):
            self.last = engine.most_likely(engine.add_tokens(self.last)).ids
        return self.last


def first_tokens(engine: InferenceEngine, input_ids: Tensor, lengths: Tensor) -> Tensor:
    """Prompts (B, T) -> their most likely next tokens (B,)."""
    return engine.most_likely(engine.read_prompts(input_ids, lengths)).ids


def compare(
    models: Mapping[str, ModelConfig],
    communicator: SwitchedCommunicator,
    conditions: Conditions,
    runtime: Runtime,
) -> dict[str, Figures]:
    """Figures by architecture.

    All models are in memory together. Over several ranks a time is that of the slowest.
    """
    gc.collect()
    if conditions.device.type == "cuda":
        torch.cuda.empty_cache()
    torch.compiler.reset()  # otherwise the shapes of earlier models lead to code for dynamic shapes, which is slower
    timed_models = {name: TimedModel(config, communicator, conditions) for name, config in models.items()}
    samples: dict[tuple[str, str], list[tuple[float, float]]] = {}
    entries = [(name, variant) for name, timed_model in timed_models.items() for variant in timed_model.engines]
    for round_number in range(WARMUP_ROUNDS + conditions.repeats):
        # In an order that is the same on all ranks and changes each round, so that it favours no model.
        for name, variant in random.Random(round_number).sample(entries, len(entries)):
            times = time_once(timed_models[name], variant, runtime)
            if round_number >= WARMUP_ROUNDS:
                samples.setdefault((name, variant), []).append(times)
    figures: dict[str, Figures] = {}
    for name, timed_model in timed_models.items():
        ttft, output_token = {}, {}
        for variant in timed_model.engines:
            ttft[variant], output_token[variant] = of_slowest_rank(samples[name, variant], runtime)
        intervals = profile_prefill(timed_model, runtime)
        figures[name] = Figures(
            ttft, output_token, break_down(intervals), asdict(timed_model.traffic), attention_kernels(intervals)
        )
    return figures


def time_once(timed_model: TimedModel, variant: str, runtime: Runtime) -> tuple[float, float]:
    """Seconds (to the first token, per further token)."""
    timed_model.prefill(variant)  # so that each time follows a run of the same model, with the same caches
    first = seconds_of(lambda: timed_model.prefill(variant), timed_model, runtime)
    further = seconds_of(lambda: timed_model.decode(variant), timed_model, runtime)
    return first, further / timed_model.conditions.output_tokens


def seconds_of(work: Callable[[], object], timed_model: TimedModel, runtime: Runtime) -> float:
    """From the moment that all ranks have arrived to the end of `work` on this one."""
    return seconds_on(timed_model.conditions.device, work, before=lambda: synchronize_ranks(timed_model, runtime))


def seconds_on(device: torch.device, work: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    """From the end of `before` to that of `work`.

    On a GPU that is the device's time, without the start in Python: the first kernels are launched while the device is
    kept busy. Where launching is slower than the kernels, as without CUDA graphs, the time of the launches counts.
    """
    if device.type != "cuda":
        before()
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before()
    torch.cuda._sleep(HEAD_START_CYCLES)
    begin_event.record()
    work()
    end_event.record()
    end_event.synchronize()
    milliseconds: float = begin_event.elapsed_time(end_event)
    return milliseconds / 1e3


def synchronize_ranks(timed_model: TimedModel, runtime: Runtime) -> None:
    """Let the ranks begin together: first the processes, then, by a collective on their streams, the devices."""
    if runtime.world_size > 1:
        runtime.sum([0.0])
        timed_model.communicator.variants[OVERLAPPED].maximum(torch.zeros(1, device=timed_model.conditions.device))


def of_slowest_rank(samples: Iterable[tuple[float, float]], runtime: Runtime) -> tuple[Rounds, Rounds]:
    """The times of the slowest rank in each round: (to the first token, per further token), (R,) each."""
    first, further = np.array(runtime.gather(list(samples))).max(axis=0).T
    return first, further


def profile_prefill(timed_model: TimedModel, runtime: Runtime) -> list[Interval]:
    """The median of a few profiles, on this rank; like the timed runs they begin together on a busy device."""
    found = [
        record(
            lambda: timed_model.prefill(OVERLAPPED),
            timed_model.conditions.device,
            before=lambda: synchronize_ranks(timed_model, runtime),
        )
        for _ in range(1 + PROFILES)
    ]
    # The first one includes the start of the profiler.
    return sorted(found[1:], key=seconds_in_all)[PROFILES // 2]


def seconds_in_all(intervals: Iterable[Interval]) -> float:
    parts = break_down(intervals)
    return sum(parts[part] for part in PARTS)


def attention_kernels(intervals: Iterable[Interval]) -> tuple[str, ...]:
    """On a GPU the kernels, on the CPU the operators, in the order in which they ran first."""
    names = dict.fromkeys(interval.name for interval in intervals if interval.kind == ATTENTION)
    return tuple(names)[:KERNEL_NAMES]


def extrapolate(shallow: Figures, deep: Figures, depths: tuple[int, int], depth: int) -> Figures:
    """Figures of a model of `depth` layers, from two of fewer: every layer after the first costs the same.

    Each round is extrapolated on its own, which keeps the spread.
    """
    few, more = depths
    reach = (depth - few) / (more - few)

    def reached(values: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value + (others[name] - value) * reach for name, value in values.items()}

    return Figures(
        reached(shallow.ttft, deep.ttft),
        reached(shallow.output_token, deep.output_token),
        reached(shallow.breakdown, deep.breakdown),
        reached(shallow.traffic, deep.traffic),
        deep.attention_kernels,
    )
