"""Kraken with the parameters of a standard Transformer: python -m kraken_train.derive model=gpt2-124m num_sub_layers=4

Layers, vocabulary and context are those of the base. The search is over the width d of a sub-layer, in multiples of 8
that divide into heads whose dimension is a multiple of 8, since others are slow on matrix units.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

from rich.console import Console
from rich.table import Table

from kraken_train.common.cli import run_entry
from kraken_train.common.errors import ConfigError
from kraken_train.common.validation import require_positive
from kraken_train.model.config import KrakenConfig, ModelConfig, ModelSettings, parse_model
from kraken_train.model.head_dims import BEST, STEP, distance_to_best, head_dims

BYTES_PER_VALUE = 2  # bf16


@dataclass(frozen=True)
class DeriveConfig:
    """See conf/derive.yaml."""

    model: ModelSettings
    num_sub_layers: int  # sub-layers of the Kraken to find
    tolerance: float  # largest relative difference of the parameter counts

    def validate(self) -> None:
        """Raises ConfigError."""
        require_positive("num_sub_layers", self.num_sub_layers)
        if not 0 < self.tolerance < 1:
            raise ConfigError(
                f"tolerance={self.tolerance} must be greater than 0 and less than 1: it is a fraction, 0.02 means 2%"
            )


@dataclass(frozen=True)
class Candidate:
    """A Kraken and the standard Transformer that it matches."""

    config: KrakenConfig
    base: ModelConfig

    @property
    def difference(self) -> float:
        """Parameters more than the base has, as a fraction of the base's."""
        return self.config.num_parameters / self.base.num_parameters - 1

    @property
    def attention_cost(self) -> float:
        """Work of attention's scores and sums relative to the base: N d / D."""
        return self.config.attention_width / self.base.attention_width

    @property
    def cache_bytes(self) -> int:
        """Key-value cache in bytes per token and device (bf16), each of N devices holding one sub-layer."""
        return cache_bytes(self.config.num_layers, self.config.hidden_size)

    @property
    def base_cache_bytes(self) -> int:
        """The same for the base under N-way tensor parallelism, which splits it by whole heads."""
        heads = math.ceil(self.base.heads / self.config.num_sub_layers)
        return cache_bytes(self.base.num_layers, heads * self.base.head_size)

    @property
    def overrides(self) -> str:
        """The command-line settings that train this model: all but those at their default, which conf/model has too."""
        values = [(field.name, getattr(self.config, field.name), field.default) for field in fields(self.config)]
        settings = [f"model.{name}={value}" for name, value, default in values if value != default]
        return " ".join(["model=kraken-125m-4way", *settings])

    @property
    def rank(self) -> tuple[bool, float, int]:
        """Smaller is better: heads that fill matrix units, then closeness, then fewer heads."""
        return (self.config.head_size not in BEST, abs(self.difference), self.config.heads_per_sub_layer)


def cache_bytes(num_layers: int, width: int) -> int:
    return num_layers * 2 * width * BYTES_PER_VALUE  # keys and values


def derive(base: ModelConfig, num_sub_layers: int, tolerance: float = 0.02) -> list[Candidate]:
    """Krakens whose parameters differ from the base's by at most `tolerance` (a fraction), the best first.

    Raises ConfigError if the base is not a standard or parallel Transformer, or if no width fits.
    """
    if not base.is_baseline:
        raise ConfigError(f"model.architecture={base.architecture} is no base to derive from; use model=gpt2-124m or "
                          "another standard Transformer")  # fmt: skip
    candidates = list(candidates_near(base, num_sub_layers, tolerance))
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


def candidates_near(base: ModelConfig, num_sub_layers: int, tolerance: float) -> Iterator[Candidate]:
    """Candidates of all widths from the smallest to the first with too many parameters, inclusive."""
    width, too_large = STEP, False
    while not too_large:
        for head_dim in good_head_dims(width):
            candidate = Candidate(kraken_like(base, num_sub_layers, width, width // head_dim), base)
            too_large = candidate.difference > tolerance
            yield candidate
        width += STEP


def good_head_dims(width: int) -> list[int]:
    """The best head dimensions if they divide the width, otherwise the nearest multiple of 8 that does, if any."""
    possible = head_dims(width)
    return [size for size in possible if size in BEST] or sorted(possible, key=distance_to_best)[:1]


def kraken_like(base: ModelConfig, num_sub_layers: int, width: int, heads: int) -> KrakenConfig:
    return KrakenConfig(
        num_sub_layers=num_sub_layers,
        num_layers=base.num_layers,
        hidden_size=width,
        heads_per_sub_layer=heads,
        vocab_size=base.vocab_size,
        context_length=base.context_length,
        norm_epsilon=base.norm_epsilon,
    )


def nearest_with_best_heads(base: ModelConfig, num_sub_layers: int) -> Candidate:
    """The Kraken with heads of 64 or 128 whose parameters are nearest to the base's, at any distance."""
    candidates = []
    for width in range(min(BEST), 4 * base.hidden_size, min(BEST)):
        head_dim = max(k for k in BEST if width % k == 0)
        candidates.append(Candidate(kraken_like(base, num_sub_layers, width, width // head_dim), base))
    return min(candidates, key=lambda candidate: abs(candidate.difference))


def as_table(candidates: list[Candidate]) -> Table:
    base, num_sub_layers = candidates[0].base, candidates[0].config.num_sub_layers
    table = Table(
        title=f"{num_sub_layers}-way Kraken for {base.num_layers} layers of {base.hidden_size}, "
        f"{base.num_parameters:,} parameters",
        caption=f"key-value cache: bytes per token and device in bf16 on {num_sub_layers} devices, "
        "the base with tensor parallelism",
    )
    for name in ("hidden size", "heads", "head dim", "parameters", "difference", "attention cost", "cache", "base's"):
        table.add_column(name, justify="right")
    for candidate in candidates:
        config = candidate.config
        table.add_row(
            str(config.hidden_size),
            str(config.heads_per_sub_layer),
            str(config.head_size),
            f"{config.num_parameters:,}",
            f"{candidate.difference:+.2%}",
            f"{candidate.attention_cost:.2f}x",
            f"{candidate.cache_bytes:,}",
            f"{candidate.base_cache_bytes:,}",
        )
    return table


def print_candidates(config: DeriveConfig) -> None:
    """Print the candidates and how to train the best one."""
    if config.model.get("vocab_size") is None:
        raise ConfigError("model.vocab_size is not set, and the parameters depend on it; give model.vocab_size=NUMBER")
    candidates = derive(parse_model(config.model), config.num_sub_layers, config.tolerance)
    console = Console(width=None if Console().is_terminal else 120)
    console.print(as_table(candidates))
    print(f"to train the first: python -m kraken_train.train {candidates[0].overrides}")
    if candidates[0].config.head_size not in BEST:
        faster = nearest_with_best_heads(candidates[0].base, config.num_sub_layers)
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
