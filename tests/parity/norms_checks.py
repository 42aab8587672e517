"""On ranks: the sizes of weights, updates and activations of a step, and the same training without them."""

from __future__ import annotations

from typing import Any

from kraken_train.parallel.ranks import Runtime
from kraken_train.training.norms import StepNorms
from parity.common import MODELS, RATE, make_engine, run_steps, same, share_of_rank, whole_state
from parity.trajectories import VARIANTS

STEPS = 2  # of which the second is measured


def run(runtime: Runtime, cases: list[str]) -> dict[str, Any]:
    """Each case is MODEL/SIZE/VARIANT, as in `trajectories`."""
    return {case: run_case(runtime, *case.split("/")) for case in cases}


def run_case(runtime: Runtime, model: str, size: str, variant: str) -> dict[str, Any]:
    config = MODELS[model]
    engine, without = (make_engine(config, runtime, int(size), **VARIANTS[variant]) for _ in range(2))
    norms = StepNorms(engine, every=STEPS)
    for step in range(STEPS):
        with norms.of_forward(step + 1):
            for mine in share_of_rank(engine, config, step):
                engine.accumulate(mine[:, :-1], mine[:, 1:])
        with norms.of_update(step + 1):
            engine.step(RATE)
    losses = [[result.loss, result.grad_norm, result.applied] for result in engine.results()]
    return {
        "sizes": norms.take(),
        "same losses": losses == run_steps(without, config, range(STEPS)),
        "same state": same(whole_state(engine), whole_state(without)),
        "hooks left": sum(len(module._forward_hooks) for module in engine.model.modules()),
    }
