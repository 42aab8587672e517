"""Which architecture is fastest where, by prediction: python -m kraken_train.bench.topology output_dir=FOLDER

For each architecture at equal size: the time of a training step, to the first token, and per further token, over
interconnects, numbers of devices, contexts and batches. All come from one roofline and from what the architectures
declare about their collectives, so they are estimates. With `measure=true cluster=this` each is also measured: one
rank's share of each model on the device of this machine, with collectives that take the interconnect's time.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from kraken_train.bench.grid import (
    LAYERS,
    PAPER,
    REFERENCE,
    SIZES,
    architectures,
    layer_settings,
    model_config,
    require_axis,
)
from kraken_train.bench.simulated_communicator import make_link
from kraken_train.bench.timing import Conditions
from kraken_train.bench.topology_figure import draw
from kraken_train.bench.topology_measure import Bench, measure, require_memory
from kraken_train.bench.topology_row import QUANTITIES, Place, Row, by_place, training_layout
from kraken_train.bench.topology_tables import agreement, as_table, collectives, comparison, crossings
from kraken_train.common.cli import run_entry
from kraken_train.common.errors import ConfigError
from kraken_train.common.free_text import FilePath
from kraken_train.common.output import open_output
from kraken_train.common.validation import require_at_least, require_choice, require_positive
from kraken_train.model.architecture import ModelConfig
from kraken_train.parallel.ranks import read_runtime
from kraken_train.planning.cluster import INTERCONNECTS, THIS, Cluster, load_interconnect, measured
from kraken_train.planning.prediction import predict
from kraken_train.planning.serving_time import Load, PassTime, predict_pass
from kraken_train.training.precision import DTYPES


@dataclass(frozen=True)
class TopologyConfig:
    """See conf/topology.yaml."""

    cluster: Cluster
    architectures: tuple[str, ...]  # values of model.architecture, which docs/models.md lists
    sizes: tuple[str, ...]  # tiny, 1.3b, 6.7b, 13b, 65b, 175b: of the standard Transformer that the others match
    degrees: tuple[int, ...]  # devices that share a model, and sub-layers of the Kraken
    interconnects: tuple[str, ...]  # between these devices: files of conf/interconnect
    contexts: tuple[int, ...]  # tokens of a prompt, of a sample, and before a further token
    batch_sizes: tuple[int, ...]  # sequences at once
    vocab_size: int  # rows of the embedding
    output_dir: FilePath  # folder for topology.json and a figure of each size, number of devices and batch
    layers: str = PAPER  # paper: those of GPT-2 | modern: those of conf/model/base/modern.yaml, in all architectures
    # also measure, with cluster=this: one rank's share on this machine's device, with simulated collectives
    measure: bool = False
    output_tokens: int = 8  # decoded after a prompt where they are measured
    repeats: int = 10  # rounds over all that is measured in a place; times are medians
    simulated_blocks: int = 16  # multiprocessors that a simulated collective occupies on a GPU

    def validate(self) -> None:
        """Raises ConfigError."""
        self.cluster.validate()
        known = {"architectures": architectures(), "sizes": tuple(SIZES), "interconnects": INTERCONNECTS}
        for name, choices in known.items():
            require_axis(name, getattr(self, name))
            for value in getattr(self, name):
                require_choice(name, value, choices)
        for name in ("degrees", "contexts", "batch_sizes"):
            require_axis(name, getattr(self, name))
            for value in getattr(self, name):
                require_positive(name, value)
        require_choice("layers", self.layers, LAYERS)
        for name in ("vocab_size", "output_tokens", "repeats", "simulated_blocks"):
            require_positive(name, getattr(self, name))
        for degree in self.degrees if self.measure else ():
            require_at_least("degrees", degree, 2)  # one device has no communication to simulate
        if self.measure and self.cluster.name != THIS:
            raise ConfigError(
                f"measure=true measures the device of this machine, and cluster={self.cluster.name} is another one; "
                "use cluster=this"
            )

    def models(self, size: str, degree: int) -> list[ModelConfig]:
        """Those that are compared. Raises ConfigError where so many devices cannot share one."""
        most = max(self.contexts)
        layers = layer_settings(self.layers)
        return [
            model_config(name, SIZES[size], degree, self.vocab_size, most).replace(**layers)
            for name in self.architectures
        ]

    def places(self) -> list[Place]:
        axes = (self.sizes, self.degrees, self.interconnects, self.batch_sizes, self.contexts)
        return [Place(*values) for values in itertools.product(*axes)]

    def conditions(self, device: torch.device, precision: str) -> Conditions:
        """Those of measuring. On a GPU as the models run best: compiled, and in serving as CUDA graphs."""
        on_gpu = device.type == "cuda"
        return Conditions(
            device=device,
            dtype=DTYPES[precision],
            compile=on_gpu,
            cuda_graphs=on_gpu,
            batch_size=self.batch_sizes[0],
            context=self.contexts[0],
            output_tokens=self.output_tokens,
            repeats=self.repeats,
            fused_kernels=None,
        )


def compute(config: TopologyConfig, cluster: Cluster) -> list[Row]:
    """A row for each architecture and place. Raises ConfigError where the devices cannot share a model."""
    return [
        predict_row(model, place, replace(cluster, intra_node=place.interconnect, devices_per_node=place.degree))
        for place in config.places()
        for model in config.models(place.size, place.degree)
    ]


def make_bench(config: TopologyConfig, precision: str) -> Bench:
    """Raises ConfigError where not all can be measured here."""
    runtime = read_runtime()
    if runtime.world_size > 1:
        raise ConfigError(
            f"measure=true runs in one process, which simulates the others, and {runtime.world_size} were started; "
            "kraken_train.bench.ttft and kraken_train.bench.throughput measure with several"
        )
    device = runtime.device
    bench = Bench(make_link(device, config.simulated_blocks), runtime, config.conditions(device, precision))
    for place in config.places():
        require_memory(by_architecture(config, place), place, bench)
    return bench


def measure_all(config: TopologyConfig, bench: Bench) -> list[Row]:
    """The rows of `compute`, measured."""
    places, rows = config.places(), []
    for number, place in enumerate(places, start=1):
        rows += measure(by_architecture(config, place), place, load_interconnect(place.interconnect), bench)
        print(f"measured {number}/{len(places)}: {place.without_context}, {place.context} tokens", flush=True)
    return rows


def by_architecture(config: TopologyConfig, place: Place) -> dict[str, ModelConfig]:
    return {model.architecture: model for model in config.models(place.size, place.degree)}


def predict_row(model: ModelConfig, place: Place, cluster: Cluster) -> Row:
    precision = cluster.faster_precision
    layout = training_layout(place, precision)
    step = predict(model.replace(context_length=place.context), layout, cluster).time
    prompt, further = Load(place.batch_size, place.context), Load(place.batch_size, 1, place.context)
    return Row(
        model.architecture,
        place,
        PassTime(step.total - step.exchange, step.exchange, step.hidden),
        predict_pass(model, place.degree, prompt, cluster, precision),
        predict_pass(model, place.degree, further, cluster, precision),
    )


def compare(config: TopologyConfig) -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # some builds' profiler reports each of its starts and stops
    cluster = measured(config.cluster) if config.cluster.name == THIS else config.cluster
    rows = compute(config, cluster)
    bench = make_bench(config, cluster.faster_precision) if config.measure else None
    output_dir = Path(config.output_dir)
    open_output(output_dir)
    console = Console(width=None if Console().is_terminal else 200)
    for size, degree in itertools.product(config.sizes, config.degrees):
        console.print(collectives(config.models(size, degree), f"{size}, {degree} devices"))
    for quantity in QUANTITIES:
        console.print(as_table(rows, quantity))
    for quantity, title in QUANTITIES.items():
        print(f"\nFastest by predicted {title}:")
        print("\n".join(crossings(rows, quantity)))
    reference = REFERENCE if REFERENCE in config.architectures else config.architectures[0]
    found = [] if bench is None else measure_all(config, bench)
    if found:
        for quantity in QUANTITIES:
            console.print(comparison(rows, found, quantity, reference))
        print("\n".join(agreement(rows, found, quantity, reference) for quantity in QUANTITIES))
    record = {
        "cluster": asdict(cluster),
        "rows": [asdict(row) for row in rows],
        "measured": [asdict(row) for row in found],
    }
    (output_dir / "topology.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    colors = {model.architecture: model.color for model in config.models(config.sizes[0], config.degrees[0])}
    kind = "predicted (points: measured)" if found else "predicted"
    for size, degree, batch_size in itertools.product(config.sizes, config.degrees, config.batch_sizes):
        group = (size, degree, batch_size)
        path = output_dir / f"topology-{size}-{degree}-devices-batch-{batch_size}.png"
        title = f"{size} on {degree} x {cluster.device or cluster.name}, batch {batch_size}, {kind}"
        draw(by_place(of_group(rows, group)), by_place(of_group(found, group)), colors, reference, title, path)
        print(f"drawn: {path}")


def of_group(rows: Sequence[Row], group: tuple[str, int, int]) -> list[Row]:
    return [row for row in rows if (row.place.size, row.place.degree, row.place.batch_size) == group]


def main() -> None:
    run_entry(compare, TopologyConfig, "topology")


if __name__ == "__main__":
    main()
