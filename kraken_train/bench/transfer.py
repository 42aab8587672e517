"""Whether learning rates transfer: python -m kraken_train.bench.transfer output_dir=FOLDER

Trains small models on the embedded corpus, in the standard parametrization and in muP. Coordinate checks: how much a
few updates change the activations of models of growing width, depth and number of sub-layers. Sweep: the loss by
learning rate, of a small model and of models that are larger in one of these.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kraken_train.bench.coordinates import check_coordinates, growth
from kraken_train.bench.grid import architectures, require_axis
from kraken_train.bench.small_training import BYTES, train
from kraken_train.bench.transfer_figure import draw_coordinates, draw_sweep
from kraken_train.common.cli import run_entry
from kraken_train.common.free_text import FilePath
from kraken_train.common.output import open_output
from kraken_train.common.validation import require_at_least, require_choice, require_divides, require_positive
from kraken_train.model.architecture import ModelConfig
from kraken_train.model.registry import ARCHITECTURES
from kraken_train.recipe.optimizers import PARAMETRIZATIONS
from kraken_train.recipe.parametrization import STANDARD, Parametrization

SMALL = "small"
DIMENSIONS = ("width", "depth", "sub-layers")


@dataclass(frozen=True)
class TransferConfig:
    """See conf/transfer.yaml."""

    architecture: str  # values of model.architecture, which docs/models.md lists
    hidden_size: int  # of the small model
    num_layers: int  # of the small model, and of the base of muP
    num_sub_layers: int  # of the small model, and of the base of muP, if it is a Kraken
    base_hidden_size: int  # of the base of muP
    head_size: int  # of all models
    positions: str  # learned | rope, of all models
    context_length: int  # bytes of a sample
    dimensions: tuple[str, ...]  # width, depth, sub-layers: in which of these models grow
    # how many times larger than the small one the models of the coordinate checks are; []: none
    factors: tuple[int, ...]
    check_lr: float  # learning rate of the coordinate checks
    check_steps: int  # updates of the coordinate checks
    check_seeds: int  # of the coordinate checks, whose mean counts
    sweep_factor: int  # how many times larger than the small model the large one of the sweep is
    learning_rates: tuple[float, ...]  # of the sweep; []: no sweep
    sweep_steps: int  # optimizer steps of each training of the sweep, a tenth of them warm-up
    sweep_samples: int  # samples of an optimizer step of the sweep
    seed: int  # of initial weights and samples
    output_dir: FilePath  # folder for transfer.json, coordinates.svg and sweep.svg

    def validate(self) -> None:
        """Raises ConfigError."""
        require_choice("architecture", self.architecture, architectures())
        for name in ("hidden_size", "num_layers", "num_sub_layers", "base_hidden_size", "head_size", "context_length",
                     "check_lr", "check_steps", "check_seeds", "sweep_factor", "sweep_samples"):  # fmt: skip
            require_positive(name, getattr(self, name))
        require_divides("head_size", self.head_size, "hidden_size", self.hidden_size)
        require_at_least("sweep_steps", self.sweep_steps, 10)
        require_axis("dimensions", self.dimensions)
        for dimension in self.dimensions:
            require_choice("dimensions", dimension, DIMENSIONS if self.has_sub_layers else DIMENSIONS[:2])
        for factor in (*self.factors, *self.learning_rates):
            require_positive("factors and learning_rates", factor)

    @property
    def has_sub_layers(self) -> bool:
        return ARCHITECTURES[self.architecture].units_setting is not None

    def model(self, dimension: str, factor: int) -> ModelConfig:
        """The small model, so many times larger in a dimension."""
        width, depth, streams = factors_of(dimension, factor)
        return (
            ARCHITECTURES[self.architecture]
            .sized(
                self.architecture,
                devices=self.num_sub_layers * streams,
                num_layers=self.num_layers * depth,
                hidden_size=self.hidden_size * width,
                heads=self.hidden_size * width // self.head_size,
                vocab_size=BYTES,
                context_length=self.context_length,
            )
            .replace(positions=self.positions)
        )

    def parametrizations(self, dimension: str, factor: int) -> dict[str, Parametrization]:
        """Both of that model, by name."""
        width, depth, streams = factors_of(dimension, factor)
        mup = Parametrization(self.hidden_size * width / self.base_hidden_size, depth, streams)
        return dict(zip(PARAMETRIZATIONS, (STANDARD, mup), strict=True))


def factors_of(dimension: str, factor: int) -> tuple[int, int, int]:
    """How many times larger the width, the depth and the number of sub-layers are."""
    width, depth, streams = (factor if dimension == name else 1 for name in DIMENSIONS)
    return width, depth, streams


def check(config: TransferConfig) -> Iterator[dict[str, Any]]:
    """A row for each activation of each model."""
    for dimension in config.dimensions:
        for factor in config.factors:
            for name, parametrization in config.parametrizations(dimension, factor).items():
                model = config.model(dimension, factor)
                seeds = range(config.seed, config.seed + config.check_seeds)
                sizes = check_coordinates(model, parametrization, config.check_lr, config.check_steps, seeds)
                row = {"dimension": dimension, "factor": factor, "parametrization": name}
                yield from ({**row, "activation": label, **asdict(size)} for label, size in sizes.items())


def sweep(config: TransferConfig) -> Iterator[dict[str, Any]]:
    """A row for each training: the mean loss of the last tenth of its steps."""
    for label, dimension, factor in [
        (SMALL, DIMENSIONS[0], 1),
        *((d, d, config.sweep_factor) for d in config.dimensions),
    ]:
        for name, parametrization in config.parametrizations(dimension, factor).items():
            for lr in config.learning_rates:
                loss = final_loss(config, config.model(dimension, factor), parametrization, lr)
                yield {"model": label, "parametrization": name, "lr": lr, "loss": loss}


@functools.cache  # at the base both parametrizations are the same
def final_loss(config: TransferConfig, model: ModelConfig, parametrization: Parametrization, lr: float) -> float:
    steps, tenth = config.sweep_steps, config.sweep_steps // 10
    losses = train(model, parametrization, lr, steps, config.sweep_samples, config.seed, warmup=tenth)
    return sum(losses[-tenth:]) / tenth


def growth_table(rows: list[dict[str, Any]]) -> Table:
    """The exponents with which the changes of activations grow."""
    table = Table(title="Changes of activations grow as size ^ exponent")
    kinds = list(dict.fromkeys((row["dimension"], row["parametrization"]) for row in rows))
    for name in ("activation", *(f"{dimension}\n{parametrization}" for dimension, parametrization in kinds)):
        table.add_column(name, justify="right")
    for label in dict.fromkeys(row["activation"] for row in rows):
        of_label = [row for row in rows if row["activation"] == label]
        cells = [
            {row["factor"]: row["change"] for row in of_label if (row["dimension"], row["parametrization"]) == kind}
            for kind in kinds
        ]
        table.add_row(label, *(f"{growth(cell):+.2f}" for cell in cells))
    return table


def sweep_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Loss by learning rate, nats per byte; *: the least")
    losses: dict[tuple[str, str], dict[float, float]] = {}
    for row in rows:
        losses.setdefault((row["model"], row["parametrization"]), {})[row["lr"]] = row["loss"]
    for name in ("lr", *("\n".join(kind) for kind in losses)):
        table.add_column(name, justify="right")
    for lr in sorted({row["lr"] for row in rows}):
        cells = ((of_kind[lr], min(of_kind.values())) for of_kind in losses.values())
        table.add_row(f"{lr:g}", *(f"{loss:.3f}{'*' if loss == least else ' '}" for loss, least in cells))
    return table


def measure_transfer(config: TransferConfig) -> None:
    output_dir = Path(config.output_dir)
    open_output(output_dir)
    console = Console(width=None if Console().is_terminal else 160)
    checks = list(check(config))
    if checks:
        console.print(growth_table(checks))
        title = f"{config.model(DIMENSIONS[0], 1).title}: {config.check_steps} updates at {config.check_lr:g}"
        draw_coordinates(checks, title, output_dir / "coordinates.svg")
    swept = list(sweep(config))
    if swept:
        console.print(sweep_table(swept))
        draw_sweep(swept, SMALL, config.sweep_factor, output_dir / "sweep.svg")
    record = {"settings": asdict(config), "checks": checks, "sweep": swept}
    (output_dir / "transfer.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    run_entry(measure_transfer, TransferConfig, "transfer")


if __name__ == "__main__":
    main()
