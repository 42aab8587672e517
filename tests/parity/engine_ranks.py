"""Run by a launcher: trains one small Kraken in every mode of the engine and writes what happened as JSON.

Usage: engine_ranks.py OUTPUT. Every rank runs it; rank 0 writes.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch

from kraken_train.config import (
    CheckpointConfig,
    EngineConfig,
    KrakenConfig,
    OptimConfig,
    ScheduleConfig,
    TrackingConfig,
    TrainConfig,
    ValidationConfig,
)
from kraken_train.engine import Engine, start_processes
from kraken_train.model import KrakenModel
from kraken_train.runtime import Runtime, read_runtime

MODEL = KrakenConfig(
    num_sub_layers=4, num_layers=2, hidden_size=32, heads_per_sub_layer=2, vocab_size=128, context_length=16
)
STEPS, GLOBAL_BATCH, MICRO_BATCH = 6, 8, 2
MAX_GRAD_NORM = 0.5
MODES = [("fp32", 1), ("fp32", 2), ("bf16", 1), ("bf16", 2)]


def batches() -> torch.Tensor:
    """(STEPS, GLOBAL_BATCH, context + 1) token ids."""
    return torch.randint(MODEL.vocab_size, (STEPS, GLOBAL_BATCH, 17), generator=torch.Generator().manual_seed(3))


def rate(step: int) -> float:
    return 1e-3 * (step + 1)


def settings(precision: str, zero_stage: int) -> TrainConfig:
    return TrainConfig(
        model={},
        data_dir="",
        run_dir="",
        max_steps=STEPS,
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=MICRO_BATCH,
        seed=0,
        precision=precision,
        resume="auto",
        max_nonfinite_steps=3,
        log_every=1,
        peak_tflops=None,
        optim=OptimConfig(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, max_grad_norm=MAX_GRAD_NORM),
        schedule=ScheduleConfig(name="constant", warmup_steps=0, min_ratio=1.0, decay_steps=1),
        engine=EngineConfig(zero_stage),
        checkpoint=CheckpointConfig(every=1, keep=1),
        validation=ValidationConfig(every=0, samples=1),
        tracking=TrackingConfig(mode="off", project="", entity=None, name=None, group=None, tags=()),
    )


def run_steps(engine: Engine, runtime: Runtime, steps: range, poisoned: int | None = None) -> list[list[float | bool]]:
    """[loss, gradient norm, applied] per step. In step `poisoned` the last rank alone sees a NaN."""
    results = []
    for step in steps:
        for micro_step in range(engine.accumulation_steps):
            first = (micro_step * runtime.world_size + runtime.rank) * MICRO_BATCH
            samples = batches()[step, first : first + MICRO_BATCH].to(engine.device)
            hook = None
            if step == poisoned and micro_step == 0 and runtime.rank == runtime.world_size - 1:
                hook = engine.model.final_norm.register_forward_hook(lambda *arguments: arguments[-1] * math.nan)
            engine.accumulate(samples[:, :-1], samples[:, 1:])
            if hook is not None:
                hook.remove()
        result = engine.step(rate(step))
        results.append([result.loss, result.grad_norm, result.applied])
    return results


def whole_state(engine: Engine, runtime: Runtime) -> dict[str, torch.Tensor]:
    """The shares of all ranks together; each tensor is kept by exactly one."""
    shares: list[dict[str, torch.Tensor]] = [{}] * runtime.world_size
    torch.distributed.all_gather_object(shares, engine.state())
    names = [name for share in shares for name in share]
    assert len(names) == len(set(names)) == 3 * len(list(engine.model.parameters()))
    return {name: share[name] for share in shares for name in sorted(share)}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def main() -> None:
    runtime = read_runtime()
    start_processes(runtime)
    report = {"world_size": runtime.world_size}
    for precision, zero_stage in MODES:

        def engine(precision: str = precision, zero_stage: int = zero_stage) -> Engine:
            return Engine(KrakenModel(MODEL), settings(precision, zero_stage), runtime)

        whole = engine()
        untouched = whole_state(whole, runtime)
        initial = {f"model.{name}": weight.detach() for name, weight in KrakenModel(MODEL).named_parameters()}
        if precision == "bf16":  # DeepSpeed makes the masters from the bf16 weights
            initial = {name: weight.bfloat16().float() for name, weight in initial.items()}
        uninterrupted = run_steps(whole, runtime, range(STEPS))

        first = engine()
        run_steps(first, runtime, range(3))
        saved = whole_state(first, runtime)
        resumed = engine()
        resumed.load_state(lambda names, saved=saved: {name: saved[name] for name in names}, 3)
        continued = run_steps(resumed, runtime, range(3, STEPS))
        same_end = same(whole_state(whole, runtime), whole_state(resumed, runtime))

        victim = engine()
        before_and_nan = run_steps(victim, runtime, range(3), poisoned=2)
        first_two = engine()
        run_steps(first_two, runtime, range(2))
        unchanged = same(whole_state(first_two, runtime), whole_state(victim, runtime))

        report[f"{precision} {zero_stage}"] = {
            "initial_weights_kept": same(initial, {name: untouched[name] for name in initial}),
            "steps": uninterrupted,
            "resumed": continued,
            "same_end": same_end,
            "poisoned": [[x if math.isfinite(x) else None for x in row] for row in before_and_nan],
            "unchanged_by_nan": unchanged,
            "recovers": run_steps(victim, runtime, range(3, 4))[0][2],
        }
    if runtime.is_first:
        Path(sys.argv[1]).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
