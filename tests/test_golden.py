"""Our model against numbers computed by the authors' published code in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from checkpoints.reference import convert_reference_state_dict
from kraken_train.config import KrakenConfig
from kraken_train.model import KrakenModel
from kraken_train.optim import parameter_groups

GOLDEN_FILE = Path(__file__).parent / "data" / "kraken_4way.safetensors"


class Golden:
    def __init__(self) -> None:
        with safe_open(GOLDEN_FILE, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            settings = json.loads(file.metadata()["config"])
        self.config = KrakenConfig(**{k: v for k, v in settings.items() if k not in ("source", "optimizer")})
        self.weights = self.select(tensors, "weight/")
        self.gradients = self.select(tensors, "grad/")
        self.input_ids, self.targets = tensors["input_ids"], tensors["targets"]
        self.logits, self.loss = tensors["logits"], tensors["loss"].item()
        self.losses, self.norms = tensors["trajectory_loss"], tensors["trajectory_grad_norm"]

    @staticmethod
    def select(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
        return {n.removeprefix(prefix): t.double() for n, t in tensors.items() if n.startswith(prefix)}

    def model(self) -> KrakenModel:
        model = KrakenModel(self.config).double()
        model.load_state_dict(convert_reference_state_dict(self.weights))
        return model


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden()


def test_logits_and_loss(golden: Golden) -> None:
    model = golden.model()
    assert (model(golden.input_ids) - golden.logits).abs().max() < 1e-12
    assert abs(model.loss(golden.input_ids, golden.targets).item() - golden.loss) < 1e-13


def test_gradients(golden: Golden) -> None:
    model = golden.model()
    model.loss(golden.input_ids, golden.targets).backward()
    # The file holds no gradient of the tied embedding: the trajectory below would show a wrong one.
    expected = convert_reference_state_dict({**golden.gradients, "lm_head.weight": golden.weights["lm_head.weight"]})
    compared = 0
    for name, parameter in model.named_parameters():
        if name == "token_embedding.weight":
            continue
        assert parameter.grad is not None
        difference = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert difference < 1e-6, name
        compared += 1
    assert compared == len(expected) - 1 == 21


def test_training_trajectory(golden: Golden) -> None:
    model = golden.model()
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    for loss_expected, norm_expected in zip(golden.losses, golden.norms, strict=True):
        loss = model.loss(golden.input_ids, golden.targets)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert abs(loss.item() - loss_expected.item()) < 1e-9
        assert abs(norm.item() - norm_expected.item()) < 1e-8
