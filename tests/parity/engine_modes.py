"""On ranks: DeepSpeed's modes, each trained, resumed and given a NaN."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from kraken_train.model.registry import build_model
from kraken_train.parallel.ranks import Runtime
from kraken_train.training.engine import Engine
from kraken_train.training.norms import StepNorms
from parity.common import MODELS, RATE, make_engine, run_steps, same, share_of_rank, whole_state

# (precision, ZeRO stage, optimizer) by number of ranks; each takes seconds
MODES_AT = {
    1: [("fp32", 1, "adamw"), ("bf16", 2, "adamw"), ("bf16", 1, "muon")],
    2: [("fp32", 2, "adamw"), ("bf16", 1, "adamw"), ("fp32", 2, "muon"), ("bf16", 1, "muon")],
}
STEPS = 6
EMA_DECAY = 0.8
SIZES = (24, 24, 36, 12, 36, 24)  # samples of each step: one, two or three micro-batches of each rank
CONFIG = MODELS["kraken-4"]


def run(runtime: Runtime, sizes: list[int]) -> dict[str, Any]:
    return {
        f"{size} {precision} {zero_stage} {optimizer}": run_mode(runtime, size, precision, zero_stage, optimizer)
        for size in sizes
        for precision, zero_stage, optimizer in MODES_AT[runtime.world_size]
    }


def run_mode(runtime: Runtime, size: int, precision: str, zero_stage: int, optimizer: str) -> dict[str, Any]:
    def engine() -> Engine:
        layout = {"precision": precision, "zero_stage": zero_stage, "muon": optimizer == "muon"}
        return make_engine(CONFIG, runtime, size, **layout, ema_decay=EMA_DECAY)

    whole = engine()
    untouched = whole_state(whole)
    average = get_ema_multi_avg_fn(EMA_DECAY)  # of PyTorch, of the weights after each step
    averaged = {name: untouched[f"model.{name}"].clone() for name, _ in whole.model.named_parameters()}
    initial = {f"model.{name}": weight.detach() for name, weight in build_model(CONFIG).named_parameters()}
    if precision == "bf16":  # DeepSpeed makes the masters from the bf16 weights
        initial = {name: weight.bfloat16().float() for name, weight in initial.items()}
    uninterrupted = run_steps(whole, CONFIG, range(STEPS), sizes=SIZES)

    first = engine()
    for step in range(3):
        run_steps(first, CONFIG, range(step, step + 1), sizes=SIZES)
        saved = whole_state(first)
        average(list(averaged.values()), [saved[f"model.{name}"] for name in averaged], None)
    resumed = engine()

    def fill(tensors: dict[str, torch.Tensor]) -> None:
        for key, tensor in tensors.items():
            cut = resumed.sharded_dims[re.sub(r"^(model|optimizer\.\w+)\.", "", key)]
            if cut is None:
                tensor.copy_(saved[key])
            else:
                tensor.to_local().copy_(cut.take(saved[key]))  # type: ignore[attr-defined]

    resumed.load_state(fill, 3)
    continued = run_steps(resumed, CONFIG, range(3, STEPS), sizes=SIZES)

    victim = engine()
    before_and_nan = run_steps(victim, CONFIG, range(3), poisoned=2, sizes=SIZES)
    first_two = engine()
    run_steps(first_two, CONFIG, range(2), sizes=SIZES)
    whole.verify_replicas()
    return {
        "initial_weights_kept": same(initial, {name: untouched[name] for name in initial}),
        "average_differs_by": max(
            (saved[f"optimizer.ema.{name}"] - expected).abs().max().item() for name, expected in averaged.items()
        ),
        "steps": uninterrupted,
        "resumed": continued,
        "same_end": same(whole_state(whole), whole_state(resumed)),
        "poisoned": [[x if math.isfinite(x) else None for x in row] for row in before_and_nan],
        "unchanged_by_nan": same(whole_state(first_two), whole_state(victim)),
        "recovers": run_steps(victim, CONFIG, range(3, 4), sizes=SIZES)[0][2],
        "host_reads": host_reads(victim),
    }


class HostReads(TorchDispatchMode):
    """Counts what a GPU would be waited for: `item()`, `bool()`, `float()` of tensors."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def errors_for_waits(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def host_reads(engine: Engine) -> dict[str, int]:
    """How often two steps, measured by layer, and reading their results wait for the device; on a GPU any other wait is
    an error.
    """
    norms = StepNorms(engine, every=1)
    batches = [[(mine[:, :-1], mine[:, 1:]) for mine in share_of_rank(engine, CONFIG, step)] for step in range(2)]
    with errors_for_waits(engine.device), HostReads() as reads:
        for batch in batches:
            with norms.of_forward(1):
                for inputs, targets in batch:
                    engine.accumulate(inputs, targets)
            with norms.of_update(1):
                engine.step(RATE)
        while_training = reads.count
    return {"steps": while_training, "results": len(engine.results())}
