"""Loss and perplexity over windows of tokens, the same at any batch size and number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kraken_train.model import LanguageModel


@dataclass(frozen=True)
class Evaluation:
    loss: float  # nats per token
    perplexity: float
    tokens: int  # predicted
    bits_per_byte: float | None = None  # of the documents' UTF-8 text; None if its size is unknown


def evaluate(model: LanguageModel, windows: Iterable[NDArray[np.int64]], text_bytes: int | None = None) -> Evaluation:
    """The mean over all targets of `windows`, whatever their sizes; `text_bytes` is the size of the text they are."""
    total, tokens = 0.0, 0
    for batch in windows:
        batch_sum, batch_tokens = token_losses(model, batch)
        total += batch_sum
        tokens += batch_tokens
    loss = total / tokens
    bits_per_byte = total / math.log(2) / text_bytes if text_bytes else None
    return Evaluation(loss, perplexity(loss), tokens, bits_per_byte)


@torch.no_grad()
def token_losses(model: LanguageModel, windows: NDArray[np.int64]) -> tuple[float, int]:
    """(sum of cross-entropies in nats, number of targets) of windows (B, T + 1), summed in float64."""
    ids = torch.from_numpy(windows).to(model.token_embedding.weight.device)
    losses = model.token_losses(ids[:, :-1], ids[:, 1:])
    return float(losses.double().sum()), losses.numel()


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that is too large for a float."""
    return math.inf if loss > 700 else math.exp(loss)
