"""Which architecture is fastest where, by prediction: python -m kraken_train.bench.topology output_dir=FOLDER

For each architecture at equal size: the time of a training step, to the first token, and per further token, over
interconnects, numbers of devices, contexts and batches. All come from one roofline and from what the architectures
declare about their collectives, so they are estimates: `kraken_train.bench.ttft` and `kraken_train.bench.throughput`
measure.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kraken_train.bench.grid import REFERENCE, SIZES, architectures, model_config, require_axis
from kraken_train.bench.topology_figure import draw
from kraken_train.bench.topology_row import QUANTITIES, Place, Row, by_place, fastest
from kraken_train.common.cli import run_entry
from kraken_train.common.free_text import FilePath
from kraken_train.common.output import open_output
from kraken_train.common.validation import require_choice, require_positive
from kraken_train.model.architecture import ModelConfig
from kraken_train.planning.cluster import INTERCONNECTS, Cluster, measured
from kraken_train.planning.layout import TrainingLayout
from kraken_train.planning.prediction import predict
from kraken_train.planning.serving_time import Load, PassTime, predict_pass


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
        require_positive("vocab_size", self.vocab_size)

    def models(self, size: str, degree: int) -> list[ModelConfig]:
        """Those that are compared. Raises ConfigError where so many devices cannot share one."""
        most = max(self.contexts)
        return [model_config(name, SIZES[size], degree, self.vocab_size, most) for name in self.architectures]


def compute(config: TopologyConfig, cluster: Cluster) -> list[Row]:
    """A row for each architecture and place. Raises ConfigError where the devices cannot share a model."""
    rows = []
    for size, degree in itertools.product(config.sizes, config.degrees):
        models = config.models(size, degree)
        for interconnect, batch_size, context in itertools.product(
            config.interconnects, config.batch_sizes, config.contexts
        ):
            place = Place(size, degree, interconnect, batch_size, context)
            connected = replace(cluster, intra_node=interconnect, devices_per_node=degree)
            rows += [predict_row(model, place, connected) for model in models]
    return rows


def predict_row(model: ModelConfig, place: Place, cluster: Cluster) -> Row:
    precision = cluster.faster_precision
    layout = TrainingLayout(place.degree, 1, place.batch_size, 1, vocab_parallel=place.degree > 1, precision=precision)
    step = predict(model.replace(context_length=place.context), layout, cluster).time
    prompt, further = Load(place.batch_size, place.context), Load(place.batch_size, 1, place.context)
    return Row(
        model.architecture,
        place,
        PassTime(step.total - step.exchange, step.exchange, step.hidden),
        predict_pass(model, place.degree, prompt, cluster, precision),
        predict_pass(model, place.degree, further, cluster, precision),
    )


def as_table(rows: Sequence[Row], quantity: str) -> Table:
    """A line for each place: the times of the architectures in ms, and which is fastest."""
    places = by_place(rows)
    names = list(dict.fromkeys(row.architecture for row in rows))
    table = Table(title=f"Predicted {QUANTITIES[quantity]}, ms (exposed communication in %)")
    for heading in ("size", "devices", "interconnect", "batch", "context", *names, "fastest"):
        table.add_column(heading, justify="right")
    for place, of_place in places.items():
        times = [getattr(of_place[name], quantity) for name in names]
        cells = [f"{1e3 * time.total:.4g} ({time.exposed / time.total:.0%})" for time in times]
        where = (place.size, str(place.degree), place.interconnect, str(place.batch_size), str(place.context))
        table.add_row(*where, *cells, fastest(of_place, quantity))
    return table


def crossings(rows: Sequence[Row], quantity: str) -> list[str]:
    """A line for each place but its context: which architecture is fastest from which context on."""
    lines: dict[str, list[str]] = {}
    last: dict[str, str] = {}
    for place, of_place in sorted(by_place(rows).items(), key=lambda item: item[0].context):
        name, where = fastest(of_place, quantity), place.without_context
        if last.get(where) != name:
            lines.setdefault(where, []).append(f"{name} from {place.context} tokens")
            last[where] = name
    return [f"{where}: {', '.join(found)}" for where, found in lines.items()]


def collectives(models: Sequence[ModelConfig], title: str) -> Table:
    """What each architecture sums over the devices in a forward pass."""
    table = Table(title=f"{title}: all-reduces of a forward pass")
    for heading in ("architecture", "all-reduces", "behind computation", "waited for", "values per token"):
        table.add_column(heading, justify="right")
    for model in models:
        total = sum(reduced.count for reduced in model.all_reduces) // 2  # the other half is in the backward pass
        hidden = sum(reduced.count for reduced in model.all_reduces if reduced.behind is not None) // 2
        table.add_row(model.architecture, str(total), str(hidden), str(total - hidden), str(model.hidden_size))
    return table


def compare(config: TopologyConfig) -> None:
    cluster = measured(config.cluster) if config.cluster.name == "this" else config.cluster
    rows = compute(config, cluster)
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
    record = {"cluster": asdict(cluster), "rows": [asdict(row) for row in rows]}
    (output_dir / "topology.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    colors = {model.architecture: model.color for model in config.models(config.sizes[0], config.degrees[0])}
    reference = REFERENCE if REFERENCE in colors else config.architectures[0]
    for size, degree, batch_size in itertools.product(config.sizes, config.degrees, config.batch_sizes):
        group = (size, degree, batch_size)
        chosen = [row for row in rows if (row.place.size, row.place.degree, row.place.batch_size) == group]
        path = output_dir / f"topology-{size}-{degree}-devices-batch-{batch_size}.png"
        title = f"{size} on {degree} x {cluster.device or cluster.name}, batch {batch_size}, predicted"
        draw(by_place(chosen), colors, reference, title, path)
        print(f"drawn: {path}")


def main() -> None:
    run_entry(compare, TopologyConfig, "topology")


if __name__ == "__main__":
    main()
