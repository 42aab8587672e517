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
    """(B, V) and a generator for each row -> token ids (B,) on the device of the logits, which is not waited for.

    The random numbers are made on the CPU and the computation has at least fp32, so that a seed means the same on every
    device, up to the rounding of the probabilities. A row gets the token that `torch.multinomial` draws on the CPU.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / sampling.temperature
    noise = exponential_noise(logits, generators)
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if sampling.top_p is not None:
        ordered, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        # A token stays if those before it have not reached top_p: the first one always does.
        dropped = ordered.cumsum(dim=-1) - ordered >= sampling.top_p
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
    # Of independent exponential variables with these rates, each is the smallest with the probability of its rate.
    return (logits.softmax(dim=-1) / noise).argmax(dim=-1)


def exponential_noise(like: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Exp(1) of the shape (B, V), dtype and device of `like`; row i is drawn by the i-th generator, on the CPU."""
    # A copy from pinned memory does not wait; PyTorch keeps the memory until the copy is done.
    on_gpu = like.device.type == "cuda"
    noise = torch.empty(like.shape, dtype=like.dtype, pin_memory=on_gpu)
    for row, generator in zip(noise, generators, strict=True):
        row.exponential_(generator=generator)
    return noise.to(like.device, non_blocking=True)
