"""Sizes by layer are those of plain PyTorch in one process, on every grid of ranks, and do not change the training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from plain_muon import PlainMuon
from torch import Tensor

from kraken_train.model.language_model import LanguageModel
from kraken_train.model.registry import build_model
from parity.common import MAX_GRAD_NORM, MODELS, RATE, batch
from parity.conftest import LAUNCHES, SLOW
from parity.norms_checks import STEPS

CASES = [
    (launch, case)
    for launch, (_, checks) in LAUNCHES.items()
    for check in checks
    if check.startswith("norms:")
    for case in check.removeprefix("norms:").split(",")
]
# What the layers of an architecture return -> the residual stream, by the formulas in their modules.
STREAMS: dict[str, Callable[[Any], Tensor]] = {
    "kraken": lambda output: output.x,
    "standard": lambda output: output[0] + output[1],
    "parallel": lambda output: output[0] + output[1],
    "ladder": lambda output: output[0] + output[1] + output[2],
    "fal": lambda output: output[0] + output[1],
    "track": lambda output: output[1] + (output[0] - output[1]).sum(dim=0),
}
# Muon computes in bf16 in any case.
TOLERANCES = {"fp32": 1e-5, "muon": 2e-3, "bf16": 2e-2}


@cache
def plain_sizes(model_name: str, muon: bool) -> dict[str, float]:
    """Of the last of STEPS steps, in one process, with the global batch at once."""
    config = MODELS[model_name]
    model = build_model(config)
    if muon:
        optimizer: PlainMuon | torch.optim.Optimizer = PlainMuon(model, config, RATE)
    else:
        groups = [{"params": [weight], "weight_decay": 0.1 * ("norm" not in name)}
                  for name, weight in model.named_parameters()]  # fmt: skip
        optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))
    for step in range(STEPS):
        seen: dict[str, Tensor] = {}
        hooks = watch(model, STREAMS[config.architecture], seen)
        samples = batch(config, step)
        model.loss(samples[:, :-1], samples[:, 1:]).backward()
        for hook in hooks:
            hook.remove()
        entering = embedded(model, samples[:, :-1])
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
    found: dict[str, list[Tensor]] = defaultdict(list)
    for name, weight in model.named_parameters():
        parts = name.split(".")
        place = f"layer_{parts[1]}" if parts[0] == "layers" else parts[0]
        if "norm" in name:
            found[f"rms/gain/{place}"].append(weight)
        else:
            found[f"rms/weight/{place}"].append(weight)
            found[f"rms/update/{place}"].append(weight - before[name])
    if config.architecture == "kraken":
        for index in range(config.num_layers):
            found[f"rms/sum/layer_{index}"].append(entering)
            entering = seen[f"rms/activation/layer_{index}"].sum(dim=0)
    whole = {key: torch.cat([part.flatten() for part in parts]) for key, parts in found.items()} | seen
    return {key: values.detach().double().square().mean().sqrt().item() for key, values in whole.items()}


def embedded(model: LanguageModel, ids: Tensor) -> Tensor:
    """Of a model with learned positions."""
    assert model.position_embedding is not None
    tokens: Tensor = model.token_embedding(ids)
    return (tokens + model.position_embedding.weight[: ids.shape[1]]).detach()


def watch(model: LanguageModel, stream_of: Callable[[Any], Tensor], seen: dict[str, Tensor]) -> list[Any]:
    """Hooks that keep the streams and, in a Kraken, each stream's own attention."""

    def keep(key: str, value_of: Callable[[Any], Tensor]) -> Callable[..., None]:
        return lambda module, inputs, output: seen.__setitem__(key, value_of(output).detach())

    hooks = []
    for index, layer in enumerate(model.layers):
        hooks.append(layer.register_forward_hook(keep(f"rms/activation/layer_{index}", stream_of)))
        if stream_of is STREAMS["kraken"]:
            own: Any = layer.attention
            hooks.append(own.register_forward_hook(keep(f"rms/attention/layer_{index}", lambda output: output)))
    return hooks


@pytest.mark.parametrize(
    ("launch", "case"), [pytest.param(*case, marks=[pytest.mark.slow] if case[0] in SLOW else []) for case in CASES]
)
def test_sizes(launched: Callable[..., dict[str, Any]], launch: int | str, case: str) -> None:
    model, _, variant = case.split("/")
    found = launched(launch)["norms"][case]
    assert found["same losses"]
    assert found["same state"]
    assert found["hooks left"] == 0
    tolerance = TOLERANCES["bf16" if "bf16" in variant else "muon" if "muon" in variant else "fp32"]
    assert found["sizes"] == pytest.approx(plain_sizes(model, "muon" in variant), rel=tolerance)
