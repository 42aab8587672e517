"""From logits to the next token."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kraken_train.common.errors import ConfigError
from kraken_train.common.validation import require_at_least, require_positive


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; both limits may be combined, `top_k` then comes first."""

    temperature: float = 1.0  # logits are divided by it; 0 takes the most likely token
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raises ConfigError."""
        require_at_least("temperature", self.temperature, 0)
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed={self.seed} must be at least 0 and less than 2**63")
        if self.top_k is not None:
            require_positive("top_k", self.top_k)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be greater than 0 and at most 1")

    def generator(self, row: int) -> torch.Generator:
        """The random numbers of a row: a stream of its own, independent of its batch."""
        digest = hashlib.sha256(f"{self.seed}/{row}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def draw(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """(B, V) and a generator for each row -> token ids (B,) on the CPU.

    Drawn on the CPU and in fp32 at least, so that a seed means the same on every device. Equal logits give equal
    tokens on every rank.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1).cpu()
    logits = logits.to("cpu", torch.promote_types(logits.dtype, torch.float32)) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if sampling.top_p is not None:
        ordered, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        # A token stays if those before it have not reached top_p: the first one always does.
        dropped = ordered.cumsum(dim=-1) - ordered >= sampling.top_p
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
    chances = zip(logits.softmax(dim=-1), generators, strict=True)
    return torch.cat([torch.multinomial(row, num_samples=1, generator=generator) for row, generator in chances])
