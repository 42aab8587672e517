"""On ranks: the memory, by PyTorch's tracker, and the collectives of small models that the real engine trains.

`kraken_train.planning` predicts both. The bytes and collectives are those of the first rank.
"""

from __future__ import annotations

import gc
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode

from kraken_train.model.config import GPTConfig, KrakenConfig, ModelConfig
from kraken_train.model.fal_config import FALConfig
from kraken_train.model.ladder_config import LadderConfig
from kraken_train.model.registry import build_model, even_share
from kraken_train.model.track_config import TrackConfig
from kraken_train.parallel.distributed import make_communicator
from kraken_train.parallel.ranks import Runtime
from kraken_train.planning.layout import TrainingLayout
from kraken_train.settings.loss import DistillConfig
from kraken_train.training import optim
from kraken_train.training.engine import Engine
from kraken_train.training.optim import LARGEST_BUCKET_DURING_BACKWARD
from kraken_train.training.precision import reduce_dtype
from kraken_train.training.teacher import Teacher
from parity.common import make_mesh, settings

COMMON = {"num_layers": 4, "context_length": 128, "vocab_size": 4096}
KRAKEN = KrakenConfig(num_sub_layers=4, hidden_size=128, heads_per_sub_layer=2, **COMMON)
STANDARD = GPTConfig(hidden_size=256, num_heads=4, **COMMON)
LADDER = LadderConfig(hidden_size=256, num_heads=4, **COMMON)
FAL = FALConfig(hidden_size=256, num_heads=4, **COMMON)
TRACK = TrackConfig(4, hidden_size=128, heads_per_track=2, sync_every=2, **COMMON)
PARALLEL = replace(STANDARD, architecture="parallel")
SHORT = replace(KRAKEN, context_length=16)  # so that activations are next to nothing
KINDS = {  # PyTorch's names
    "allreduce_": "all-reduce", "_allgather_base_": "all-gather", "broadcast_": "broadcast",
    "alltoall_base_": "all-to-all", "_reduce_scatter_base_": "reduce-scatter",
}  # fmt: skip
BUCKET = 300_000  # of gradients; the largest has 524,288
LEAST_BYTES = 2048  # of the collectives that are counted


@dataclass(frozen=True)
class Case:
    """A training; `with_bucket` is entered where it is measured and where it is predicted."""

    model: ModelConfig
    ranks: int
    sub_layer_parallel_size: int = 1
    zero_stage: int = 1
    activation_checkpointing: bool = False
    precision: str = "bf16"
    vocab_parallel: bool = False
    micro_batch_size: int = 4
    accumulation_steps: int = 2
    optim: str = "adamw"
    bucket: int | None = None  # in place of LARGEST_BUCKET_DURING_BACKWARD
    teacher: ModelConfig | None = None

    @property
    def layout(self) -> TrainingLayout:
        return TrainingLayout(
            self.sub_layer_parallel_size, self.ranks // self.sub_layer_parallel_size, self.micro_batch_size,
            self.accumulation_steps, self.zero_stage, self.activation_checkpointing, self.vocab_parallel,
            self.precision, self.optim, self.teacher,
        )  # fmt: skip

    @contextmanager
    def with_bucket(self) -> Iterator[None]:
        with mock.patch.object(optim, "LARGEST_BUCKET_DURING_BACKWARD", self.bucket or LARGEST_BUCKET_DURING_BACKWARD):
            yield


# Wider than the model, and able to read more tokens.
TEACHER = replace(STANDARD, hidden_size=512, num_heads=8, context_length=160, num_layers=5)
SHORT_CASE = {"model": SHORT, "micro_batch_size": 1}
CASES = {
    "kraken": Case(KRAKEN, 1),
    "kraken-recompute": Case(KRAKEN, 1, activation_checkpointing=True),
    "standard-fp32": Case(STANDARD, 1, precision="fp32", accumulation_steps=1),
    "short": Case(ranks=1, **SHORT_CASE),
    "short-once": Case(ranks=1, accumulation_steps=1, **SHORT_CASE),
    "short-fp32": Case(ranks=1, precision="fp32", **SHORT_CASE),
    "kraken-2": Case(KRAKEN, 2, 2),
    "kraken-2-copies-zero2": Case(KRAKEN, 2, 1, zero_stage=2),
    "kraken-2-recompute-zero2": Case(KRAKEN, 2, 2, zero_stage=2, activation_checkpointing=True),
    "kraken-2-vocabulary": Case(KRAKEN, 2, 2, vocab_parallel=True, micro_batch_size=2),
    "distilled": Case(KRAKEN, 1, teacher=TEACHER),
    "distilled-2-recompute-vocabulary": Case(
        KRAKEN, 2, 2, activation_checkpointing=True, vocab_parallel=True, teacher=TEACHER
    ),
    "distilled-2-copies-fp32-of-track": Case(KRAKEN, 2, precision="fp32", teacher=TRACK),
    "standard-2": Case(STANDARD, 2, 2),
    "ladder-2": Case(LADDER, 2, 2),
    "ladder-hybrid-2-recompute": Case(replace(LADDER, ladder_layers=2), 2, 2, activation_checkpointing=True),
    "fal-2": Case(FAL, 2, 2),
    "track-2": Case(TRACK, 2, 2),
    "track-2-recompute": Case(TRACK, 2, 2, activation_checkpointing=True),
    "standard-2-copies-zero2-fp32": Case(STANDARD, 2, 1, zero_stage=2, precision="fp32"),
    "standard-2-recompute": Case(STANDARD, 2, 2, activation_checkpointing=True),
    "parallel-2-recompute": Case(PARALLEL, 2, 2, activation_checkpointing=True),
    "short-2-copies": Case(ranks=2, **SHORT_CASE),
    "short-2-copies-zero2": Case(ranks=2, zero_stage=2, **SHORT_CASE),
    "short-2-copies-zero2-once": Case(ranks=2, zero_stage=2, accumulation_steps=1, **SHORT_CASE),
    "short-2-copies-fp32": Case(ranks=2, precision="fp32", **SHORT_CASE),
    "short-2-copies-fp32-once": Case(ranks=2, precision="fp32", accumulation_steps=1, **SHORT_CASE),
    "short-2-copies-zero2-fp32": Case(ranks=2, zero_stage=2, precision="fp32", **SHORT_CASE),
    "buckets": Case(KRAKEN, 2, 1, zero_stage=2, bucket=BUCKET),
    "buckets-once": Case(KRAKEN, 2, 1, zero_stage=2, accumulation_steps=1, bucket=BUCKET),
    "short-buckets": Case(ranks=2, zero_stage=2, bucket=BUCKET, **SHORT_CASE),
    "short-buckets-once": Case(ranks=2, zero_stage=2, accumulation_steps=1, bucket=BUCKET, **SHORT_CASE),
    "short-buckets-fp32": Case(ranks=2, zero_stage=2, precision="fp32", bucket=BUCKET, **SHORT_CASE),
    "short-buckets-fp32-once": Case(
        ranks=2, zero_stage=2, precision="fp32", accumulation_steps=1, bucket=BUCKET, **SHORT_CASE
    ),
    "kraken-4": Case(KRAKEN, 4, 4),
    "kraken-4-of-2-zero2": Case(KRAKEN, 4, 2, zero_stage=2, vocab_parallel=True),
    "kraken-4-of-2-fp32-recompute": Case(KRAKEN, 4, 2, precision="fp32", activation_checkpointing=True),
    "standard-4-of-2-recompute": Case(STANDARD, 4, 2, activation_checkpointing=True),
    "parallel-4": Case(PARALLEL, 4, 4),
    "muon": Case(ranks=1, optim="muon", **SHORT_CASE),
    "muon-fp32": Case(ranks=1, optim="muon", precision="fp32", **SHORT_CASE),
    "muon-2-copies-zero2": Case(ranks=2, optim="muon", zero_stage=2, **SHORT_CASE),
    "muon-2-copies-zero2-fp32": Case(ranks=2, optim="muon", zero_stage=2, precision="fp32", **SHORT_CASE),
    "muon-2-copies-once": Case(ranks=2, optim="muon", accumulation_steps=1, **SHORT_CASE),
    "muon-2-copies-fp32-once": Case(ranks=2, optim="muon", accumulation_steps=1, precision="fp32", **SHORT_CASE),
    "muon-standard-2": Case(replace(STANDARD, context_length=16), 2, 2, optim="muon", micro_batch_size=1),
    "muon-parallel-4-of-2": Case(replace(PARALLEL, context_length=16), 4, 2, optim="muon", micro_batch_size=1),
}
QUICK = (
    "kraken-2-copies-zero2",
    "short-buckets",
    "standard-2-recompute",
    "distilled-2-recompute-vocabulary",
    "ladder-2",
    "kraken-4-of-2-zero2",
    "muon-2-copies-zero2",
    "muon-parallel-4-of-2",
)


def run(runtime: Runtime, quick: bool) -> dict[str, Any]:
    here = [name for name, case in CASES.items() if case.ranks == runtime.world_size and (name in QUICK) == quick]
    return {name: measure(runtime, CASES[name]) for name in here}


def measure(runtime: Runtime, case: Case) -> dict[str, Any]:
    layout = case.layout
    plain = settings(
        case.precision, case.zero_stage, case.sub_layer_parallel_size, layout.data_parallel_size, case.vocab_parallel,
        activation_checkpointing=case.activation_checkpointing, muon=layout.with_muon,
    )  # fmt: skip
    train = replace(plain, micro_batch_size=case.micro_batch_size, global_batch_size=layout.global_batch_size)
    gc.collect()
    before = alive()
    mesh = make_mesh(runtime, case.sub_layer_parallel_size)
    units, vocabulary = even_share(case.model, mesh.model_rank, case.vocab_parallel)
    model = build_model(case.model, 0, units, make_communicator(mesh, reduce_dtype(train.parallel)), vocabulary)
    with case.with_bucket():
        engine = Engine(model, train, mesh, runtime)
    if case.teacher is not None:
        units, vocabulary = even_share(case.teacher, mesh.model_rank, case.vocab_parallel)
        teacher = build_model(case.teacher, 1, units, model.communicator, vocabulary).to(layout.dtype)
        engine.teacher = Teacher(teacher, DistillConfig())  # not frozen, for the tracker's hooks
    tokens = torch.randint(case.model.vocab_size, (case.micro_batch_size, case.model.context_length + 1))
    gc.collect()
    tracker, counter = MemTracker(), CollectiveCounter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tracker.track_external(*(tensor for place, tensor in alive().items() if place not in before))
        held = total(tracker, "current")
        with tracker, counter:
            for _ in range(case.accumulation_steps):
                tracker.reset_mod_stats()  # of its modules; the peak stays
                engine.accumulate(tokens[:, :-1], tokens[:, 1:])
            engine.step(1e-3)
    return {
        "state": held,
        "peak": total(tracker, "peak"),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "collectives": sorted([*key, number] for key, number in counter.count.items()),
    }


class CollectiveCounter(TorchDispatchMode):
    """Counts collectives by kind and bytes: of the whole, in an all-gather and a reduce-scatter; of an all-to-all, what
    comes from other ranks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith("c10d::"):
            kind = KINDS.get(name.removeprefix("c10d::"), name)
            first = args[1 if kind == "reduce-scatter" else 0]  # all that is summed, not the part of it
            size = sum(tensor.nbytes for tensor in (first if isinstance(first, list | tuple) else [first]))
            if kind == "all-to-all":
                size -= args[3][dist.get_rank()] * first.itemsize
            if size >= LEAST_BYTES:
                self.count[kind, size] += 1
        return func(*args, **(kwargs or {}))


def alive() -> dict[int, torch.Tensor]:
    """A tensor for each storage that is in use, by its address."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    return {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors if tensor.device.type == "cpu"}


def total(tracker: MemTracker, which: str) -> int:
    return sum(parts["Total"] for parts in tracker.get_tracker_snapshot(which).values())
