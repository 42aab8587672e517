"""Started on four ranks: engines on two to four of them against the whole model, and what all ranks must agree on.

Usage: serving_ranks.py FOLDER, which has the exports that `CASES` names; rank 0 writes report.json there.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from helpers import random_ids, small_configs
from torch import Tensor

from checkpoints.exports.folder import read_export
from kraken_train.common.errors import CheckpointError, KrakenError
from kraken_train.inference.engine import ExecutionConfig, InferenceEngine
from kraken_train.inference.generation import continue_prompts
from kraken_train.inference.loading import load_part, share_model
from kraken_train.inference.ranks import on_all, started_ranks
from kraken_train.inference.sampling import Sampling
from kraken_train.inference.serving import start_engine
from kraken_train.model.config import GPTConfig, KrakenConfig, ModelConfig
from kraken_train.model.fal_config import FALConfig
from kraken_train.model.ladder_config import LadderConfig
from kraken_train.model.track_config import TrackConfig
from kraken_train.parallel.distributed import DistributedCommunicator
from kraken_train.parallel.ranks import Runtime
from kraken_train.parallel.sharding import ModelRank
from kraken_train.parallel.symmetric import Links, SymmetricCommunicator, SymmetricExchange

STEPS = 64
LENGTHS = [5, 1, 3]  # of prompts
NUM_LAYERS = 2
COMMON = {"num_layers": NUM_LAYERS, "vocab_size": 131, "context_length": 72}  # 131 is prime: no even share of the head
ATTENTION = {"mha": None, "gqa": 2, "mqa": 1}  # key-value heads
CONFIGS: dict[str, ModelConfig] = {
    **{f"kraken-4-{kind}": KrakenConfig(4, hidden_size=16, heads_per_sub_layer=4, kv_heads_per_sub_layer=kv_heads,
                                        **COMMON)
       for kind, kv_heads in ATTENTION.items()},
    **{f"{form}-{kind}": GPTConfig(hidden_size=32, num_heads=8, num_kv_heads=kv_heads, architecture=form, **COMMON)
       for form in ("standard", "parallel") for kind, kv_heads in ATTENTION.items()},
    "kraken-6": KrakenConfig(6, hidden_size=16, heads_per_sub_layer=2, **COMMON),
    "ladder-gqa": LadderConfig(hidden_size=32, num_heads=8, num_kv_heads=2, **COMMON),
    "fal-gqa": FALConfig(hidden_size=32, num_heads=8, num_kv_heads=2, **COMMON),
    "track-gqa": TrackConfig(4, hidden_size=16, heads_per_track=4, kv_heads_per_track=2, sync_every=1, **COMMON),
    "track-2": TrackConfig(4, hidden_size=16, heads_per_track=2, sync_every=2, **COMMON),
    "ladder-hybrid": LadderConfig(hidden_size=32, num_heads=8, ladder_layers=1, **COMMON),
    "small": small_configs(vocab_size=384, context_length=72)["kraken"],
}  # fmt: skip
SHARED = ("kraken-4-mha", "standard-mha", "ladder-gqa", "ladder-hybrid")  # whose sums are made without the library
Case = tuple[str, tuple[float, ...]]  # a model and the speeds of the devices
CASES: list[Case] = [  # one device is in test_inference_engine.py
    *[(f"kraken-4-{kind}", (1.0,) * devices) for kind in ATTENTION for devices in (2, 4, 3)],
    *[(f"{form}-{kind}", (1.0,) * devices)
      for form in ("standard", "parallel") for kind in ATTENTION for devices in (2, 4)],
    ("kraken-6", (1.0, 1.0, 1.0, 1.0)),
    ("kraken-6", (1.0, 1.0, 0.5)),
    ("standard-mqa", (1.0, 1.0, 0.5)),
    *[("ladder-gqa", (1.0,) * devices) for devices in (2, 4)],
    ("ladder-hybrid", (1.0, 1.0, 0.5)),
    *[("track-gqa", (1.0,) * devices) for devices in (2, 4, 3)],
    ("track-2", (1.0, 1.0)),
    *[("fal-gqa", (1.0,) * devices) for devices in (2, 4)],
    ("golden", (1.0, 1.0, 1.0)),
    ("golden", (1.0, 1.0, 1.0, 1.0)),
]  # fmt: skip


def case_name(case: Case) -> str:
    return f"{case[0]} {list(case[1])}"


class CountingCommunicator(DistributedCommunicator):
    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group, collective=self.count)
        self.sums = self.gathers = self.gathered_bytes = 0

    def count(self, *arguments: Any, **settings: Any) -> Any:
        self.sums += 1
        return dist.all_reduce(*arguments, **settings)

    def gather(self, part: Tensor) -> Tensor:
        self.gathers += 1
        self.gathered_bytes += part.nbytes
        return super().gather(part)


def serve(folder: Path, case: Case, group: dist.ProcessGroup) -> dict[str, Any]:
    """Errors against the whole model in one process, and the collectives of a prompt and of a new token."""
    name, speeds = case
    export = read_export(folder / name)
    communicator = CountingCommunicator(group)
    units = share_model(export.config, speeds)[group.rank()]
    model = load_part(export, units, communicator, torch.float32, torch.device("cpu"))
    steps = min(STEPS, export.config.context_length - max(LENGTHS))
    engine = InferenceEngine(model, len(LENGTHS), max(LENGTHS) + steps)
    ids = random_ids(export.config, len(LENGTHS), max(LENGTHS) + steps)
    expected = export.load_model()(ids).detach()
    logits = [engine.prefill(ids[:, : max(LENGTHS)], torch.tensor(LENGTHS))]
    collectives = [(communicator.sums, communicator.gathers)]
    for step in range(steps):
        logits.append(engine.decode(ids[range(len(LENGTHS)), [length + step for length in LENGTHS]]))
    collectives.append((communicator.sums - collectives[0][0], communicator.gathers - collectives[0][1]))
    wanted = torch.stack(
        [expected[range(len(LENGTHS)), [length - 1 + step for length in LENGTHS]] for step in range(steps + 1)]
    )
    found = torch.stack(logits)
    everywhere = [torch.empty_like(found) for _ in speeds]
    dist.all_gather(everywhere, found, group=group)
    return {
        "units": units.count,
        "error": float((found - wanted).abs().max() / wanted.abs().max()),
        "equal": all(torch.equal(other, found) for other in everywhere),
        "prefill": collectives[0],
        "decode": [total / steps for total in collectives[1]],
        "most_likely": most_likely_on(engine),
    }


def most_likely_on(engine: InferenceEngine) -> dict[str, Any]:
    """Choices without gathered logits against those from them, with equal logits, and a NaN on the last rank."""
    place = engine.model.communicator.model_rank
    total = engine.model.token_embedding.rows.total
    hidden = torch.randn(len(LENGTHS), engine.head.weight.shape[1], generator=torch.Generator().manual_seed(0))
    hidden[1] = 0  # all logits are equal
    communicator = engine.model.communicator
    assert isinstance(communicator, CountingCommunicator)
    equal = []
    for words in (None, total - 1, 40, 1):  # the last ranks have none of the first 40
        communicator.gathers = communicator.gathered_bytes = 0
        chosen = engine.most_likely(hidden, words)
        moved = (communicator.gathers, communicator.gathered_bytes)
        equal.append(chosen.ids.equal(engine.logits(hidden)[:, :words].argmax(dim=-1)) and bool(chosen.finite.all()))
    # Its rows are a view of the embedding, which is used no more.
    if place.rank == place.size - 1:
        engine.head.weight[0] = torch.nan
    return {"equal": equal, "moved": moved, "finite": engine.most_likely(hidden, 1).finite.tolist()}


class SharedByGloo:
    """Stands for memory that all ranks see, of which a kernel makes the sum."""

    def __init__(self, group: dist.ProcessGroup, used: list[str]) -> None:
        self.group, self.used = group, used

    def sum(self, values: Tensor, algorithm: str) -> None:
        self.used.append(algorithm)
        dist.all_reduce(values, group=self.group)


class AtOnce:
    """Stands for a stream."""

    def begin(self, work: Callable[[], None]) -> SimpleNamespace:
        work()
        return SimpleNamespace(wait=lambda: None)


def serve_over_shared_memory(folder: Path, name: str, group: dist.ProcessGroup) -> dict[str, Any]:
    """The same logits as over the library, and the algorithms of a prompt, then of a most likely token."""
    export, waited, overlapped = read_export(folder / name), [], []
    place = ModelRank(group.rank(), group.size())
    exchange = SymmetricExchange(
        Links(group.size(), multicast=True), SharedByGloo(group, waited), SharedByGloo(group, overlapped), AtOnce()
    )
    units = share_model(export.config, [1.0] * place.size)[place.rank]
    ids, lengths, found = random_ids(export.config, 2, 12), torch.tensor([12, 5]), []
    for communicator in (DistributedCommunicator(group), SymmetricCommunicator(group, exchange)):
        model = load_part(export, units, communicator, torch.float32, torch.device("cpu"))
        engine = InferenceEngine(model, 2, 16)
        hidden = engine.read_prompts(ids, lengths)
        found += [hidden, engine.logits(hidden), engine.most_likely(hidden).ids]
    algorithms = {"waited": list(waited), "overlapped": list(overlapped)}
    return {"equal": [one.equal(other) for one, other in zip(found[:3], found[3:], strict=True)], **algorithms}


def generate_on_all(folder: Path, runtime: Runtime) -> dict[str, Any]:
    """Texts by the sampling settings, as each rank has them, on four unequal devices."""
    export = read_export(folder / "kraken-6")
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6], [5]]
    engine = start_engine(
        export,
        runtime,
        (1.0, 0.5, 1.0, 0.25),
        batch_size=3,
        prompt_tokens=5,
        max_new_tokens=20,
        dtype=torch.float32,
        execution=ExecutionConfig(),
    )
    return {
        str(temperature): runtime.gather(continue_prompts(engine, prompts, 20, Sampling(temperature, seed=5)))
        for temperature in (0.0, 1.0, 3.0)
    }


def fails_on_rank_2(runtime: Runtime) -> list[str]:
    """The error on each rank when one of them cannot read its part."""

    def function() -> str:
        if runtime.rank == 2:
            raise CheckpointError("e/model.safetensors cannot be read")
        return "read"

    try:
        message = on_all(runtime, function)
    except KrakenError as error:
        message = f"{type(error).__name__}: {error}"
    return runtime.gather(message)


def check(folder: Path, runtime: Runtime) -> dict[str, Any]:
    groups = {size: dist.new_group(list(range(size))) for size in (2, 3, 4)}
    cases, started = {}, time.monotonic()
    for case in CASES:
        if runtime.rank < len(case[1]):
            cases[case_name(case)] = serve(folder, case, groups[len(case[1])])
    if runtime.is_first:
        print(f"{len(CASES)} cases: {time.monotonic() - started:.1f} s", flush=True)
    shared = {name: serve_over_shared_memory(folder, name, groups[4]) for name in SHARED}
    return {
        "shared": runtime.gather(shared),
        "cases": runtime.gather(cases),
        "texts": generate_on_all(folder, runtime),
        "failure": fails_on_rank_2(runtime),
    }


def main() -> None:
    folder = Path(sys.argv[1])
    with started_ranks() as runtime:
        report = check(folder, runtime)
    if runtime.is_first:
        (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
