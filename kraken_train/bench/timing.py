"""Times of prefill and decoding: rounds over everything that is compared.

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
    """Of one architecture. Rounds are kept apart, since in each every variant ran: their differences have a spread."""

    ttft: Mapping[str, Rounds]  # by variant
    output_token: Mapping[str, Rounds]
    breakdown: Mapping[str, float]  # seconds of a prefill, by operator
    traffic: Mapping[str, float]  # of a prefill
    attention_kernels: tuple[str, ...]  # names in a profile, which say what backend was chosen


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

    @property
    def capacity(self) -> int:
        """Tokens that the key-value cache has room for."""
        return self.context + self.output_tokens

    @property
    def execution(self) -> ExecutionConfig:
        return ExecutionConfig(self.compile, self.cuda_graphs, prefill_lengths=(self.context,))


def variants_of(config: ModelConfig) -> tuple[str, ...]:
    """A model that overlaps nothing waits for each sum as it is."""
    return (OVERLAPPED, SILENT, BLOCKING) if config.overlaps_communication else (OVERLAPPED, SILENT)


class Contender:
    """One rank's share of a model, loaded, with an engine for each variant."""

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
            communicator.use(variant)  # what the engine captures stays as it is
            self.engines[variant] = self.make_engine(conditions.execution)

    def make_engine(self, execution: ExecutionConfig) -> InferenceEngine:
        return InferenceEngine(self.model, self.conditions.batch_size, self.conditions.capacity, execution)

    @torch.inference_mode()
    def count_traffic(self) -> Traffic:
        """What one prefill asks of the interconnect."""
        counter = self.communicator.variants[SILENT]
        if not isinstance(counter, SimulatedCommunicator):
            raise TypeError(f"{type(counter).__name__} does not count")
        self.communicator.use(SILENT)
        counter.traffic = Traffic()
        # Neither captured nor compiled, so that every call reaches the exchange.
        plain = ExecutionConfig(compile=False, cuda_graphs=False, prefill_lengths=(self.conditions.context,))
        self.make_engine(plain).prefill(self.ids, self.lengths)
        return replace(counter.traffic)  # as it is now: later prefills count as well

    @torch.inference_mode()
    def prefill(self, variant: str) -> Tensor:
        """Prompt in, first token ids (B,) out."""
        self.communicator.use(variant)
        self.last = self.engines[variant].prefill(self.ids, self.lengths).argmax(dim=-1)
        return self.last

    @torch.inference_mode()
    def decode(self, variant: str) -> Tensor:
        """As many further tokens as the conditions say; the last ones' ids (B,)."""
        self.communicator.use(variant)
        for _ in range(self.conditions.output_tokens):
            self.last = self.engines[variant].decode(self.last).argmax(dim=-1)
        return self.last


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
    torch.compiler.reset()  # else shapes of earlier models count as reasons to compile for any shape, which is slower
    contenders = {name: Contender(config, communicator, conditions) for name, config in models.items()}
    samples: dict[tuple[str, str], list[tuple[float, float]]] = {}
    entries = [(name, variant) for name, contender in contenders.items() for variant in contender.engines]
    for round_number in range(WARMUP_ROUNDS + conditions.repeats):
        # In an order that is the same on all ranks and another each round, so that no place in it favours anything.
        for name, variant in random.Random(round_number).sample(entries, len(entries)):
            times = time_once(contenders[name], variant, runtime)
            if round_number >= WARMUP_ROUNDS:
                samples.setdefault((name, variant), []).append(times)
    figures: dict[str, Figures] = {}
    for name, contender in contenders.items():
        ttft, output_token = {}, {}
        for variant in contender.engines:
            ttft[variant], output_token[variant] = of_slowest(samples[name, variant], runtime)
        intervals = profile_prefill(contender, runtime)
        figures[name] = Figures(
            ttft, output_token, break_down(intervals), asdict(contender.traffic), attention_kernels(intervals)
        )
    return figures


def time_once(contender: Contender, variant: str, runtime: Runtime) -> tuple[float, float]:
    """Seconds (to the first token, per further token)."""
    contender.prefill(variant)  # so that every time follows a run of the same, and caches favour none
    first = seconds_of(lambda: contender.prefill(variant), contender, runtime)
    further = seconds_of(lambda: contender.decode(variant), contender, runtime)
    return first, further / contender.conditions.output_tokens


def seconds_of(work: Callable[[], object], contender: Contender, runtime: Runtime) -> float:
    """From the moment that all ranks have arrived to the end of `work` on this one.

    On a GPU that is the device's own time, without what Python takes to start it: the first launches are made while the
    device is kept busy. Where launching remains slower than the device, as without CUDA graphs, it counts.
    """
    if contender.conditions.device.type != "cuda":
        line_up(contender, runtime)
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    line_up(contender, runtime)
    torch.cuda._sleep(HEAD_START_CYCLES)
    begin_event.record()
    work()
    end_event.record()
    end_event.synchronize()
    milliseconds: float = begin_event.elapsed_time(end_event)
    return milliseconds / 1e3


def line_up(contender: Contender, runtime: Runtime) -> None:
    """The ranks begin together: first the processes, then, in a collective among their other work, the devices."""
    if runtime.world_size > 1:
        runtime.sum([0.0])
        contender.communicator.variants[OVERLAPPED].maximum(torch.zeros(1, device=contender.conditions.device))


def of_slowest(samples: Iterable[tuple[float, float]], runtime: Runtime) -> tuple[Rounds, Rounds]:
    """Of each round the slowest rank's times: (to the first token, per further token), (R,) each."""
    first, further = np.array(runtime.gather(list(samples))).max(axis=0).T
    return first, further


def profile_prefill(contender: Contender, runtime: Runtime) -> list[Interval]:
    """The median one of a few profiles, on this rank; as what is timed, it begins together and with a head start."""
    found = [
        record(
            lambda: contender.prefill(OVERLAPPED),
            contender.conditions.device,
            before=lambda: line_up(contender, runtime),
        )
        for _ in range(1 + PROFILES)
    ]
    # The first one pays for the profiler's own start.
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

    Times go round by round, so that their spread grows as it should.
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
