"""On ranks: checkpoints of every grid and ZeRO stage, resumed on every other."""

from __future__ import annotations

from pathlib import Path

from checkpoints.training.retention import Retention
from checkpoints.training.store import find_good_checkpoint
from checkpoints.training.stored_tensors import StoredTensors
from checkpoints.training.writer import save_checkpoint
from kraken_train.parallel.ranks import Runtime
from kraken_train.training.engine import Engine
from parity.common import MODELS, Steps, make_engine, run_steps

SAVED_AT, MORE_STEPS = 3, 10
Mode = tuple[str, int, str]  # precision, ZeRO stage, optimizer: adamw, muon, or mup, which is AdamW with muP
MODES: tuple[Mode, ...] = (("fp32", 2, "adamw"), ("bf16", 1, "mup"), ("fp32", 1, "muon"), ("bf16", 2, "muon"))
MORE_MODES: tuple[Mode, ...] = (  # in the slow tests
    ("fp32", 1, "adamw"), ("bf16", 1, "adamw"), ("bf16", 2, "adamw"), ("fp32", 2, "mup"), ("fp32", 2, "muon"),
    ("bf16", 1, "muon"),
)  # fmt: skip
CONFIG = MODELS["kraken-4"]
RIVALS = ("ladder-modern", "fal", "track")


def make(runtime: Runtime, size: int, precision: str, zero_stage: int, optimizer: str) -> Engine:
    recipe = {"muon": optimizer == "muon", "mup": optimizer == "mup"}
    return make_engine(CONFIG, runtime, size, precision=precision, zero_stage=zero_stage, **recipe)


def save(runtime: Runtime, sizes: list[int], folder: Path, modes: tuple[Mode, ...]) -> dict[str, Steps]:
    """Train, save, and go on: the uninterrupted runs."""
    report = {}
    for size in sizes:
        for precision, zero_stage, optimizer in modes:
            name = f"{size}x{runtime.world_size // size}-{precision}-zero{zero_stage}-{optimizer}"
            engine = make(runtime, size, precision, zero_stage, optimizer)
            run_steps(engine, CONFIG, range(SAVED_AT))
            state = engine.state()
            report[name] = run_steps(engine, CONFIG, range(SAVED_AT, SAVED_AT + MORE_STEPS))
            save_checkpoint(folder / name, SAVED_AT, state, {}, Retention(1), runtime)  # late, as in the background
    return report


def resume(runtime: Runtime, sizes: list[int], folder: Path) -> dict[str, Steps]:
    """Go on from each checkpoint in `folder`, at each degree; the ZeRO stage is the other one where ranks differ."""
    report = {}
    for saved in sorted(path for path in folder.iterdir() if path.is_dir()):
        grid, precision, zero, optimizer = saved.name.split("-")
        checkpoint, _ = find_good_checkpoint(saved, runtime)
        for size in sizes:
            here = f"{size}x{runtime.world_size // size}"
            stage = int(zero[-1]) if here == grid else 3 - int(zero[-1])
            engine = make(runtime, size, precision, stage, optimizer)
            engine.load_state(StoredTensors(checkpoint).fill, SAVED_AT)
            engine.verify_replicas()
            report[f"{saved.name} {here}"] = run_steps(engine, CONFIG, range(SAVED_AT, SAVED_AT + MORE_STEPS))
    return report


def other_architectures(runtime: Runtime, folder: Path) -> dict[str, dict[str, Steps]]:
    """By model: steps after a checkpoint of two ranks a copy, uninterrupted and resumed by other numbers of ranks."""
    report = {}
    for name in RIVALS:
        config, steps = MODELS[name], range(2, 2 + MORE_STEPS // 2)
        engine = make_engine(config, runtime, 2)
        run_steps(engine, config, range(2))
        save_checkpoint(folder / name, 2, engine.state(), {}, Retention(1), runtime)
        report[name] = {"2": run_steps(engine, config, steps)}
        checkpoint, _ = find_good_checkpoint(folder / name, runtime)
        for size in (1, runtime.world_size):
            engine = make_engine(config, runtime, size, zero_stage=2)
            engine.load_state(StoredTensors(checkpoint).fill, 2)
            engine.verify_replicas()
            report[name][str(size)] = run_steps(engine, config, steps)
    return report
