"""The all-reduces of the layers: that overlapping changes no bit, and how much of them the attention hides.

The same steps are taken three times: overlapped, overlapped again (which shows that the machine repeats itself), and
with each sum waited for at once. Meanwhile memory is allocated, overwritten and freed right after each sum begins and
ends, in both passes, so that a buffer that was freed too early would be overwritten.

Its settings have `parallel.sm_carveout=0`, since products beside a sum would otherwise be computed by other kernels,
with other bits, than after it; and a whole vocabulary, which keeps the order of sums that `hidden_shares` relies on.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kraken_train.bench.breakdown import ALL_REDUCE, ATTENTION, Interval, length, outermost, overlap, record, union
from kraken_train.bench.stages.preset import StepSizes
from kraken_train.bench.stages.program import Measured
from kraken_train.bench.throughput_config import Entry, ThroughputConfig
from kraken_train.bench.throughput_run import make_mesh, one_compilation_each
from kraken_train.bench.variants import ForwardingCommunicator, WithoutOverlap
from kraken_train.common.cli import compose_command
from kraken_train.model.registry import build_model, even_share
from kraken_train.parallel.communicator import Communicator
from kraken_train.parallel.distributed import make_communicator
from kraken_train.parallel.mesh import ParallelMesh
from kraken_train.parallel.ranks import Runtime, read_runtime
from kraken_train.training.engine import Engine, start_processes, stop_processes
from kraken_train.training.precision import choose_precision, has_native_bf16, reduce_dtype

COLLECTIVES = (ALL_REDUCE, "all_gather")
RUNS = ("overlapped", "overlapped again", "blocking")


def measure(sizes: StepSizes, calls: ModuleType) -> Measured:
    runtime = read_runtime()
    start_processes(runtime)
    config = compose_command(sizes.settings, ThroughputConfig, "throughput")
    native = runtime.all_true(has_native_bf16(runtime.device))
    config = replace(config, precision=choose_precision(config.precision, None, native).name)
    with repeatable(), one_compilation_each(len(RUNS)):
        ways = {name: take_steps(config, sizes.steps, name, runtime) for name in RUNS}
    first, again, blocking = (ways[name].outcome for name in RUNS)
    shares = runtime.gather(ways[RUNS[0]].shares)
    stop_processes(runtime)
    figures = {
        "overlapped twice: equal bits": first == again,
        "overlapped and blocking: equal bits": first == blocking,
        "AllReduce of the layers within the attention part": min(part for part, _ in shares),
        "AllReduce of the layers beside attention's own kernels": min(kernels for _, kernels in shares),
    }
    return Measured(figures, {"losses and digests": {name: list(way.outcome) for name, way in ways.items()}})


@dataclass(frozen=True)
class Way:
    """One of RUNS on this rank."""

    outcome: tuple[Any, ...]  # losses, gradient norms, and digests of the weights of all ranks
    shares: tuple[float, float]  # of the last step, see `hidden_shares`


class Churning(ForwardingCommunicator):
    """Overwrites fresh memory after each start and each wait, in both passes."""

    def start_all_reduce(self, streams: Tensor) -> Any:
        handle = self.inner.start_all_reduce(streams)
        self.churn(streams)
        under_way = getattr(handle, "buffer", None)
        if under_way is not None and under_way.requires_grad:
            under_way.register_hook(self.churn)  # right after the gradient's sum has begun
        if streams.requires_grad:
            streams.register_hook(self.churn)  # after its end
        return handle

    def wait(self, handle: Any) -> Tensor:
        total = self.inner.wait(handle)
        self.churn(total)
        if total.requires_grad:
            total.register_hook(self.churn)  # right before the gradient's sum begins
        return total

    def churn(self, like: Tensor) -> None:
        """Each size of the buffers that are summed is allocated twice and overwritten."""
        size = like.shape[-3:]
        for dtype in (like.dtype, torch.float32):
            junk = [like.new_full(size, math.nan, dtype=dtype) for _ in range(2)]
            del junk


def take_steps(config: ThroughputConfig, steps: int, way: str, runtime: Runtime) -> Way:
    """Train anew for `steps` steps, and profile a further one."""
    (entry,) = config.entries()
    mesh = make_mesh(config.parallel, runtime)
    real = make_communicator(mesh, reduce_dtype(config.parallel))
    communicator = Churning(WithoutOverlap(real) if way == "blocking" else real)
    engine = make_engine(entry, config, mesh, runtime, communicator)
    batches = random_batches(entry, config, mesh, runtime)
    for _ in range(steps):
        take_step(engine, *next(batches))
    results = engine.results()
    weights = runtime.gather(digest(engine.model))
    batch = next(batches)
    together = partial(runtime.sum, [0.0])  # the ranks begin together, so that no sum waits for a late rank
    intervals = record(lambda: take_step(engine, *batch), runtime.device, before=together)
    engine.deepspeed.destroy()
    outcome = (tuple(result.loss for result in results), tuple(result.grad_norm for result in results), tuple(weights))
    return Way(outcome, hidden_shares(intervals, entry.model.num_layers))


def make_engine(
    entry: Entry, config: ThroughputConfig, mesh: ParallelMesh, runtime: Runtime, communicator: Communicator
) -> Engine:
    shares_vocabulary = config.parallel.shares_vocabulary(entry.model.vocab_size)
    units, vocabulary = even_share(entry.model, mesh.model_rank, shares_vocabulary)
    model = build_model(entry.model, 0, units, communicator, vocabulary)
    return Engine(model, config.training(mesh.data_size), mesh, runtime)


def random_batches(
    entry: Entry, config: ThroughputConfig, mesh: ParallelMesh, runtime: Runtime
) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and targets (B, T), the same for the ranks of a copy, without end."""
    generator = torch.Generator().manual_seed(mesh.data_rank)
    shape = (config.micro_batch_size, entry.model.context_length + 1)
    while True:
        tokens = torch.randint(entry.model.vocab_size, shape, generator=generator).to(runtime.device)
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def take_step(engine: Engine, input_ids: Tensor, targets: Tensor) -> None:
    engine.accumulate(input_ids, targets)
    engine.step(1e-3)


@contextmanager
def repeatable() -> Iterator[None]:
    """Deterministic kernels where PyTorch has them. New memory is not filled, which could hide a late read."""
    deterministic: Any = torch.utils.deterministic
    filled = deterministic.fill_uninitialized_memory
    deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        deterministic.fill_uninitialized_memory = filled


def digest(model: torch.nn.Module) -> str:
    found = hashlib.sha256()
    for weight in model.parameters():
        found.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def hidden_shares(intervals: Sequence[Interval], num_layers: int) -> tuple[float, float]:
    """The share of the time of the layers' all-reduces in which anything computes, and in which attention's kernels do.

    Between the start of such a sum and the wait for it stands the attention part of the layer alone, so what computes
    meanwhile belongs to it. A step of one micro-batch has them at fixed places: L - 1 of the layers and the conjunction
    forward, L - 1 and the embedding backward. Raises ValueError where the profile has fewer.
    """
    known = outermost(intervals)
    sums = sorted((i for i in known if i.kind == ALL_REDUCE), key=lambda i: i.start)
    sums = [i for i in sums if "reduce" in i.name.lower()]
    if len(sums) < 2 * num_layers:
        raise ValueError(f"the profile of a step has {len(sums)} all-reduces, and a Kraken has {2 * num_layers}")
    of_layers = union(sums[: num_layers - 1] + sums[num_layers : 2 * num_layers - 1])
    computing = union(i for i in known if i.kind not in COLLECTIVES)
    attending = union(i for i in known if i.kind == ATTENTION)
    whole = length(of_layers)
    return overlap(of_layers, computing) / whole, overlap(of_layers, attending) / whole
