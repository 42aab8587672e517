"""Training of small models in one process, in plain PyTorch and fp32, on the bytes of the embedded corpus.

For experiments that compare many sizes and learning rates: no folder, no ranks, no checkpoints.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from data_prep.embedded import EmbeddedSource
from kraken_train.model.architecture import ModelConfig
from kraken_train.model.initialization import scale_initial_weights
from kraken_train.model.language_model import LanguageModel
from kraken_train.model.registry import build_model
from kraken_train.recipe.parametrization import Parametrization
from kraken_train.training.optim import parameter_groups

BYTES = 256  # the vocabulary
BETAS, EPSILON, WEIGHT_DECAY = (0.9, 0.95), 1e-8, 0.1
CORPUS_BYTES = 4_000_000  # at most

Observer = Callable[[LanguageModel, int], None]  # called with the model and the number of updates done


@functools.cache
def corpus() -> Tensor:
    """The embedded corpus as bytes, (number of bytes,)."""
    text, size = [], 0
    for _, values in EmbeddedSource().blocks():
        for _, document in values.values:
            text.append(str(document).encode())
            size += len(text[-1])
        if size > CORPUS_BYTES:
            break
    return torch.frombuffer(bytearray(b"".join(text)), dtype=torch.uint8).long()


def random_batch(samples: int, tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs and the tokens that follow them, (samples, tokens) each."""
    data = corpus()
    first = torch.randint(len(data) - tokens - 1, (samples, 1), generator=generator)
    window = data[first + torch.arange(tokens + 1)]
    return window[:, :-1], window[:, 1:]


def train(
    config: ModelConfig,
    parametrization: Parametrization,
    lr: float,
    steps: int,
    samples: int,
    seed: int,
    warmup: int = 0,
    observe: Observer | None = None,
) -> list[float]:
    """The losses of `steps` steps of `samples` samples each, in nats per token.

    The seed sets the initial weights and the samples, which are the same for all models. The learning rate rises
    linearly over `warmup` steps and then falls linearly to 0 at the end, unless `warmup` is 0: then it is constant.
    """
    model = build_model(config, seed)
    scale_initial_weights(model, lambda kind: parametrization.multipliers(kind).initial)
    groups = parameter_groups(model, WEIGHT_DECAY, parametrization=parametrization)
    for group in groups:
        group["eps"] = EPSILON * group["eps_multiplier"]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=True)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(steps):
        if observe is not None:
            observe(model, step)
        ids, targets = random_batch(samples, config.context_length, generator)
        loss = model.loss(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        now = lr * min((step + 1) / warmup, (steps - step) / (steps - warmup)) if warmup else lr
        for group in optimizer.param_groups:
            group["lr"] = now * group["lr_multiplier"]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if observe is not None:
        observe(model, steps)
    return losses
