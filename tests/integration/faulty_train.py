"""The real training command, except that something goes wrong on one of its ranks.

Usage: faulty_train.py FAULT RANK WHEN OVERRIDE...

FAULT is one of those below. WHEN is the step before which it strikes; for a fault of a save, which save it is.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch

from checkpoints import writer
from kraken_train.train import Trainer, main

SAVE_PHASES = {  # phase: (function, the rank that calls it, calls per save, whether it strikes before it)
    "before the tensors": ("write_tensors", 1, 1, True),
    "after the tensors": ("write_tensors", 1, 1, False),
    "before the manifest": ("write_synced", 0, 1, True),
    "before the rename": ("sync_folder", 0, 1, True),
    "before the pointer": ("replace_synced", 0, 1, True),
    "after the pointer": ("replace_synced", 0, 1, False),
}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def end_launcher() -> None:
    """SIGTERM to the `deepspeed` command: the parent of the parent of a rank."""
    psutil.Process().parent().parent().send_signal(signal.SIGTERM)  # type: ignore[union-attr]
    time.sleep(5)  # as if steps took long: these are so short that the run would be done before it has noticed


STEP_FAULTS: dict[str, Callable[[], None]] = {"stops": stop, "its launcher is told to end": end_launcher}


def before_step(step: int, action: Callable[[Trainer], None]) -> None:
    original = Trainer.train_step

    def train_step(self: Trainer) -> None:
        if self.step + 1 == step:
            action(self)
        original(self)

    Trainer.train_step = train_step  # type: ignore[method-assign]


def poison(trainer: Trainer) -> None:
    trainer.engine.model.final_norm.weight.register_hook(lambda gradient: gradient * math.nan)


def flip_bit(trainer: Trainer) -> None:
    trainer.engine.model.final_norm.weight.data.view(torch.int32)[0] ^= 1


def tell(trainer: Trainer) -> None:
    """No fault: what the settings have become."""
    model, writer = trainer.engine.model, trainer.checkpoints
    told = {
        "ranks of a copy": trainer.mesh.model_rank.size,
        "rows of the vocabulary": model.token_embedding.rows.count,
        "reduce dtype": str(getattr(model.exchange, "dtype", None)),
        "recompute": model.recompute,
        "compiled": model.layers[0].ffn._compiled_call_impl is not None,
        "zero stage": trainer.engine.deepspeed.zero_optimization_stage(),
        "asynchronous": writer.asynchronous,
    }
    print("told: " + json.dumps(told), flush=True)


def full_disk(trainer: Trainer) -> None:
    """From now on no file may grow beyond a few bytes, as on a disk that is full; and steps take long."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
    step = trainer.engine.step

    def slow_step(*arguments: Any, **keywords: Any) -> Any:
        time.sleep(1)
        return step(*arguments, **keywords)

    trainer.engine.step = slow_step  # type: ignore[method-assign]


TRAINER_FAULTS = {"sees a NaN": poison, "cannot write": full_disk, "has a bit flipped": flip_bit, "tells": tell}


def dying(function: Callable[..., Any], before: bool, fatal_call: int) -> Callable[..., Any]:
    calls = 0

    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fatal_call and before:
            die()
        result = function(*arguments, **keywords)
        if calls == fatal_call:
            die()
        return result

    return wrapper


def arrange(fault: str, when: int) -> None:
    if fault in SAVE_PHASES:
        name, _, calls, before = SAVE_PHASES[fault]
        setattr(writer, name, dying(getattr(writer, name), before, when * calls))
    elif fault in TRAINER_FAULTS:
        before_step(when, TRAINER_FAULTS[fault])
    else:
        before_step(when, lambda trainer: STEP_FAULTS[fault]())


if __name__ == "__main__":
    fault, rank, when = sys.argv[1], sys.argv[2], int(sys.argv[3])
    del sys.argv[1:4]
    if os.environ["RANK"] == rank:
        arrange(fault, when)
    main()
