"""Saves of a model in training, in rounds that each hold one of every kind, on this rank."""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

from checkpoints.training.background import CheckpointWriter
from checkpoints.training.manifest import read_manifest, step_folders
from checkpoints.training.retention import Retention
from kraken_train.bench.throughput_config import Entry, ThroughputConfig
from kraken_train.bench.throughput_run import ModelInTraining, closing, make_mesh, make_samples
from kraken_train.parallel.ranks import Runtime

SYNCHRONOUS, ASYNCHRONOUS = "synchronous", "asynchronous"


@dataclass(frozen=True)
class Times:
    """Seconds of a save and of what follows it."""

    stall: float  # from the end of a step until the next one may begin
    steps: float  # of the steps after the save
    rest: float  # for which a write in the background then still goes on; the next save would wait for it

    @property
    def total(self) -> float:
        return self.stall + self.steps + self.rest


@dataclass(frozen=True)
class Measured:
    rounds: Mapping[str, Sequence[Times]]  # by kind of save; an entry per round, each time that of the slowest rank
    checkpoint_bytes: int  # of all files


def measure(entry: Entry, config: ThroughputConfig, output_dir: Path, runtime: Runtime) -> Measured:
    """The checkpoints are written to a new folder in `output_dir`, which is deleted at the end. A collective."""
    mesh = make_mesh(config.parallel, runtime)
    rounds: dict[str, list[Times]] = {SYNCHRONOUS: [], ASYNCHRONOUS: []}
    with ExitStack() as held:
        folder = held.enter_context(new_folder(output_dir, runtime))
        samples = make_samples(entry.model, None)
        model = held.enter_context(closing(ModelInTraining(entry, config, samples, mesh, runtime)))
        writers = {
            kind: held.enter_context(
                CheckpointWriter(folder, Retention(keep=1), runtime, asynchronous=kind == ASYNCHRONOUS)
            )
            for kind in rounds
        }
        step = 0
        for number in range(-1, config.rounds):  # the first one does not count
            for kind in random.Random(number).sample(list(writers), len(writers)):
                step += 1
                times = one_save(model, writers[kind], step, config.steps, runtime)
                if number >= 0:
                    rounds[kind].append(times)
            if runtime.is_first and number >= 0:
                print(f"round {number + 1}/{config.rounds}", flush=True)
        checkpoint_bytes = runtime.on_first(lambda: newest_bytes(folder))
    return Measured(rounds, checkpoint_bytes)


def one_save(model: ModelInTraining, writer: CheckpointWriter, step: int, steps: int, runtime: Runtime) -> Times:
    """What `Trainer.save` does, and steps after it; the times of the slowest rank."""
    model.step()
    model.engine.results()
    model.synchronize()
    runtime.sum([0.0])  # the ranks begin together
    begin = time.perf_counter()
    model.engine.verify_replicas()
    writer.save(step, model.engine.state(), {"step": step})
    saved = time.perf_counter()
    for _ in range(steps):
        model.step()
    model.engine.results()
    model.synchronize()
    trained = time.perf_counter()
    writer.finish()
    own = Times(saved - begin, trained - saved, time.perf_counter() - trained)
    return Times(*map(max, zip(*map(astuple, runtime.gather(own)), strict=True)))


def newest_bytes(folder: Path) -> int:
    """Bytes of the newest checkpoint, as its manifest lists them."""
    return sum(entry["bytes"] for entry in read_manifest(step_folders(folder)[-1]).files.values())


@contextmanager
def new_folder(parent: Path, runtime: Runtime) -> Iterator[Path]:
    """The same on all ranks; deleted at the end."""
    folder = Path(runtime.on_first(lambda: tempfile.mkdtemp(prefix="checkpoints-", dir=parent)))
    try:
        yield folder
    finally:
        if runtime.is_first:
            shutil.rmtree(folder, ignore_errors=True)
