"""Parameter groups by role, the optimizer, the size of gradient buckets, and jumps of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from kraken_train.model.initialization import weight_kind
from kraken_train.parallel.matrices import lay_out, matrix_parts
from kraken_train.parallel.matrix_exchange import MatrixExchange
from kraken_train.parallel.mesh import Place
from kraken_train.parallel.sharding import sharded_dims
from kraken_train.parallel.weight_role import WeightRole, weight_role
from kraken_train.recipe.batch_ramp import Position
from kraken_train.recipe.optimizers import AdamWConfig, AnyOptimizer
from kraken_train.recipe.parametrization import STANDARD, Parametrization
from kraken_train.recipe.step_plan import recorded_plan
from kraken_train.training.muon import MATRICES, Muon

SMALLEST_JUMP = 0.01  # of a learning rate, relative
LARGEST_BUCKET = 500_000_000  # of gradients at ZeRO-1, whose sums are made once a step; DeepSpeed's default
LARGEST_BUCKET_DURING_BACKWARD = 25_000_000  # at ZeRO-2, which sums during the backward pass


def parameter_groups(
    model: nn.Module, weight_decay: float, matrices_apart: bool = False, parametrization: Parametrization = STANDARD
) -> list[dict[str, Any]]:
    """Optimizer groups by role: matrices and embeddings decay, norms do not; by the multipliers of their kind; by
    whether the ranks of a model copy share the parameter ("shared") or each hold a part; and, if they are to be apart,
    by whether it consists of matrices. Groups of such parameters then have their MatrixParts ("matrices"). Empty groups
    are left out.

    "lr_multiplier" and "eps_multiplier" are relative to the settings. The role comes from the module that owns the
    weight, since a stacked norm has two axes like a matrix. Raises TypeError for a module with parameters that has no
    role.
    """
    cuts = sharded_dims(model)
    groups: dict[tuple[float, bool, bool, float, float], list[tuple[nn.Parameter, nn.Module]]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            role, kind = weight_role(module), weight_kind(prefix, module)
            if role is None or kind is None:
                raise TypeError(f"{prefix} ({type(module).__name__}) has parameters but no role in weight decay")
            by = parametrization.multipliers(kind)
            decay = 0.0 if role is WeightRole.NORM else weight_decay * by.weight_decay
            apart = matrices_apart and role.is_matrix
            key = (decay, cuts[name] is None, apart, by.learning_rate, by.epsilon)
            groups.setdefault(key, []).append((parameter, module))
    found = []
    for (decay, shared, apart, lr_multiplier, eps_multiplier), members in groups.items():
        group: dict[str, Any] = {"params": [parameter for parameter, _ in members], "weight_decay": decay}
        group |= {"shared": shared, "lr_multiplier": lr_multiplier, "eps_multiplier": eps_multiplier}
        if apart:
            group[MATRICES] = lay_out([(parameter.numel(), matrix_parts(module)) for parameter, module in members])
        found.append(group)
    return found


def make_optimizer(
    config: AnyOptimizer, groups: list[dict[str, Any]], place: Place, world: dist.ProcessGroup | None
) -> torch.optim.Optimizer:
    """For the groups of `parameter_groups`, on the rank at `place`; `world` has all ranks."""
    for group in groups:
        group["eps"] = config.eps * group["eps_multiplier"]
    adamw: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "fused": True}
    if isinstance(config, AdamWConfig):
        return torch.optim.AdamW(groups, **adamw)
    for group in groups:
        if MATRICES in group:
            group[MATRICES] = cache(partial(MatrixExchange, group[MATRICES], place=place, group=world))
    return Muon(groups, config.momentum, config.ns_steps, **adamw)


EMA = "ema"  # the name of the average of the weights, which is kept as a state of the optimizer


def state_names(group: dict[str, Any]) -> tuple[str, ...]:
    """The tensors that an optimizer keeps for each parameter of a group."""
    return ("momentum_buffer",) if MATRICES in group else ("exp_avg", "exp_avg_sq")


def reduce_bucket_elements(sizes: Sequence[int], zero_stage: int) -> int:
    """Gradients that are summed over the data-parallel ranks at once, of parameters with so many elements each.

    DeepSpeed allocates a buffer of this size in every backward pass, and copies while it sums. Its default takes 1 or
    2 GB for the smallest model, and a bucket with all gradients takes more memory than ZeRO-2 saves. A gradient that is
    larger than the bucket would be summed outside it with as much memory.
    """
    largest = LARGEST_BUCKET if zero_stage == 1 else max(LARGEST_BUCKET_DURING_BACKWARD, *sizes)
    return min(largest, sum(sizes))


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
