"""What is measured of the architectures on one device: the simulated communication is the predicted one."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from helpers import run_here, user_error
from pretend_clock import pretend

from kraken_train.bench.grid import SIZES, architectures, model_config
from kraken_train.bench.link import ThreadLink
from kraken_train.bench.simulated_training import SimulatedTrainingCommunicator
from kraken_train.bench.timing import Conditions
from kraken_train.bench.topology import predict_row
from kraken_train.bench.topology_measure import Bench, measure, memory_groups
from kraken_train.bench.topology_row import QUANTITIES, Place, Row, training_layout
from kraken_train.bench.topology_tables import agreement, comparison
from kraken_train.common.errors import ConfigError
from kraken_train.model.registry import build_model, even_share
from kraken_train.parallel.ranks import Runtime
from kraken_train.parallel.sharding import ModelRank
from kraken_train.planning.cluster import Cluster, load_cluster
from kraken_train.planning.interconnect import Interconnect
from kraken_train.planning.memory import predict_memory
from kraken_train.planning.serving_time import PassTime

SLOW = Interconnect("slow", latency_us=500.0, bus_bandwidth=1.0, source="")
PLACE = Place("tiny", 4, "slow", 2, 16)
CONDITIONS = Conditions(
    device=torch.device("cpu"),
    dtype=torch.float32,
    compile=False,
    cuda_graphs=False,
    batch_size=1,
    context=1,
    output_tokens=2,
    repeats=1,
)
MODELS = {name: model_config(name, SIZES["tiny"], PLACE.degree, 96, PLACE.context) for name in architectures()}


@dataclass(frozen=True)
class SlowCluster(Cluster):
    def interconnect(self, ranks: int, stride: int) -> Interconnect:
        return SLOW


def test_communication_is_what_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where computation takes no time, all collectives are waited for: those that the prediction has, in all passes."""
    pretend(monkeypatch)
    profile = load_cluster("l40s_pcie")
    cluster = SlowCluster(**vars(replace(profile, bf16_tflops=1.0, fp32_tflops=2.0)))  # so that it predicts fp32
    rows = measure(MODELS, PLACE, SLOW, Bench(ThreadLink(), Runtime(0, 0, 1, 1, use_gpu=False), CONDITIONS))
    assert [row.architecture for row in rows] == list(MODELS)
    for row in rows:
        predicted = predict_row(MODELS[row.architecture], PLACE, cluster)
        for quantity in ("step", "first_token", "next_token"):
            found, expected = getattr(row, quantity), getattr(predicted, quantity)
            assert found.computed == 0
            assert found.exposed == pytest.approx(expected.exposed + expected.hidden), (row.architecture, quantity)


def test_gradients_do_not_depend_on_the_link() -> None:
    """What takes time changes no number: a simulated sum of this rank's part alone is that part."""
    config = MODELS["kraken"]
    ids = torch.arange(32).view(2, 16)
    gradients = []
    for link, overlap in ((None, True), (ThreadLink(), True), (ThreadLink(), False)):
        communicator = SimulatedTrainingCommunicator(replace(SLOW, latency_us=1.0), ModelRank(0, 4), link, overlap)
        units, vocabulary = even_share(config, communicator.model_rank, vocab_parallel=True)
        model = build_model(config, 0, units, communicator, vocabulary)
        model.loss(ids, ids).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for others in gradients[1:]:
        for gradient, other in zip(gradients[0], others, strict=True):
            assert torch.equal(gradient, other)


def test_memory_groups() -> None:
    layout = training_layout(PLACE, "fp32")
    needs = [predict_memory(config, layout).total for config in MODELS.values()]
    assert memory_groups(MODELS, layout, sum(needs)) == [tuple(MODELS)]
    assert memory_groups(MODELS, layout, sum(needs) - 1) == [(name,) for name in MODELS]
    assert memory_groups(MODELS, layout, max(needs)) == [(name,) for name in MODELS]
    with pytest.raises(
        ConfigError, match=r"the share of one of 4 devices takes .* \(.*, 2 x 16 tokens\), .*measure=false"
    ):
        memory_groups(MODELS, layout, max(needs) - 1)


def test_ratios_by_hand() -> None:
    def rows(seconds: dict[str, float]) -> list[Row]:
        return [Row(name, PLACE, *[PassTime(one, 0.0, 0.0)] * 3) for name, one in seconds.items()]

    predicted, found = rows({"standard": 2.0, "kraken": 1.0}), rows({"standard": 4.0, "kraken": 2.2})
    assert agreement(predicted, found, "step", "standard") == (
        "training step: ratios to standard differ from the predicted ones by 10.0% (median), 10.0% at most"
    )
    table = comparison(predicted, found, "step", "standard")
    assert [list(column.cells) for column in table.columns[5:]] == [["1.00, 1.00 (4000)"], ["0.50, 0.55 (2200)"]]


def test_command(tmp_path: Path) -> None:
    small = ["sizes=[tiny]", "degrees=[2]", "interconnects=[pcie4]", "contexts=[16]", "vocab_size=96"]
    measured = ["measure=true", "cluster=this", "repeats=1", "output_tokens=1", "architectures=[kraken,standard]"]
    ran = run_here("kraken_train.bench.topology", f"output_dir={tmp_path}", "layers=modern", *small, *measured)
    assert ran.returncode == 0, ran.stderr
    assert "measured 1/1: tiny, 2 devices, pcie4, 1 sequence, 16 tokens" in ran.stdout
    rows = json.loads((tmp_path / "topology.json").read_text())["measured"]
    assert [row["architecture"] for row in rows] == ["kraken", "standard"]
    assert all(row[quantity]["computed"] > 0 for row in rows for quantity in QUANTITIES)
    assert (tmp_path / "topology-tiny-2-devices-batch-1.png").is_file()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["cluster=dgx_h100"], "measure=true measures the device of this machine, and cluster=dgx_h100"),
        (["cluster=this", "degrees=[1,4]"], "degrees=1 must be at least 2"),
        (["cluster=this", "sizes=[175b]", "degrees=[2]", "contexts=[512]", "batch_sizes=[1]"], "use smaller sizes"),
    ],
)
def test_refused_before_anything_is_written(tmp_path: Path, settings: list[str], words: str) -> None:
    refused = run_here("kraken_train.bench.topology", f"output_dir={tmp_path / 'new'}", "measure=true", *settings)
    assert words in user_error(refused)
    assert not (tmp_path / "new").exists()
