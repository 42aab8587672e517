"""Real training steps of several models in turns, on this rank.

All models take a few steps in each of R rounds, in an order that is the same on all ranks and changes each round: the
speed of the machine may change, but the ratios within a round hold.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from kraken_train.bench.authors_step import AuthorsStep
from kraken_train.bench.plain_engine import PlainEngine
from kraken_train.bench.plan import usable_bytes
from kraken_train.bench.throughput_config import AUTHORS, DEEPSPEED, TORCH, Entry, ThroughputConfig
from kraken_train.data.dataset import Samples, TokenStream, TrainingData
from kraken_train.data.loader import BatchLoader
from kraken_train.model.config import ModelConfig
from kraken_train.model.registry import build_model, even_share
from kraken_train.parallel.distributed import make_communicator
from kraken_train.parallel.mesh import ParallelMesh
from kraken_train.parallel.overlap_budget import choose_budget
from kraken_train.parallel.ranks import Runtime
from kraken_train.parallel.step_timer import DATA, OTHER, StepTimer
from kraken_train.settings.parallel import ParallelConfig
from kraken_train.training.engine import Engine
from kraken_train.training.precision import DTYPES, reduce_dtype

WARMUP_STEPS = 3  # at least 2
RANDOM_SAMPLES = 64  # of random tokens in memory, read again and again
STATE_BYTES = 20  # per parameter, at most: weights, masters, gradients, their sums, two moments
ENGINES: Mapping[str, Callable[..., Any]] = {DEEPSPEED: Engine, TORCH: PlainEngine, AUTHORS: AuthorsStep}

ALLOCATED, TRACKED = "torch.cuda.max_memory_allocated", "tensors (torch.distributed._tools.mem_tracker)"
UNKNOWN = "not measured (on a CPU the allocations of compiled parts cannot be tracked)"


@dataclass(frozen=True)
class Round:
    """The steps of one model in a round, on one rank."""

    seconds: float  # per step, by the wall clock
    phases: Mapping[str, float]  # seconds per step


@dataclass(frozen=True)
class Measured:
    """All rounds of one model."""

    rounds: Sequence[Round]  # of the slowest rank in each
    peak_bytes: int | None  # of memory on the fullest device, during a step
    memory_kind: str

    @property
    def seconds(self) -> np.ndarray:
        """Per step, (R,)."""
        return np.array([part.seconds for part in self.rounds])

    @property
    def median_round(self) -> Round:
        """Of an even number of rounds the faster of the two middle ones."""
        return sorted(self.rounds, key=lambda part: part.seconds)[(len(self.rounds) - 1) // 2]


class ModelInTraining:
    """A model in training, ready for its next step."""

    def __init__(
        self, entry: Entry, config: ThroughputConfig, samples: Samples, mesh: ParallelMesh, runtime: Runtime
    ) -> None:
        self.runtime = runtime
        self.timer = StepTimer(runtime.device)
        self.lr = config.optim.lr
        on_gpu = runtime.device.type == "cuda"
        compiled = config.engine.compiles(runtime.device.type)
        self.memory_kind = ALLOCATED if on_gpu else UNKNOWN if compiled else TRACKED
        self.tracker = MemTracker() if self.memory_kind == TRACKED else None
        self.peak_bytes: int | None = None
        before = torch.cuda.memory_allocated() if on_gpu else 0
        with self.tracked():
            self.engine = self.make_engine(entry, config, mesh)
            self.batches = BatchLoader(reads_of_rank(samples, config, mesh), runtime.device).__enter__()
            self.step()  # the first one may create the optimizer's state
        with self.tracked():  # from here on the peak is that of a step
            self.step()
        if self.tracker is not None:
            self.peak_bytes = int(self.tracker.get_tracker_snapshot("peak")[runtime.device]["Total"])
            self.tracker = None
        for _ in range(WARMUP_STEPS - 2):
            self.step()
        self.engine.results()
        self.resident = torch.cuda.memory_allocated() - before if on_gpu else 0  # between steps

    def make_engine(self, entry: Entry, config: ThroughputConfig, mesh: ParallelMesh) -> Any:
        communicator = make_communicator(mesh, reduce_dtype(config.parallel), self.timer)
        shares_vocabulary = config.parallel.shares_vocabulary(entry.model.vocab_size)
        units, vocabulary = even_share(entry.model, mesh.model_rank, shares_vocabulary)
        model = build_model(entry.model, 0, units, communicator, vocabulary)
        return ENGINES[entry.engine](model, config.training(mesh.data_size), mesh, self.runtime, self.timer)

    def tracked(self) -> AbstractContextManager[Any]:
        return self.tracker or nullcontext()

    def step(self) -> None:
        for _ in range(self.engine.accumulation_steps):
            with self.timer.phase(DATA):
                batch = next(self.batches)
            if self.tracker is not None:
                self.tracker.reset_mod_stats()  # otherwise it raises an error in the second micro-batch
            self.engine.accumulate(*batch)
        self.engine.step(self.lr)

    def measure(self, steps: int) -> Round:
        """Time `steps` steps after an untimed one, so that the model that ran before has no influence."""
        on_gpu = self.runtime.device.type == "cuda"
        self.step()
        self.engine.results()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self.runtime.sum([0.0])  # the ranks begin together
        self.timer.active = True
        begin = time.perf_counter()
        with self.timer.phase(OTHER):
            for _ in range(steps):
                self.step()
            self.engine.results()  # as training reads them now and then
        self.synchronize()
        seconds = time.perf_counter() - begin
        self.timer.active = False
        if on_gpu:
            others = torch.cuda.memory_allocated() - self.resident
            self.peak_bytes = max(self.peak_bytes or 0, torch.cuda.max_memory_allocated() - others)
        return Round(seconds / steps, {name: of / steps for name, of in self.timer.take().items()})

    def synchronize(self) -> None:
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize()

    def close(self) -> None:
        self.batches.__exit__(None, None, None)
        if isinstance(self.engine, Engine):
            self.engine.deepspeed.destroy()


def make_mesh(parallel: ParallelConfig, runtime: Runtime) -> ParallelMesh:
    """The ranks as copies of the model, as training shares them."""
    size, copies = parallel.sub_layer_parallel_size, parallel.data_parallel_size(runtime.world_size)
    budget = choose_budget(parallel.max_ctas, parallel.sm_carveout, runtime.device, size)
    return ParallelMesh(runtime.device.type, copies, size, budget)


def measure_all(
    entries: Sequence[Entry], config: ThroughputConfig, runtime: Runtime, data: TrainingData | None
) -> dict[Entry, Measured]:
    """Train all entries in turns. If they do not fit into memory together, each is built again for each round."""
    mesh = make_mesh(config.parallel, runtime)

    def make(entry: Entry) -> ModelInTraining:
        return ModelInTraining(entry, config, make_samples(entry.model, data), mesh, runtime)

    rounds: dict[Entry, list[Round]] = {entry: [] for entry in entries}
    peaks: dict[Entry, int | None] = {}
    kinds: dict[Entry, str] = {}
    together = fit_together(entries, config, usable_bytes(runtime.device, runtime))
    with ExitStack() as held, one_compilation_each(len(entries) * (1 if together else config.rounds)):
        kept = {entry: held.enter_context(closing(make(entry))) for entry in entries} if together else {}
        for number in range(config.rounds):
            for entry in random.Random(number).sample(list(entries), len(entries)):
                with nullcontext(kept[entry]) if together else closing(make(entry)) as model:
                    rounds[entry].append(model.measure(config.steps))
                    peaks[entry], kinds[entry] = model.peak_bytes, model.memory_kind
                    del model
            if runtime.is_first:
                print(f"round {number + 1}/{config.rounds}", flush=True)
    found = {}
    for entry in entries:
        of_ranks = runtime.gather((rounds[entry], peaks[entry]))
        slowest = [
            max(parts, key=lambda part: part.seconds) for parts in zip(*(own for own, _ in of_ranks), strict=True)
        ]
        peak = None if peaks[entry] is None else max(own for _, own in of_ranks if own is not None)
        found[entry] = Measured(slowest, peak, kinds[entry])
    return found


@contextmanager
def closing(model: ModelInTraining) -> Iterator[ModelInTraining]:
    try:
        yield model
    finally:
        model.close()
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextmanager
def one_compilation_each(models: int) -> Iterator[None]:
    """Compile for the shapes of each model, as a run with one model does.

    The models share the code of their parts, and PyTorch would compile for dynamic shapes when it sees a second model.
    """
    compilations = 16 * models  # more than the parts of a model, with and without gradients
    torch.compiler.reset()
    with torch._dynamo.config.patch(
        automatic_dynamic_shapes=False,
        recompile_limit=compilations,
        accumulated_recompile_limit=compilations,
        fail_on_recompile_limit_hit=True,
    ):
        yield


def make_samples(model: ModelConfig, data: TrainingData | None) -> Samples:
    if data is not None:
        return data.samples(model.context_length, seed=0)
    size = RANDOM_SAMPLES * model.context_length + 1
    tokens = np.random.default_rng(0).integers(model.vocab_size, size=size)
    return Samples([TokenStream([tokens.astype(np.int32)], "random tokens")], model.context_length, seed=0)


def reads_of_rank(samples: Samples, config: ThroughputConfig, mesh: ParallelMesh) -> Iterator[tuple[Samples, range]]:
    """The samples of each micro-batch of this rank's copy, without end."""
    for number in count(mesh.data_rank, mesh.data_size):
        yield samples, range(number * config.micro_batch_size, (number + 1) * config.micro_batch_size)


def fit_together(entries: Sequence[Entry], config: ThroughputConfig, usable: int) -> bool:
    """Whether the states of all and the activations of the largest fit into `usable` bytes, by a generous estimate."""
    states = sum(STATE_BYTES * entry.model.num_parameters for entry in entries)
    return states + max(activation_bytes(entry.model, config) for entry in entries) <= usable


def activation_bytes(model: ModelConfig, config: ThroughputConfig) -> int:
    """Of a micro-batch on one rank, at most: what autograd keeps of each layer, and all logits."""
    tokens, bytes_per_value = config.micro_batch_size * model.context_length, DTYPES[config.precision].itemsize
    width = model.attention_width
    streams = model.num_streams * model.hidden_size
    inner = model.num_streams * model.ffn_size * (1 if model.ffn == "gelu" else 2)
    values = model.num_layers * (4 * width + 4 * streams + 3 * inner)
    layers = values * bytes_per_value // config.parallel.sub_layer_parallel_size
    return tokens * (layers + 10 * model.vocab_size)  # bytes: logits in 16 and twice in 32 bits
