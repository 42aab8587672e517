"""Muon and AdamW of PyTorch on the separate matrices of a model, in one process: what our Muon is compared with."""

from __future__ import annotations

from typing import Any

import torch
from helpers import split_qkv
from torch import Tensor, nn

from kraken_train.model.config import ModelConfig
from kraken_train.model.language_model import LanguageModel


class PlainMuon:
    """`step` updates the weights of `model` with their gradients."""

    def __init__(
        self,
        model: LanguageModel,
        config: ModelConfig,
        lr: float,
        momentum: float = 0.95,
        ns_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
    ) -> None:
        self.weights: list[tuple[Tensor, list[Tensor], list[nn.Parameter]]] = []  # (weight, places, its matrices)
        decaying, others = [], []
        for name, weight in model.named_parameters():
            if "norm" in name:
                others.append(weight)
            elif is_vocabulary(name):
                decaying.append(weight)
            else:
                places = split(config, name, torch.arange(weight.numel()).view(weight.shape))
                matrices = [nn.Parameter(weight.detach().flatten()[place]) for place in places]
                self.weights.append((weight, places, matrices))
        self.adamw = torch.optim.AdamW(
            [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=lr, betas=betas, eps=1e-8,
        )  # fmt: skip
        matrices = [matrix for _, _, matrices in self.weights for matrix in matrices]
        self.muon = torch.optim.Muon(
            matrices, lr, weight_decay, momentum, nesterov=True, ns_steps=ns_steps, adjust_lr_fn="match_rms_adamw"
        )

    def step(self) -> None:
        for weight, places, matrices in self.weights:
            for place, matrix in zip(places, matrices, strict=True):
                matrix.grad = weight.grad.flatten()[place]  # type: ignore[union-attr]
        self.adamw.step()
        self.muon.step()
        with torch.no_grad():
            for weight, places, matrices in self.weights:
                for place, matrix in zip(places, matrices, strict=True):
                    weight.view(-1)[place] = matrix

    def zero_grad(self) -> None:
        self.adamw.zero_grad()
        for weight, _, _ in self.weights:
            weight.grad = None

    def momentum_of(self, number: int) -> Tensor:
        """The momentum of weight `number`, in its shape."""
        weight, places, matrices = self.weights[number]
        whole = torch.empty(weight.numel())
        for place, matrix in zip(places, matrices, strict=True):
            whole[place] = self.muon.state[matrix]["momentum_buffer"]
        return whole.view(weight.shape)


def is_vocabulary(name: str) -> bool:
    """Whether a weight has a row for each token or position."""
    return "token_embedding" in name or "position_embedding" in name or "lm_head" in name


def split(config: ModelConfig, name: str, weight: Tensor) -> list[Tensor]:
    """The matrices of a weight: of each sub-layer, and queries, keys and values apart."""
    if config.units_setting is None:
        return split_qkv(weight, config.head_size) if "qkv" in name else [weight]
    found: list[Any] = []
    for of_sub_layer in weight:
        if "qkv" in name:
            queries = config.heads * config.head_size
            keys = config.kv_heads * config.head_size
            found += [of_sub_layer[:queries], of_sub_layer[queries:-keys], of_sub_layer[-keys:]]
        else:
            found.append(of_sub_layer)
    return found
