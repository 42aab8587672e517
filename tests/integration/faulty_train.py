"""The real training command, except that something goes wrong on one of its ranks.

Usage: faulty_train.py FAULT RANK WHEN OVERRIDE...  (RANK may be `all`)

FAULT is one of those below. WHEN is the step before which it strikes; for a fault of a save, which save it is; for one
of the data, the step that first reads bad ones in a run that is never rolled back.
"""

from __future__ import annotations

import json
import math
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import psutil
import torch
from torch.distributed.tensor import DTensor

from checkpoints.training import staging, stored_tensors, writer
from checkpoints.training.background import CheckpointWriter
from checkpoints.training.manifest import Checkpoint
from checkpoints.training.store import find_good_checkpoint
from checkpoints.training.stored_tensors import StoredTensors
from kraken_train.data.dataset import Samples
from kraken_train.health.loss_monitor import Trouble
from kraken_train.train import main
from kraken_train.training import precision
from kraken_train.training.trainer import Trainer

SLOW_STEPS, SLOW_SECONDS = 10, 100.0  # on a clock on which a forward pass takes 1 second otherwise
BAD_STEPS = 3
SAVE_PHASES = {  # phase: (function, the rank that calls it, calls per save, whether it strikes before it)
    "before the tensors": ("write_tensors", 1, 1, True),
    "after the tensors": ("write_tensors", 1, 1, False),
    "before the manifest": ("write_synced", 0, 1, True),
    "before the rename": ("sync_folder", 0, 1, True),
    "before the pointer": ("replace_synced", 0, 1, True),
    "after the pointer": ("replace_synced", 0, 1, False),
}
STAGE_PHASES = {  # likewise, with checkpoint.stage_dir, in checkpoints.training.staging
    "before it is named": ("write_record", 0, 1, True),
    "before the copy": ("copy_synced", 1, 1, True),
    "after the copy": ("copy_synced", 1, 1, False),
}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


PROCESSORS = {"has native bf16": {"avx512_bf16"}, "has no native bf16": {"avx512f"}}
STEP_FAULTS: dict[str, Callable[[], None]] = {"stops": stop}


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
        "reduce dtype": str(getattr(model.communicator, "dtype", None)),
        "recompute": model.recompute,
        "compiled": model.layers[0].ffn._compiled_call_impl is not None,
        "zero stage": trainer.engine.deepspeed.zero_optimization_stage(),
        "asynchronous": writer.asynchronous,
    }
    print("told: " + json.dumps(told), flush=True)


def end_launcher(trainer: Trainer) -> None:
    """SIGTERM to the `deepspeed` command, the parent of the parent of a rank; the step begins once that is noticed."""
    psutil.Process().parent().parent().send_signal(signal.SIGTERM)  # type: ignore[union-attr]
    while not trainer.stop.requested:
        time.sleep(0.05)


def full_disk(trainer: Trainer) -> None:
    """From now on no file may grow beyond a few bytes, as on a disk that is full; and steps take as long as saves."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
    step = trainer.engine.step

    def slow_step(*arguments: Any, **keywords: Any) -> Any:
        if trainer.checkpoints.under_way is not None:
            trainer.checkpoints.under_way.join()
        return step(*arguments, **keywords)

    trainer.engine.step = slow_step  # type: ignore[method-assign]


def slow_down(trainer: Trainer) -> None:
    """For SLOW_STEPS the forward pass of rank 1 takes longer, on a clock that nothing else moves."""
    forward, until, clock = trainer.engine.deepspeed.forward, trainer.step + SLOW_STEPS, 0.0

    def timed_forward(*arguments: Any, **keywords: Any) -> Any:
        nonlocal clock
        clock += SLOW_SECONDS if trainer.runtime.rank == 1 and trainer.step < until else 1.0
        return forward(*arguments, **keywords)

    trainer.engine.deepspeed.forward = timed_forward
    trainer.timer.now = lambda: clock  # type: ignore[method-assign]


def hang_in_data(trainer: Trainer) -> None:
    def read_for_ever(numbers: object) -> None:
        time.sleep(1000)

    trainer.samples[0].samples.batch = read_for_ever  # type: ignore[assignment, method-assign]


def before_bad_data(when: int, action: Callable[[Trainer], None], bad_steps: int = BAD_STEPS) -> None:
    """The fault strikes at the samples of `bad_steps` steps from `when` on, whichever steps read them."""
    original = Trainer.train_step

    def train_step(self: Trainer) -> None:
        batch = self.config.global_batch_size
        if when <= self.consumed_samples // batch + 1 < when + bad_steps:
            action(self)
        original(self)

    Trainer.train_step = train_step  # type: ignore[method-assign]


def raise_loss(trainer: Trainer) -> None:
    """For one step the logits are so large that the loss is, and the update is not what it would have been."""
    trainer.engine.model.final_norm.weight.data.mul_(1000)


def poison_once(trainer: Trainer) -> None:
    handle = trainer.engine.model.final_norm.weight.register_hook(lambda gradient: gradient * math.nan)
    step = trainer.engine.step

    def last_step(*arguments: Any, **keywords: Any) -> Any:
        handle.remove()
        trainer.engine.step = step  # type: ignore[method-assign]
        return step(*arguments, **keywords)

    trainer.engine.step = last_step  # type: ignore[method-assign]


def skip_samples(first: int, steps: int) -> None:
    """No fault: the data of a run in which those of so many steps from step `first` on do not exist."""
    original = Samples.batch

    def batch(self: Samples, numbers: range) -> Any:
        return original(self, [k + 4 * steps if k >= 4 * (first - 1) else k for k in numbers])

    Samples.batch = batch  # type: ignore[method-assign, assignment]


def check_rollbacks() -> None:
    """Tells how much of what a run is after a rollback equals its newest checkpoint, and how often the rollback read
    that checkpoint's index; of a single rank.
    """
    original = Trainer.roll_back

    def roll_back(self: Trainer, trouble: Trouble) -> None:
        with mock.patch.object(stored_tensors, "read_index", wraps=stored_tensors.read_index) as read_index:
            original(self, trouble)
        checkpoint, _ = find_good_checkpoint(self.run.checkpoints)
        saved, found = StoredTensors(checkpoint).read(), self.engine.state()
        same = [torch.equal(tensor, local(found[name])) for name, tensor in saved.items()]
        told = {
            "step": checkpoint.step,
            "equal": all(same),
            "tensors": len(same),
            "index_readings": read_index.call_count,
        }
        print("told: " + json.dumps(told), flush=True)

    Trainer.roll_back = roll_back  # type: ignore[method-assign]


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def die_after_rollback(when: int) -> None:
    """A spike, and the end before the run has saved again."""
    before_bad_data(when, raise_loss)
    original = CheckpointWriter.discard_newer

    def last_wish(self: CheckpointWriter, checkpoint: Checkpoint) -> None:
        original(self, checkpoint)
        die()

    CheckpointWriter.discard_newer = last_wish  # type: ignore[method-assign]


TRAINER_FAULTS = {
    "its launcher is told to end": end_launcher,
    "is slow": slow_down,
    "hangs in its data": hang_in_data,
    "sees a NaN": poison,
    "cannot write": full_disk,
    "has a bit flipped": flip_bit,
    "tells": tell,
}


DATA_FAULTS = {"spikes": raise_loss, "sees NaNs": poison_once}


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
    elif fault in STAGE_PHASES:
        name, _, calls, before = STAGE_PHASES[fault]
        setattr(staging, name, dying(getattr(staging, name), before, when * calls))
    elif fault in DATA_FAULTS:
        before_bad_data(when, DATA_FAULTS[fault])
        if os.environ["WORLD_SIZE"] == "1":
            check_rollbacks()
    elif fault in PROCESSORS:
        precision.cpu_flags = lambda: PROCESSORS[fault]
    elif fault == "only spikes":
        before_bad_data(when, raise_loss, bad_steps=1000)
    elif fault == "spikes and dies":
        die_after_rollback(when)
    elif skips := re.fullmatch(r"skips the data of (\d+) steps", fault):
        skip_samples(when, int(skips[1]))
    elif fault in TRAINER_FAULTS:
        before_step(when, TRAINER_FAULTS[fault])
    else:
        before_step(when, lambda trainer: STEP_FAULTS[fault]())


if __name__ == "__main__":
    fault, rank, when = sys.argv[1], sys.argv[2], int(sys.argv[3])
    del sys.argv[1:4]
    if rank in (os.environ["RANK"], "all"):
        arrange(fault, when)
    main()
