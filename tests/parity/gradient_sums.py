"""On ranks: the part of the gradients that each copy updates, against an all-reduce of all of them."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from kraken_train.parallel.ranks import Runtime
from parity.common import MODELS, make_engine, run_steps

CONFIG = MODELS["kraken-4"]


def run(runtime: Runtime, sizes: list[int]) -> dict[str, Any]:
    return {
        f"{size} {optimizer}": compare(runtime, size, muon=optimizer == "muon")
        for size in sizes
        for optimizer in ("adamw", "muon")
    }


def compare(runtime: Runtime, size: int, muon: bool) -> dict[str, Any]:
    """Of one step: by rank, the groups and the largest difference relative to the largest gradient."""
    engine = make_engine(CONFIG, runtime, size, precision="bf16", muon=muon)
    optimizer, average = engine.deepspeed.optimizer, engine.deepspeed.allreduce_gradients
    differences: list[float] = []

    def checked(*arguments: Any, **named: Any) -> None:
        whole = [gradients / engine.mesh.data_size for gradients in optimizer.fp32_groups_gradients_flat]
        average(*arguments, **named)
        if not engine.deepspeed.is_gradient_accumulation_boundary():
            return
        for expected, part in zip(whole, optimizer.fp32_groups_gradient_flat_partition, strict=True):
            dist.all_reduce(expected, group=engine.mesh.get_data_parallel_group())
            own = expected.chunk(engine.mesh.data_size)[engine.mesh.data_rank]
            differences.append(float((part - own).abs().max() / expected.abs().max()))

    engine.deepspeed.allreduce_gradients = checked
    run_steps(engine, CONFIG, range(1))
    cleared = [not gradients.any() for gradients in optimizer.fp32_groups_gradients_flat]
    return {
        "groups": [len(optimizer.param_groups), len(differences)],
        "backend": runtime.backend,
        "difference": max(runtime.gather(max(differences))),
        "cleared": runtime.all_true(all(map(bool, cleared))),
    }
