"""Kraken with the parameters of a standard Transformer: python -m kraken_train.derive model=gpt2-124m num_sub_layers=4

With `architecture=track` it finds Parallel Track Transformers, whose tracks take the place of sub-layers.

Layers, vocabulary, context and what a layer is made of (norm, FFN, positions, ...) are those of the base.

- By default the heads of a sub-layer are together as wide as its stream, as in the paper. The search is over the width
  d of a sub-layer, in multiples of 8 that divide into heads whose dimension is a multiple of 8, since others are slow
  on matrix units.
- With `max_attention_cost` the heads are as many as this allows, of 64 or 128, and the search is over the width, the
  head dimension and the FFN's inner width together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from kraken_train.common.cli import run_entry
from kraken_train.common.errors import ConfigError
from kraken_train.common.validation import require_choice, require_positive
from kraken_train.model.config import ModelConfig, ModelSettings, parse_model
from kraken_train.model.head_dims import (
    BEST,
    FASTEST_UP_TO,
    SMALLEST,
    STEP,
    attention_work,
    computed_size,
    distance_to_best,
    head_dims,
)
from kraken_train.model.layer_settings import LayerSettings
from kraken_train.model.registry import ARCHITECTURES, DEFAULT_ARCHITECTURE

BYTES_PER_VALUE = 2  # bf16
ALIGNED = 64  # what widths are multiples of where they are free
MOST_ROWS = 20  # of the table
WIDE_HEAD_FRACTION = 0.6  # rate of attention with heads of more than 128; an assumption, as in conf/cluster


@dataclass(frozen=True)
class DeriveConfig:
    """See conf/derive.yaml."""

    model: ModelSettings
    architecture: str  # of the model to find: one that is made for a number of devices, kraken or track
    num_sub_layers: int  # sub-layers of the Kraken to find, or tracks
    tolerance: float  # largest relative difference of the parameter counts
    # largest width of all heads of a layer relative to the base's, which decides the time of attention and the
    # key-value cache; null: heads as wide as the streams, as in the paper, 1.8 to 3.3 times the base's
    max_attention_cost: float | None
    # width of the embedding and of the head of the Kraken to find, for example the base's hidden_size; null: the
    # Kraken's own hidden_size, as in the paper
    embedding_size: int | None

    def validate(self) -> None:
        """Raises ConfigError."""
        require_choice("architecture", self.architecture, made_for_devices())
        require_positive("num_sub_layers", self.num_sub_layers)
        if not 0 < self.tolerance < 1:
            raise ConfigError(
                f"tolerance={self.tolerance} must be greater than 0 and less than 1: it is a fraction, 0.02 means 2%"
            )
        if self.max_attention_cost is not None:
            require_positive("max_attention_cost", self.max_attention_cost)
        if self.embedding_size is not None:
            require_positive("embedding_size", self.embedding_size)
            require_choice("with embedding_size, architecture", self.architecture, with_embedding_size())


def made_for_devices() -> tuple[str, ...]:
    """The architectures with a setting for the number of devices."""
    return tuple(name for name, schema in ARCHITECTURES.items() if schema.units_setting is not None)


def with_embedding_size() -> tuple[str, ...]:
    """Those of them whose embedding may have a width of its own."""
    return tuple(name for name in made_for_devices() if "embedding_size" in ARCHITECTURES[name].setting_names())


@dataclass(frozen=True)
class Candidate:
    """A Kraken, or another that is made for a number of devices, and the standard Transformer that it matches."""

    config: ModelConfig
    base: ModelConfig

    @property
    def difference(self) -> float:
        """Parameters more than the base has, as a fraction of the base's."""
        return self.config.num_parameters / self.base.num_parameters - 1

    @property
    def attention_cost(self) -> float:
        """Work of attention's scores and sums relative to the base: the width of all heads of a layer."""
        return self.config.attention_width / self.base.attention_width

    @property
    def attention_time(self) -> float:
        """Time of attention relative to the base: the cost, by the kernels that take heads of this size."""
        own, base = (attention_work(config, WIDE_HEAD_FRACTION) for config in (self.config, self.base))
        return own / base

    @property
    def cache_bytes(self) -> int:
        """Key-value cache in bytes per token and device (bf16), each of N devices holding one sub-layer."""
        return cache_bytes(self.config.num_layers, self.config.kv_size)

    @property
    def base_cache_bytes(self) -> int:
        """The same for the base under N-way tensor parallelism, which splits it by whole heads."""
        heads = math.ceil(self.base.kv_heads / self.config.num_streams)
        return cache_bytes(self.base.num_layers, heads * self.base.head_size)

    @property
    def message_bytes(self) -> int:
        """Bytes of an all-reduce for each token (bf16). The base's are two a layer, of its width."""
        return self.config.hidden_size * BYTES_PER_VALUE

    @property
    def ffn_multiplier(self) -> float:
        """Inner width of an FFN in units of the stream's, of a GELU FFN with as many parameters."""
        return self.config.ffn_size / self.config.hidden_size * (1.5 if self.config.ffn == "swiglu" else 1)

    @property
    def overrides(self) -> str:
        """The command-line settings that train this model."""
        return " ".join(model_overrides(self.config))

    @property
    def rank(self) -> tuple[float, ...]:
        """Smaller is better: sizes that fill matrix units, then closeness, then fewer heads."""
        if self.config.ffn_hidden_size is None:
            return (self.config.head_size not in BEST, abs(self.difference), self.config.heads)
        # Where the FFN is free, the one nearest to the paper's multiplier.
        distance = abs(math.log(self.ffn_multiplier / type(self.config).defaults()["ffn_multiplier"]))
        other_heads = self.config.head_size != self.base.head_size
        return (other_heads, distance)


def model_overrides(config: ModelConfig) -> list[str]:
    """The command-line settings that train a model: all but those at their default, which conf/model has too."""
    base = config.architecture if config.units_setting is not None else "gpt"
    settings = [f"model=base/{base}"]
    for field in fields(cast(Any, config)):
        value = getattr(config, field.name)
        if value != field.default or (field.name == "architecture" and base == "gpt"):
            settings.append(f"model.{field.name}={value}")
    return settings


def cache_bytes(num_layers: int, width: int) -> int:
    return num_layers * 2 * width * BYTES_PER_VALUE  # keys and values


def derive(
    base: ModelConfig,
    num_sub_layers: int,
    tolerance: float = 0.02,
    max_attention_cost: float | None = None,
    architecture: str = DEFAULT_ARCHITECTURE,
    embedding_size: int | None = None,
) -> list[Candidate]:
    """Models whose parameters differ from the base's by at most `tolerance` (a fraction), the best first.

    `max_attention_cost` and `embedding_size` as in `DeriveConfig`. Raises ConfigError if the base is not a standard or
    parallel Transformer, or if no width fits.
    """
    if not base.is_baseline:
        raise ConfigError(f"model.architecture={base.architecture} is no base to derive from; use model=gpt2-124m or "
                          "another standard Transformer")  # fmt: skip
    like = Likeness(base, architecture, num_sub_layers, embedding_size)
    if max_attention_cost is None:
        candidates = list(candidates_near(base, like, tolerance))
    else:
        candidates = list(candidates_with_free_attention(base, like, max_attention_cost))
    fitting = [candidate for candidate in candidates if abs(candidate.difference) <= tolerance]
    if not fitting:
        nearest = min(candidates, key=lambda candidate: abs(candidate.difference))
        needed = round_up(abs(nearest.difference))
        raise ConfigError(
            f"no width of {num_sub_layers} sub-layers is within tolerance={tolerance} of the base's "
            f"{base.num_parameters:,} parameters; the nearest, hidden_size={nearest.config.hidden_size}, differs by "
            f"{nearest.difference:+.1%}: use {f'tolerance={needed:g} or ' if needed < 1 else ''}another num_sub_layers"
        )
    return sorted(fitting, key=lambda candidate: candidate.rank)


def round_up(fraction: float) -> float:
    return math.ceil(fraction * 1000) / 1000


def candidates_near(base: ModelConfig, like: Likeness, tolerance: float) -> Iterator[Candidate]:
    """Candidates of all widths from the smallest to the first with too many parameters, inclusive."""
    width, too_large = STEP, False
    while not too_large:
        for head_dim in good_head_dims(width):
            candidate = Candidate(like.model(width, width // head_dim), base)
            too_large = candidate.difference > tolerance
            yield candidate
        width += STEP


def candidates_with_free_attention(base: ModelConfig, like: Likeness, cost: float) -> Iterator[Candidate]:
    """Of each width and best head dimension, the FFN's width with which the parameters are nearest to the base's.

    The FFN's multiplier is between 1 and twice the usual one. Raises ConfigError where not even one head a sub-layer is
    allowed.
    """
    num_sub_layers = like.num_sub_layers
    widest = 2 * ARCHITECTURES[like.architecture].defaults()["ffn_multiplier"]
    most = cost * base.attention_width / num_sub_layers  # width of the heads of a sub-layer
    smallest = min(BEST) if most >= min(BEST) else SMALLEST
    if most < smallest:
        least = round_up(smallest * num_sub_layers / base.attention_width)
        raise ConfigError(
            f"max_attention_cost={cost} leaves {most:.0f} values for the heads of each of {num_sub_layers} sub-layers, "
            f"and one head takes {smallest}; use max_attention_cost={least:g} or fewer sub-layers"
        )
    step = ALIGNED if base.hidden_size >= 8 * ALIGNED else STEP
    for width in range(step, 2 * base.hidden_size, step):
        for head_dim in [size for size in BEST if size <= most] or [smallest]:
            of_width = like.model(width, int(most // head_dim), head_dim)
            thin, thicker = (of_width.replace(ffn_hidden_size=size) for size in (ALIGNED, 2 * ALIGNED))
            per_step = thicker.num_parameters - thin.num_parameters
            steps = 1 + round((base.num_parameters - thin.num_parameters) / per_step)
            if steps >= 1:
                candidate = Candidate(thin.replace(ffn_hidden_size=steps * ALIGNED), base)
                if 1 <= candidate.ffn_multiplier <= widest:
                    yield candidate


def good_head_dims(width: int) -> list[int]:
    """The best head dimensions if they divide the width, otherwise the nearest multiple of 8 that does, if any."""
    possible = head_dims(width)
    return [size for size in possible if size in BEST] or sorted(possible, key=distance_to_best)[:1]


@dataclass(frozen=True)
class Likeness:
    """Models with the base's kind of layers, of another architecture."""

    base: ModelConfig
    architecture: str
    num_sub_layers: int
    embedding_size: int | None = None

    def model(self, width: int, heads: int, head_dim: int | None = None) -> ModelConfig:
        """One with heads and FFN of its own."""
        base, schema = self.base, ARCHITECTURES[self.architecture]
        settings: dict[str, Any] = {field.name: getattr(base, field.name) for field in fields(LayerSettings)}
        settings |= {"architecture": self.architecture, "head_dim": head_dim, "ffn_hidden_size": None}
        settings |= {cast(str, schema.units_setting): self.num_sub_layers, schema.heads_setting: heads}
        for name in ("num_layers", "vocab_size", "context_length", "norm_epsilon"):
            settings[name] = getattr(base, name)
        settings["hidden_size"] = width
        if self.embedding_size is not None:
            settings["embedding_size"] = self.embedding_size
        return schema(**settings)


def nearest_with_best_heads(
    base: ModelConfig,
    num_sub_layers: int,
    architecture: str = DEFAULT_ARCHITECTURE,
    embedding_size: int | None = None,
) -> Candidate:
    """The model with heads of 64 or 128 whose parameters are nearest to the base's, at any distance."""
    like, candidates = Likeness(base, architecture, num_sub_layers, embedding_size), []
    for width in range(min(BEST), 4 * base.hidden_size, min(BEST)):
        head_dim = max(k for k in BEST if width % k == 0)
        candidates.append(Candidate(like.model(width, width // head_dim), base))
    return min(candidates, key=lambda candidate: abs(candidate.difference))


def as_table(candidates: list[Candidate]) -> Table:
    base, first = candidates[0].base, candidates[0].config
    table = Table(
        title=f"{first.title} for {base.num_layers} layers of {base.hidden_size}, {base.num_parameters:,} parameters",
        caption="attention: width of all heads relative to the base's. time: that of attention relative to the base's, "
        "by the kernels that take such heads. In bf16 on "
        f"{first.num_streams} devices: bytes per token and device of the key-value cache, the base's with tensor "
        "parallelism; and bytes per token of a layer's all-reduce",
    )
    names = "hidden size, heads, head dim, FFN, parameters, difference, attention, time, cache, base's, message"
    for name in names.split(", "):
        table.add_column(name, justify="right")
    for candidate in candidates[:MOST_ROWS]:
        config = candidate.config
        table.add_row(
            str(config.hidden_size),
            str(config.heads),
            str(config.head_size),
            str(config.ffn_size),
            f"{config.num_parameters:,}",
            f"{candidate.difference:+.2%}",
            f"{candidate.attention_cost:.2f}x",
            f"{candidate.attention_time:.2f}x",
            f"{candidate.cache_bytes:,}",
            f"{candidate.base_cache_bytes:,}",
            f"{candidate.message_bytes:,}",
        )
    return table


def print_candidates(config: DeriveConfig) -> None:
    """Print the candidates and how to train the best one."""
    if config.model.get("vocab_size") is None:
        raise ConfigError("model.vocab_size is not set, and the parameters depend on it; give model.vocab_size=NUMBER")
    base = parse_model(config.model)
    candidates = derive(
        base,
        config.num_sub_layers,
        config.tolerance,
        config.max_attention_cost,
        config.architecture,
        config.embedding_size,
    )
    console = Console(width=None if Console().is_terminal else 120)
    console.print(as_table(candidates))
    print(f"to train the first: python -m kraken_train.train {candidates[0].overrides}")
    size = candidates[0].config.head_size
    if size > FASTEST_UP_TO or computed_size(size) > size:
        slower = f", and slower ones where they are larger than {FASTEST_UP_TO}" if size > FASTEST_UP_TO else ""
        print(f"attention kernels compute its heads of {size} as heads of {computed_size(size)}{slower}")
    if candidates[0].config.head_size not in BEST:
        faster = nearest_with_best_heads(
            candidates[0].base, config.num_sub_layers, config.architecture, config.embedding_size
        )
        needed = round_up(abs(faster.difference))
        if needed < 1:
            print(
                f"heads of 64 or 128 are fastest: hidden_size={faster.config.hidden_size} would have them at "
                f"{faster.difference:+.1%} parameters (tolerance={needed:g})"
            )


def main() -> None:
    run_entry(print_candidates, DeriveConfig, "derive")


if __name__ == "__main__":
    main()
