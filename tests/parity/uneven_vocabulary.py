"""On four ranks: checkpoints of a model whose vocabulary its ranks cannot divide evenly, read at other degrees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checkpoints.training.retention import Retention
from checkpoints.training.store import find_good_checkpoint
from checkpoints.training.stored_tensors import StoredTensors
from checkpoints.training.writer import save_checkpoint
from kraken_train.parallel.ranks import Runtime
from parity.common import MODELS, make_engine, run_steps, same, whole_state

CONFIG = MODELS["uneven-vocabulary"]
STEPS = 2
SIZES = (4, 2, 1)  # ranks of a copy


def run(runtime: Runtime, folder: Path) -> dict[str, Any]:
    """Whether a state is the same to the bit after it was saved at one degree and loaded at another."""
    runtime.on_first(lambda: folder.mkdir(exist_ok=True))
    engines = {
        size: make_engine(CONFIG, runtime, size, precision="bf16", zero_stage=1 + size % 2, vocab_parallel=None)
        for size in SIZES
    }
    report: dict[str, Any] = {
        "rows": {
            str(size): runtime.gather(engine.model.token_embedding.weight.shape[0]) for size, engine in engines.items()
        }
    }
    for saved in SIZES:
        run_steps(engines[saved], CONFIG, range(STEPS))
        expected = whole_state(engines[saved])
        save_checkpoint(folder / str(saved), STEPS, engines[saved].state(), {}, Retention(1), runtime)
        checkpoint, _ = find_good_checkpoint(folder / str(saved), runtime)
        report[f"{saved}, read whole"] = same(StoredTensors(checkpoint).read(), expected)
        for loaded, engine in engines.items():
            if loaded != saved:
                engine.load_state(StoredTensors(checkpoint).fill, STEPS)
                engine.verify_replicas()
                report[f"{saved} -> {loaded}"] = same(whole_state(engine), expected)
    return report
