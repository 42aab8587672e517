"""Parameter groups by role, the size of gradient buckets, and jumps of the learning rate."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from kraken_train.parallel.sharding import sharded_dims
from kraken_train.parallel.weight_role import WeightRole, weight_role
from kraken_train.recipe.batch_ramp import Position
from kraken_train.recipe.step_plan import recorded_plan

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

    DeepSpeed allocates a buffer of this size in every backward pass; its default is 1 or 2 GB for the smallest model.
    """
    return min(LARGEST_BUCKET, sum(parameter.numel() for parameter in model.parameters()))


def describe_jump(before: dict[str, Any], now: dict[str, Any], position: Position, context_length: int) -> str | None:
    """The jump of the learning rate at a resumption at `position`, by two TrainConfigs; None: no jump."""
    rates: list[float] = [
        recorded_plan(settings, context_length).learning_rate(settings["optim"]["lr"], position)
        for settings in (before, now)
    ]
    if math.isclose(*rates, rel_tol=SMALLEST_JUMP):
        return None
    old, new = (f"{rate:.3g}" for rate in rates)
    return (
        f"the learning rate jumps at step {position.step + 1}: {old} by the settings of the checkpoint, {new} by those "
        "of now"
    )
