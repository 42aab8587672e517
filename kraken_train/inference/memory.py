"""The memory that serving takes on a device, computed before anything is loaded.

That is the weights and the key-value cache, and during a prompt the activations of one layer and the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from kraken_train.common.errors import ConfigError
from kraken_train.model.config import ModelConfig
from kraken_train.model.registry import build_model
from kraken_train.parallel.sharding import UnitRange

GIB = 2**30


@dataclass(frozen=True)
class ServingMemory:
    """Bytes on one device."""

    weights: int
    cache: int
    activations: int  # at most, an estimate; the other two are exact

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.activations


def serving_memory(
    config: ModelConfig, units: UnitRange, batch_size: int, capacity: int, dtype: torch.dtype, prompt_tokens: int = 0
) -> ServingMemory:
    """The memory of the part of the model that has these `units`, with a cache for `capacity` tokens of each sequence.

    `prompt_tokens` is the longest prompt, by default the whole capacity.
    """
    with torch.device("meta"):
        model = build_model(config, units=units)
    rows, kv_heads, head_dim = model.cache_shape
    weights = sum(parameter.numel() for parameter in model.parameters())
    cache = 2 * model.num_layers * rows * batch_size * kv_heads * head_dim * capacity
    # The peak is within the FFN: x, the attention's output, their sum and its norm, the inner width twice, of SwiGLU
    # three times; and once, for all rows, the embedding and the buffer of an all-reduce.
    tokens = batch_size * (prompt_tokens or capacity)
    inner = max(part.shape[-2] for name, part in model.named_parameters() if name.endswith("ffn.up.weight"))
    inner *= 2 if config.ffn == "gelu" else 3
    per_token = rows * (4 * config.hidden_size + inner) + 2 * config.embedding_width
    activations = tokens * per_token + 2 * batch_size * config.vocab_size
    return ServingMemory(*(values * dtype.itemsize for values in (weights, cache, activations)))


def free_memory(device: torch.device, processes: int = 1) -> int:
    """Bytes that this process may take; a machine's memory is shared by its `processes`, a GPU is not."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // processes


def require_memory(needs: Sequence[ServingMemory], free: Sequence[int], what: str) -> None:
    """Raises ConfigError unless each device has as many bytes free as its part of `what` needs."""
    if all(need.total <= available for need, available in zip(needs, free, strict=True)):
        return
    by_device = "; ".join(
        f"device {number} needs {gib(need.total)} (weights {gib(need.weights)}, key-value cache {gib(need.cache)}, "
        f"activations {gib(need.activations)}) and has {gib(available)} free"
        for number, (need, available) in enumerate(zip(needs, free, strict=True))
    )
    raise ConfigError(
        f"{what} does not fit into memory: {by_device}; use more devices, fewer or shorter prompts at a time, fewer "
        "new tokens, or dtype=bfloat16"
    )


def gib(number_of_bytes: int) -> str:
    return f"{number_of_bytes / GIB:.2f} GiB"
