"""Coordinate checks: how large activations are, and how much a few updates change them (arXiv 2203.03466, section D.1).

In a parametrization whose learning rate transfers, none of the changes grows or vanishes as a model is made wider,
deeper or given more sub-layers.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kraken_train.bench.small_training import random_batch, train
from kraken_train.model.architecture import ModelConfig
from kraken_train.model.language_model import LanguageModel
from kraken_train.model.layers import Layer
from kraken_train.model.observation import rms, seen_outputs
from kraken_train.recipe.parametrization import Parametrization

# By how the name of a module ends. Branches are summed over the layers, of others the last layer counts.
BRANCHES = {"attention.out": "attention, sum over layers", "ffn.down": "FFN, sum over layers"}
OTHERS = {"attention.qkv": "queries, keys, values", "ffn.norm": "input of the FFN, normed", "ffn_norm":
          "input of the FFN, normed", "ffn.up": "inside the FFN"}  # fmt: skip
STREAM, LOGITS = "residual stream", "logits"
SAMPLES = 8  # of a step, and of the batch on which activations are compared
OBSERVED_SEED = 1_000_003  # of that batch


@dataclass(frozen=True)
class Size:
    """Root mean squares of an activation."""

    initial: float
    change: float  # of the difference between the activations after and before the updates


def check_coordinates(
    config: ModelConfig, parametrization: Parametrization, lr: float, steps: int, seeds: Sequence[int]
) -> dict[str, Size]:
    """The sizes of a model's activations before `steps` updates at a constant learning rate, and their changes: means
    over models and samples of these seeds."""
    generator = torch.Generator().manual_seed(OBSERVED_SEED)
    ids, _ = random_batch(SAMPLES, config.context_length, generator)
    initial: dict[str, list[float]] = defaultdict(list)
    change: dict[str, list[float]] = defaultdict(list)
    for seed in seeds:
        seen: list[dict[str, Tensor]] = []

        def observe(model: LanguageModel, step: int, seen: list[dict[str, Tensor]] = seen) -> None:
            if step in (0, steps):
                seen.append(activations(model, ids))

        train(config, parametrization, lr, steps, SAMPLES, seed, observe=observe)
        before, after = seen
        for name in before:
            initial[name].append(rms(before[name]))
            change[name].append(rms(after[name] - before[name]))
    return {name: Size(statistics.fmean(initial[name]), statistics.fmean(change[name])) for name in initial}


@torch.no_grad()
def activations(model: LanguageModel, ids: Tensor) -> dict[str, Tensor]:
    """Those of BRANCHES and OTHERS that the model has, the last residual stream and the logits."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    labels = BRANCHES | OTHERS

    def label_of(name: str, module: nn.Module) -> str | None:
        return STREAM if isinstance(module, Layer) else labels.get(".".join(name.split(".")[2:]))

    with seen_outputs(model, label_of, lambda label, output: found[label].append(output)):
        found[LOGITS].append(model(ids))
    summed = BRANCHES.values()
    return {label: torch.stack(parts).sum(0) if label in summed else parts[-1] for label, parts in found.items()}


def growth(values: Mapping[int, float]) -> float:
    """Of values by size, the exponent p of the power law value ~ size^p that fits best; 0: they stay the same."""
    x, y = (list(map(math.log, axis)) for axis in (values, values.values()))
    return statistics.linear_regression(x, y).slope
