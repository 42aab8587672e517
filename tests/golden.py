"""Weights, outputs and gradients of a model, computed by the authors' published code in float64."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

from checkpoints.exports.reference import convert_reference_state_dict
from kraken_train.model.config import KrakenConfig
from kraken_train.model.kraken import KrakenModel

GOLDEN_FILE = Path(__file__).parent / "artefacts" / "kraken_4way.safetensors"


class Golden:
    """The content of GOLDEN_FILE under our names, in float64."""

    def __init__(self) -> None:
        with safe_open(GOLDEN_FILE, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            settings = json.loads(file.metadata()["config"])
        self.config = KrakenConfig(**{k: v for k, v in settings.items() if k not in ("source", "optimizer")})
        self.weights = convert_reference_state_dict(self.select(tensors, "weight/"))
        # The file has no gradient of the tied embedding, so its weight takes the place during the conversion. A wrong
        # gradient of it would show in the losses of the trajectory.
        untied = {**self.select(tensors, "grad/"), "lm_head.weight": tensors["weight/lm_head.weight"].double()}
        self.gradients = convert_reference_state_dict(untied)
        del self.gradients["token_embedding.weight"]
        self.input_ids, self.targets = tensors["input_ids"], tensors["targets"]
        self.logits, self.loss = tensors["logits"], tensors["loss"].item()
        self.losses, self.norms = tensors["trajectory_loss"], tensors["trajectory_grad_norm"]

    @staticmethod
    def select(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
        return {n.removeprefix(prefix): t.double() for n, t in tensors.items() if n.startswith(prefix)}

    def model(self) -> KrakenModel:
        model = KrakenModel(self.config).double()
        model.load_state_dict(self.weights)
        return model
