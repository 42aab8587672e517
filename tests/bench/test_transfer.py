"""Coordinate checks of muP and of the standard parametrization, and the command that makes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kraken_train.bench.coordinates import check_coordinates, growth
from kraken_train.bench.transfer import TransferConfig, measure_transfer
from kraken_train.common.cli import compose_command
from kraken_train.common.errors import ConfigError

# The largest exponents with which changes may grow or fall. Those of a Kraken are means over its streams; a baseline
# has one, so that its few updates leave more noise.
LEVEL = {"kraken": 0.15, "standard": 0.4, "parallel": 0.4}


def exponents(config: TransferConfig, dimension: str, parametrization: str) -> dict[str, float]:
    """With which the changes of activations grow."""
    changes: dict[str, dict[int, float]] = {}
    for factor in config.factors:
        model, chosen = config.model(dimension, factor), config.parametrizations(dimension, factor)[parametrization]
        sizes = check_coordinates(model, chosen, config.check_lr, config.check_steps, [0, 1])
        for name, size in sizes.items():
            changes.setdefault(name, {})[factor] = size.change
    return {name: growth(of_name) for name, of_name in changes.items()}


def settings(*overrides: str) -> TransferConfig:
    return compose_command(["output_dir=unused", "factors=[1,2,4]", *overrides], TransferConfig, "transfer")


@pytest.mark.parametrize(
    ("architecture", "dimension", "grows_in_standard"),
    [
        ("kraken", "width", 0.6),
        ("kraken", "depth", 0.4),
        ("kraken", "sub-layers", None),  # the norms behind both sums make up for their number
        ("standard", "width", 0.6),
        ("standard", "depth", 0.6),
        ("parallel", "width", 0.6),
    ],
)
def test_changes_of_activations_stay_the_same(
    architecture: str, dimension: str, grows_in_standard: float | None
) -> None:
    width = 32 if architecture == "kraken" else 64
    config = settings(f"architecture={architecture}", f"hidden_size={width}", f"dimensions=[{dimension}]")
    found = exponents(config, dimension, "mup")
    assert {"logits", "residual stream", "attention, sum over layers", "FFN, sum over layers"} <= set(found)
    assert all(abs(exponent) <= LEVEL[architecture] for exponent in found.values()), found
    if grows_in_standard is not None:
        assert exponents(config, dimension, "standard")["residual stream"] > grows_in_standard


def test_the_command_writes_what_it_measures(tmp_path: Path) -> None:
    sizes = ["hidden_size=16", "base_hidden_size=32", "num_layers=1", "factors=[1,2]", "check_steps=2"]
    rates = ["learning_rates=[1e-3,2e-3]", "sweep_steps=10", "sweep_factor=2", "dimensions=[width]"]
    measure_transfer(compose_command([f"output_dir={tmp_path}", *sizes, *rates], TransferConfig, "transfer"))
    assert {path.name for path in tmp_path.iterdir()} == {"transfer.json", "coordinates.svg", "sweep.svg"}
    record = json.loads((tmp_path / "transfer.json").read_text(encoding="utf-8"))
    losses = {(row["model"], row["parametrization"], row["lr"]): row["loss"] for row in record["sweep"]}
    assert len(losses) == 2 * 2 * 2
    assert losses["width", "mup", 1e-3] == losses["width", "standard", 1e-3]  # twice as wide it is the base
    assert losses["small", "mup", 1e-3] != losses["small", "standard", 1e-3]


def test_what_the_command_refuses() -> None:
    with pytest.raises(ConfigError, match=r"dimensions=sub-layers is not known; use width or depth"):
        settings("architecture=standard", "dimensions=[sub-layers]")
    with pytest.raises(ConfigError, match=r"head_size=24 does not divide hidden_size=64"):
        settings("head_size=24")
