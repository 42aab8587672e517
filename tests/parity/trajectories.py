"""On ranks: the same training on different grids and with different settings."""

from __future__ import annotations

from typing import Any

from kraken_train.parallel.ranks import Runtime
from parity.common import MODELS, Z_LOSS, Steps, make_engine, run_steps

STEPS = 20
SHORT = 6

# What else can be combined with a degree of parallelism: name -> settings.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "zero2-recompute-vocab": {"zero_stage": 2, "activation_checkpointing": True, "vocab_parallel": True},
    "vocab-by-default": {"vocab_parallel": None},
    "muon-bf16-vocab": {"muon": True, "precision": "bf16", "vocab_parallel": True},
    "bf16-vocab": {"precision": "bf16", "vocab_parallel": True},
    "bf16-zero2-recompute-fp32sums": {
        "precision": "bf16", "zero_stage": 2, "activation_checkpointing": True, "reduce_dtype": "fp32",
    },
    "z-loss-vocab": {"z_loss": Z_LOSS, "vocab_parallel": True},
    "mup": {"mup": True},
    "mup-bf16-zero2-vocab": {"mup": True, "precision": "bf16", "zero_stage": 2, "vocab_parallel": True},
    "muon": {"muon": True},
    "muon-zero2-recompute-vocab": {
        "muon": True, "zero_stage": 2, "activation_checkpointing": True, "vocab_parallel": True,
    },
    "muon-bf16": {"muon": True, "precision": "bf16"},
    "muon-bf16-zero2": {"muon": True, "precision": "bf16", "zero_stage": 2},
    "compile": {"compile_parts": True},
    "apart": {"attention_within_documents": True},
    "compile-recompute-apart": {
        "compile_parts": True, "activation_checkpointing": True, "attention_within_documents": True,
    },
    "compile-recompute-bf16": {"compile_parts": True, "activation_checkpointing": True, "precision": "bf16"},
}  # fmt: skip


def run(runtime: Runtime, cases: list[str]) -> dict[str, Steps]:
    """Each case is MODEL/SIZE/VARIANT."""
    report = {}
    for case in cases:
        model, size, variant = case.split("/")
        config, steps = MODELS[model], STEPS if variant == "plain" else SHORT
        engine = make_engine(config, runtime, int(size), **VARIANTS[variant])
        report[case] = run_steps(engine, config, range(steps))
        engine.verify_replicas()
    return report
