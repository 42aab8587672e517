"""Losses at equal time: what each architecture has learned when the standard Transformer has seen so many tokens.

Times are predicted: those of a training step on the devices that share a copy (`kraken_train.planning`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from kraken_train.model.config import ModelConfig
from kraken_train.planning.cluster import load_cluster
from kraken_train.planning.layout import TrainingLayout
from kraken_train.planning.roofline import predict_time
from kraken_train.planning.traffic import predict_traffic
from kraken_train.settings.parallel import ParallelConfig
from studies.architectures.plan import Batch, Plan


def step_seconds(plan: Plan, models: Mapping[str, ModelConfig], batch: Batch) -> dict[str, float]:
    """Of each model, shared by the devices of the plan, with its optimizer and precision. Raises ConfigError."""
    cluster = replace(load_cluster(plan.time.cluster), intra_node=plan.time.interconnect, devices_per_node=plan.devices)
    layout = TrainingLayout(
        plan.devices, 1, batch.micro_batch_size, batch.accumulation_steps, vocab_parallel=plan.devices > 1,
        precision=plan.training["precision"], optim=plan.training["optim"],
    )  # fmt: skip
    shared = ParallelConfig(layout.sub_layer_parallel_size, layout.vocab_parallel, None, 0)
    seconds = {}
    for name, model in models.items():
        shared.require_fits(model)
        seconds[name] = predict_time(model, layout, cluster, predict_traffic(model, layout)).total
    return seconds


def loss_after(tokens: float, losses: Mapping[int, float]) -> float | None:
    """The loss between numbers of tokens whose losses are known; None outside of them.

    ln L is interpolated as the parabola in ln D through the nearest three.
    """
    if not min(losses) <= tokens <= max(losses):
        return None
    nearest = sorted(sorted(losses, key=lambda known: abs(math.log(known / tokens)))[:3])
    x, y = ([math.log(value) for value in values] for values in (nearest, [losses[known] for known in nearest]))
    parabola = np.polynomial.Polynomial.fit(x, y, deg=2)
    return math.exp(parabola(math.log(tokens)))
