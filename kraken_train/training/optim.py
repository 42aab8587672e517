"""Parameter groups by role, and learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from torch import nn

from kraken_train.config import ScheduleConfig
from kraken_train.parallel.sharding import sharded_dims
from kraken_train.parallel.weight_role import WeightRole, weight_role

SMALLEST_JUMP = 0.01  # of a learning rate, relative
LARGEST_BUCKET = 500_000_000  # DeepSpeed's default


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups by role: matrices and embeddings decay, norms do not; and by whether the ranks of a model copy
    share the parameter ("shared") or each hold a part. Empty ones are left out.

    The role comes from the module that owns the weight, since a stacked norm has two axes like a matrix. Raises
    TypeError for a module with parameters that has no role.
    """
    cuts = sharded_dims(model)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            role = weight_role(module)
            if role is None:
                raise TypeError(f"{prefix} ({type(module).__name__}) has parameters but no role in weight decay")
            decay = 0.0 if role is WeightRole.NORM else weight_decay
            groups.setdefault((decay, cuts[name] is None), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "shared": shared}
        for (decay, shared), parameters in groups.items()
    ]


def reduce_bucket_elements(model: nn.Module) -> int:
    """Gradients that are summed over the data-parallel ranks at once.

    DeepSpeed sets a buffer of so many aside in every backward pass, by its default 1 or 2 GB for the smallest model.
    """
    return min(LARGEST_BUCKET, sum(parameter.numel() for parameter in model.parameters()))


def learning_rate(schedule: ScheduleConfig, peak: float, step: int, max_steps: int) -> float:
    """The rate for optimizer step `step` (the first is 0) of a run of `max_steps`.

    A linear warm-up, then "cosine": half a cosine down to `min_ratio * peak`; "wsd" (warm-up, stable, decay):
    constant, then linear down to `min_ratio * peak` over the last `decay_steps`; "constant".
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    floor = schedule.min_ratio * peak
    if schedule.name == "cosine":
        progress = (step - schedule.warmup_steps) / max(1, max_steps - schedule.warmup_steps)
        return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * min(1.0, progress)))
    if schedule.name == "wsd":
        remaining = max(0, max_steps - step)
        return floor + (peak - floor) * min(1.0, remaining / schedule.decay_steps)
    return peak


def describe_jump(before: dict[str, Any], now: dict[str, Any], step: int) -> str | None:
    """How the rate changes at a resumption after `step` steps, for settings of a TrainConfig; None where it goes on."""
    rates = [learning_rate(schedule_of(s), s["optim"]["lr"], step, s["max_steps"]) for s in (before, now)]
    if math.isclose(*rates, rel_tol=SMALLEST_JUMP):
        return None
    old, new = (f"{rate:.3g}" for rate in rates)
    return f"the learning rate jumps at step {step + 1}: {old} by the settings of the checkpoint, {new} by those of now"


def schedule_of(settings: dict[str, Any]) -> ScheduleConfig:
    return ScheduleConfig(**{field.name: settings["schedule"][field.name] for field in fields(ScheduleConfig)})
