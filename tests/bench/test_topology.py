"""The comparison of architectures by prediction: where each is fastest, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import run_here, user_error

from kraken_train.bench.grid import architectures
from kraken_train.bench.topology import TopologyConfig, compute, crossings
from kraken_train.bench.topology_row import QUANTITIES, Place, Row
from kraken_train.planning.cluster import load_cluster
from kraken_train.planning.layout import TrainingLayout
from kraken_train.planning.prediction import predict
from kraken_train.planning.serving_time import PassTime

SETTINGS = TopologyConfig(
    cluster=load_cluster("dgx_h100"),
    architectures=architectures(),
    sizes=("1.3b",),
    degrees=(4,),
    interconnects=("free", "ethernet_100g"),
    contexts=(128, 2048),
    batch_sizes=(1,),
    vocab_size=50304,
    output_dir="",
)


def test_the_interconnect_decides() -> None:
    """Where communication is free the computation decides, where it is slow the number of sums that are waited for."""
    rows = compute(SETTINGS, SETTINGS.cluster)
    assert len(rows) == len(architectures()) * 2 * 2
    for quantity in QUANTITIES:
        for context in SETTINGS.contexts:
            times = {
                link: {
                    row.architecture: getattr(row, quantity)
                    for row in rows
                    if (row.place.interconnect, row.place.context) == (link, context)
                }
                for link in SETTINGS.interconnects
            }
            free, slow = times.values()
            assert all(time.exposed == time.hidden == 0 for time in free.values())
            assert all(slow[name].computed == pytest.approx(free[name].computed) for name in free)
            assert slow["track"].exposed < slow["kraken"].exposed < slow["parallel"].exposed < slow["fal"].exposed
            assert slow["fal"].exposed < slow["standard"].exposed
            assert slow["ladder"].total < slow["standard"].total
            assert min(slow, key=lambda name: slow[name].total) == "track"


def test_times_of_a_row() -> None:
    """The step is that of a plan, and a further token reads what the context has left in the cache."""
    config = replace(SETTINGS, interconnects=("pcie4",), architectures=("kraken",))
    short, long = compute(config, config.cluster)
    for row in (short, long):
        model = config.models("1.3b", 4)[0].replace(context_length=row.place.context)
        connected = replace(config.cluster, intra_node="pcie4", devices_per_node=4)
        plan = predict(model, TrainingLayout(4, 1, 1, 1, vocab_parallel=True), connected)
        assert row.step.total == pytest.approx(plan.time.total)
        assert row.step.exposed == plan.time.exchange > 0
    more = (long.place.context - short.place.context) * model.cache_width * 2 / 4 * model.num_layers
    read = more / config.cluster.bandwidth
    assert long.next_token.computed - short.next_token.computed == pytest.approx(read)


def test_crossings() -> None:
    def row(name: str, context: int, milliseconds: float) -> Row:
        time = PassTime(milliseconds / 1e3, 0, 0)
        return Row(name, Place("tiny", 2, "pcie4", 1, context), time, time, time)

    times = {128: (1, 2), 512: (1.9, 2.1), 2048: (3, 2.5), 8192: (9, 5)}
    rows = [row(name, context, both[i]) for context, both in times.items() for i, name in enumerate(("one", "two"))]
    assert crossings(rows, "step") == ["tiny, 2 devices, pcie4, 1 sequence: one from 128 tokens, two from 2048 tokens"]


def test_command(tmp_path: Path) -> None:
    settings = [f"output_dir={tmp_path}", "sizes=[1.3b]", "degrees=[4]", "interconnects=[pcie4]", "contexts=[128,2048]"]
    ran = run_here("kraken_train.bench.topology", *settings)
    assert ran.returncode == 0, ran.stderr
    expected = compute(replace(SETTINGS, interconnects=("pcie4",)), SETTINGS.cluster)
    recorded = json.loads((tmp_path / "topology.json").read_text())
    assert recorded["cluster"]["device"] == "H100"
    for row, of_file in zip(expected, recorded["rows"], strict=True):
        assert of_file["architecture"] == row.architecture
        assert of_file["first_token"]["computed"] == pytest.approx(row.first_token.computed)
    for words in ("Predicted time to first token, ms", "Fastest by predicted training step", "1.3b, 4 devices, pcie4"):
        assert words in ran.stdout
    (figure,) = tmp_path.glob("*.png")
    assert figure.name == "topology-1.3b-4-devices-batch-1.png"
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("architectures=[krake]", "architectures=krake"),
        ("interconnects=[token_ring]", "interconnects=token_ring"),
        ("degrees=[3]", "degrees=3"),
        ("contexts=[0]", "contexts=0 must be greater than 0"),
        ("contexts=[128,128]", "must name at least one, and none twice"),
    ],
)
def test_one_message(tmp_path: Path, setting: str, words: str) -> None:
    assert words in user_error(run_here("kraken_train.bench.topology", f"output_dir={tmp_path}", setting))
