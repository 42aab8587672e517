"""Which head dimensions attention kernels support, and the nearest model for one that they do not."""

from __future__ import annotations

from collections.abc import Iterator

from kraken_train.model.architecture import ModelConfig

STEP, LARGEST = 8, 256  # kernels such as FlashAttention support multiples of STEP up to LARGEST
SMALLEST = 32  # fused kernels are slow with smaller ones
BEST = (64, 128)
COMPUTED = (32, 64, 96, 128, 192, 256)  # of which FlashAttention-2 has kernels; others are computed as the next larger
# On H100 the fastest kernels, those of cuDNN, are for heads up to this size. Most larger ones have no backward pass
# there, so that FlashAttention-2 takes them.
FASTEST_UP_TO = 128
NEAR = 0.03  # a fraction of the parameters


def head_size_note(config: ModelConfig) -> str | None:
    """A note on a head dimension that no attention kernel supports, with the nearest model without; None: supported."""
    size = config.head_size
    if size % STEP == 0 and size <= LARGEST:
        return None
    refused = f"and attention kernels take multiples of {STEP} up to {LARGEST}: attention is slower with others"
    if config.head_dim is not None:
        return (
            f"model.head_dim={size}, {refused}, and servers such as vLLM may refuse the model; use model.head_dim="
            f"{min(LARGEST, -(-size // STEP) * STEP)}"
        )
    near, name = nearest(config), config.heads_setting
    difference = near.num_parameters / config.num_parameters - 1
    return (
        f"model.hidden_size={config.hidden_size} with model.{name}={config.heads} makes heads of {size}, "
        f"{refused}, and servers such as vLLM may refuse the model; nearest in parameters ({difference:+.1%}) is "
        f"model.hidden_size={near.hidden_size} model.{name}={near.heads}, with heads of {near.head_size}"
    )


def computed_size(head_size: int) -> int:
    """The head dimension that kernels compute in place of this one."""
    return next((size for size in COMPUTED if size >= head_size), head_size)


def attention_work(config: ModelConfig, wide_head_fraction: float) -> float:
    """Width of all heads of a layer as kernels compute them; heads that fastest kernels do not take count for more.

    `wide_head_fraction` is the rate of the kernel that takes those, relative to the fastest.
    """
    work = config.attention_width * computed_size(config.head_size) / config.head_size
    return work / wide_head_fraction if config.head_size > FASTEST_UP_TO else work


def head_dims(width: int) -> list[int]:
    """Head dimensions of fast kernels that divide the width."""
    return [size for size in range(SMALLEST, min(width, LARGEST) + 1, STEP) if width % size == 0]


def distance_to_best(head_dim: int) -> int:
    return min(abs(head_dim - best) for best in BEST)


def nearest(config: ModelConfig) -> ModelConfig:
    """Of the models with supported heads, the one with the best heads within NEAR in parameters, or the nearest one."""

    def rank(other: ModelConfig) -> tuple[bool, bool, float, int, int]:
        difference = abs(other.num_parameters / config.num_parameters - 1)
        far = difference > NEAR
        best = distance_to_best(other.head_size)
        return far, not far and best > 0, difference, best, other.heads

    return min(with_other_widths(config), key=rank)


def with_other_widths(config: ModelConfig) -> Iterator[ModelConfig]:
    """The same model with other widths and heads, and as many key-value heads where these are a setting."""
    widest = max(2 * config.hidden_size, max(BEST) * config.kv_heads)
    fixed_kv_heads = getattr(config, config.kv_heads_setting) or 1
    for width in range(SMALLEST, widest + 1, STEP):
        for heads in (width // head_dim for head_dim in head_dims(width)):
            if heads % fixed_kv_heads == 0:
                yield config.with_heads(width, heads)
