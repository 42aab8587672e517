"""Started on two ranks: training speed with one model made slow on purpose, and the two engines' losses.

Usage: throughput_ranks.py FOLDER. Rank 0 writes throughput.json and throughput.png, and checks.json with the rest.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from parity.common import MODELS, make_mesh, run_steps, settings, share_of_rank

from kraken_train.bench import throughput, throughput_run
from kraken_train.bench.plain_engine import PlainEngine
from kraken_train.bench.throughput_config import ThroughputConfig
from kraken_train.common.cli import CONF_DIR
from kraken_train.common.settings import from_hydra
from kraken_train.model.config import GPTConfig
from kraken_train.model.language_model import LanguageModel
from kraken_train.model.registry import build_model, even_share
from kraken_train.parallel import step_timer
from kraken_train.parallel.distributed import make_communicator
from kraken_train.parallel.ranks import Runtime, read_runtime
from kraken_train.parallel.step_timer import StepTimer
from kraken_train.training.engine import Engine, start_processes, stop_processes
from kraken_train.training.precision import reduce_dtype

SLOWED_BY = 100.0  # seconds per micro-batch, which nothing really takes
TINY = ("vocab_size=512", "context_length=32", "micro_batch_size=2", "gradient_accumulation_steps=2", "steps=1",
        "precision=fp32", "engine.compile=false")  # fmt: skip
STEPS = 4


def configure(folder: Path, *overrides: str) -> ThroughputConfig:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return from_hydra(compose("throughput", [*TINY, f"output_dir={folder}", *overrides]), ThroughputConfig)


class Clock:
    """In place of the module `time`: real time, and what was added to it."""

    added = 0.0

    def perf_counter(self) -> float:
        return time.perf_counter() + self.added


CLOCK = Clock()


def slowed(*arguments: Any) -> LanguageModel:
    """The model as it is, but a baseline's forward pass takes SLOWED_BY more on the clock."""
    model = build_model(*arguments)

    def take_long(*_: Any) -> None:
        CLOCK.added += SLOWED_BY

    if isinstance(arguments[0], GPTConfig):
        model.layers[0].attention.register_forward_pre_hook(take_long)
    return model


def losses(runtime: Runtime, size: int, precision: str) -> dict[str, list[float]]:
    """Of the same training by both engines, `size` ranks sharing a model."""
    config, mesh = MODELS["kraken-4"], make_mesh(runtime, size)
    train = settings(precision, sub_layer_parallel_size=size, data_parallel_size=mesh.data_size)

    def model() -> LanguageModel:
        units, vocabulary = even_share(config, mesh.model_rank)
        return build_model(config, 0, units, make_communicator(mesh, reduce_dtype(train.parallel)), vocabulary)

    plain = PlainEngine(model(), train, mesh, runtime, StepTimer(runtime.device))
    for step in range(STEPS):
        for mine in share_of_rank(plain, config, step):
            plain.accumulate(mine[:, :-1], mine[:, 1:])
        plain.step(train.optim.lr)
    means = [total / runtime.world_size for total in runtime.sum(plain.results())]
    real = run_steps(Engine(model(), train, mesh, runtime), config, range(STEPS))
    return {"torch": means, "deepspeed": [loss for loss, *_ in real]}


def main() -> None:
    folder, runtime = Path(sys.argv[1]), read_runtime()
    start_processes(runtime)
    throughput_run.build_model = slowed
    throughput_run.time = step_timer.time = CLOCK  # type: ignore[assignment]
    config = configure(
        folder, "rounds=3", "models=[kraken-tiny-4way,gpt-tiny]", "engines=[deepspeed,torch]",
        "parallel.sub_layer_parallel_size=2",
    )  # fmt: skip
    results = throughput.run(config, config.entries(), runtime)
    if runtime.is_first:
        throughput.report(results, config, runtime)
    throughput_run.build_model = build_model
    throughput_run.fit_together = lambda *_: False
    config = configure(folder, "rounds=2", "models=[kraken-tiny-2way]")
    apart = throughput.run(config, config.entries(), runtime)
    checks = {
        "apart": [result.to_dict() for result in apart],
        "losses": {f"{size} {p}": losses(runtime, size, p) for size, p in ((1, "bf16"), (2, "fp32"))},
    }
    if runtime.is_first:
        (folder / "checks.json").write_text(json.dumps(checks))
    stop_processes(runtime)


if __name__ == "__main__":
    main()
