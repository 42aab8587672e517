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
            samples = batches()[step, first : first + MICRO_BATCH]
            hook = None
            if step == poisoned and micro_step == 0 and runtime.rank == runtime.world_size - 1:
                hook = engine.model.final_norm.register_forward_hook(lambda *arguments: arguments[-1] * math.nan)
            engine.accumulate(samples[:, :-1], samples[:, 1:])
            if hook is not None:
                hook.remove()
        result = engine.step(rate(step))
        results.append([result.loss, result.grad_norm, result.applied])
    return results


def main() -> None:
    runtime = read_runtime()
    start_processes(runtime)
    report = {"world_size": runtime.world_size}
    for precision, zero_stage in MODES:

        def engine(precision: str = precision, zero_stage: int = zero_stage) -> Engine:
            return Engine(KrakenModel(MODEL), settings(precision, zero_stage), runtime)

        whole = engine()
        untouched = whole.state()
        uninterrupted = run_steps(whole, runtime, range(STEPS))

        first = engine()
        run_steps(first, runtime, range(3))
        saved = first.state()
        resumed = engine()
        resumed.load_state(saved, 3)
        continued = run_steps(resumed, runtime, range(3, STEPS))
        same_end = all(torch.equal(a, b) for a, b in zip(whole.state().values(), resumed.state().values(), strict=True))

        victim = engine()
        before_and_nan = run_steps(victim, runtime, range(3), poisoned=2)
        kept = run_steps(first_two := engine(), runtime, range(2)) and first_two.state()
        unchanged = all(torch.equal(a, b) for a, b in zip(kept.values(), victim.state().values(), strict=True))

        report[f"{precision} {zero_stage}"] = {
            "initial_weights_kept": torch.equal(
                untouched["model.conjunction.weight"], KrakenModel(MODEL).conjunction.weight.detach()
            )
            if precision == "fp32"
            else None,
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
