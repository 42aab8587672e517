"""The models that the benchmarks compare: the sizes of the paper's figures, and the Kraken that matches each.

A standard layer of width D has 12 D^2 parameters, a Kraken layer of N sub-layers of width d has 8 N d^2, so
d is near D sqrt(1.5 / N). Source: arXiv 2408.07802, section 4.2 (sizes and widths of GPT-3, arXiv 2005.14165).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kraken_train.common.cli import compose_choice
from kraken_train.common.errors import ConfigError
from kraken_train.model.architecture import ModelConfig
from kraken_train.model.registry import ARCHITECTURES

LAYERS = PAPER, MODERN = ("paper", "modern")
REFERENCE = "standard"  # the architecture that the others are compared with
TOLERANCE = 0.03  # of parameters per layer
HEAD_DIM_STEP = 16
LARGEST_HEAD_DIM = 128
PREFERRED_HEAD_DIMS = (128, 96, 64)  # what attention kernels are tuned for


@dataclass(frozen=True)
class Size:
    """A standard Transformer."""

    name: str
    num_layers: int
    hidden_size: int
    head_dim: int = 128

    @property
    def num_heads(self) -> int:
        return self.hidden_size // self.head_dim


SIZES = {
    size.name: size
    for size in (
        Size("tiny", 2, 448, head_dim=56),  # small enough for a CPU; 2, 4 and 8 devices divide it
        Size("1.3b", 24, 2048),
        Size("6.7b", 32, 4096),
        Size("13b", 40, 5120),
        Size("65b", 80, 8192),
        Size("175b", 96, 12288),
    )
}


def architectures() -> tuple[str, ...]:
    """The names of all architectures, which can be compared."""
    return tuple(ARCHITECTURES)


def layer_settings(layers: str) -> dict[str, Any]:
    """What one of `LAYERS` changes in a model: nothing, or what conf/model/base/modern.yaml says."""
    return {} if layers == PAPER else compose_choice("model/base", layers)


def model_config(
    architecture: str, size: Size, degree: int, vocab_size: int, context_length: int, heads_multiple: int = 1
) -> ModelConfig:
    """The model of this architecture that is run on `degree` devices.

    One that is made for a number of devices gets dimensions with which it matches the size; another has those of the
    size. Raises ConfigError where the devices cannot share it, ValueError for an unknown architecture.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture={architecture} is not known; use one of {', '.join(ARCHITECTURES)}")
    schema = ARCHITECTURES[architecture]
    if schema.units_setting is not None:
        hidden_size, heads = matched_dimensions(architecture, size, degree, heads_multiple)
    elif size.num_heads % degree:
        raise ConfigError(f"degrees={degree} does not divide the {size.num_heads} heads of sizes={size.name}")
    else:
        hidden_size, heads = size.hidden_size, size.num_heads
    return schema.sized(
        architecture,
        devices=degree,
        num_layers=size.num_layers,
        hidden_size=hidden_size,
        heads=heads,
        vocab_size=vocab_size,
        context_length=context_length,
    )


def matched_dimensions(architecture: str, size: Size, degree: int, heads_multiple: int = 1) -> tuple[int, int]:
    """(width, heads) of a model for `degree` devices, with parameters per layer within `TOLERANCE` of the size's.

    Among all such widths with a multiple of `heads_multiple` heads the head dimension decides (`PREFERRED_HEAD_DIMS`,
    then the largest), then how close the parameters are. Raises ConfigError where no width fits.
    """
    widths = range(HEAD_DIM_STEP, 2 * size.hidden_size, HEAD_DIM_STEP)
    excesses = {width: layer_excess(architecture, width, size, degree) for width in widths}
    candidates = [
        (width, head_dim)
        for width, excess in excesses.items()
        if abs(excess) <= TOLERANCE
        for head_dim in range(HEAD_DIM_STEP, LARGEST_HEAD_DIM + 1, HEAD_DIM_STEP)
        if width % (head_dim * heads_multiple) == 0
    ]
    if not candidates:
        raise ConfigError(
            f"degrees={degree}: no {degree}-way {architecture} whose width is a multiple of "
            f"{HEAD_DIM_STEP * heads_multiple} matches sizes={size.name} within {TOLERANCE:.0%}; use 2, 4 or 8"
        )

    def rank(candidate: tuple[int, int]) -> tuple[int, int, float]:
        width, head_dim = candidate
        preferred = head_dim in PREFERRED_HEAD_DIMS
        place = PREFERRED_HEAD_DIMS.index(head_dim) if preferred else len(PREFERRED_HEAD_DIMS)
        return place, -head_dim, abs(excesses[width])

    width, head_dim = min(candidates, key=rank)
    return width, width // head_dim


def layer_excess(architecture: str, width: int, size: Size, degree: int) -> float:
    """Parameters of a layer of this width more than the standard's, as a fraction of those."""
    config = ARCHITECTURES[architecture].sized(
        architecture, devices=degree, num_layers=1, hidden_size=width, heads=1, vocab_size=1, context_length=1
    )
    layer = sum(matrix.parameters for part in config.layer_parts(1).values() for matrix in part.matrices)
    return layer / (12 * size.hidden_size**2) - 1


def require_axis(name: str, values: Sequence[object]) -> None:
    """The values of a setting are compared with each other, so each counts once. Raises ConfigError."""
    if not values or len(set(values)) < len(values):
        raise ConfigError(f"{name}={list(values)} must name at least one, and none twice")
