"""Which head dimensions attention kernels take, and what to take instead of another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from kraken_train.model.config import GPTConfig, ModelConfig

STEP, LARGEST = 8, 256  # kernels such as FlashAttention take multiples of the one up to the other
SMALLEST = 32  # of what fused kernels are fast with
BEST = (64, 128)
NEAR = 0.03  # a fraction of the parameters


def head_size_note(config: ModelConfig) -> str | None:
    """What to know about a head dimension that no attention kernel takes, with the nearest model that has another."""
    size = config.head_dim
    if size % STEP == 0 and size <= LARGEST:
        return None
    near, name = nearest(config), "num_heads" if isinstance(config, GPTConfig) else "heads_per_sub_layer"
    difference = near.num_parameters / config.num_parameters - 1
    return (
        f"model.hidden_size={config.hidden_size} with model.{name}={heads(config)} makes heads of {size}, and "
        f"attention kernels take multiples of {STEP} up to {LARGEST}: attention is slower with others, and servers "
        f"such as vLLM may refuse the model; nearest in parameters ({difference:+.1%}) is "
        f"model.hidden_size={near.hidden_size} model.{name}={heads(near)}, with heads of {near.head_dim}"
    )


def head_dims(width: int) -> list[int]:
    """Those that divide the width."""
    return [size for size in range(SMALLEST, min(width, LARGEST) + 1, STEP) if width % size == 0]


def distance_to_best(head_dim: int) -> int:
    return min(abs(head_dim - best) for best in BEST)


def nearest(config: ModelConfig) -> ModelConfig:
    """Of the models with heads that kernels take, the one with the best heads near it, or else the nearest one."""

    def rank(other: ModelConfig) -> tuple[bool, bool, float, int, int]:
        difference = abs(other.num_parameters / config.num_parameters - 1)
        far = difference > NEAR
        best = distance_to_best(other.head_dim)
        return far, not far and best > 0, difference, best, heads(other)

    return min(of_other_widths(config), key=rank)


def of_other_widths(config: ModelConfig) -> Iterator[ModelConfig]:
    """With as many key-value heads, where these are a setting."""
    widest = max(2 * config.hidden_size, max(BEST) * config.kv_heads)
    for width in range(SMALLEST, widest + 1, STEP):
        for number in (width // head_dim for head_dim in head_dims(width)):
            if isinstance(config, GPTConfig):
                if number % (config.num_kv_heads or 1) == 0:
                    yield replace(config, hidden_size=width, num_heads=number)
            elif number % (config.kv_heads_per_sub_layer or 1) == 0:
                yield replace(config, hidden_size=width, heads_per_sub_layer=number)


def heads(config: ModelConfig) -> int:
    """Of a sub-layer, or of a layer of a baseline."""
    return config.num_heads if isinstance(config, GPTConfig) else config.heads_per_sub_layer
