"""Predicted memory and time, and the best layout, of a training: python -m kraken_train.plan model=NAME cluster=NAME"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kraken_train.common.cli import run_entry
from kraken_train.common.durations import duration
from kraken_train.common.errors import ConfigError
from kraken_train.common.free_text import FilePath
from kraken_train.common.output import open_output
from kraken_train.common.settings import to_dict
from kraken_train.common.token_counts import Tokens, format_tokens
from kraken_train.common.validation import require_choice, require_positive
from kraken_train.config import AUTO, PRECISIONS
from kraken_train.model.config import ModelConfig, ModelSettings, parse_model
from kraken_train.planning.cluster import THIS, Cluster, measured
from kraken_train.planning.figure import draw
from kraken_train.planning.prediction import Prediction
from kraken_train.planning.search import GB, Constraints, Plan, describe, reasons, search, why_slower
from kraken_train.planning.traffic import Collective
from kraken_train.recipe.optimizers import AnyOptimizer
from kraken_train.settings.engine import EngineConfig
from kraken_train.training.teacher import read_teacher


@dataclass(frozen=True)
class PlanConfig:
    """See conf/plan.yaml."""

    model: ModelSettings
    cluster: Cluster
    nodes: int  # machines
    global_batch_size: int  # samples per optimizer step, over all devices
    # tokens of the run, as in 2B, to tell how many steps and how much time it takes; null: of a step alone
    max_tokens: Tokens | None
    vocab_size: int | None  # vocabulary of the tokenizer, for models that take it from the data (model.vocab_size=null)
    sub_layer_parallel_size: int | None  # as in conf/train.yaml; null: the best is searched
    micro_batch_size: int | None  # as in conf/train.yaml; null: the best is searched
    zero_stage: int | None  # as engine.zero_stage in conf/train.yaml; null: the best is searched
    # as engine.activation_checkpointing in conf/train.yaml; null: the best is searched
    activation_checkpointing: bool | None
    vocab_parallel: bool | None  # as parallel.vocab_parallel in conf/train.yaml; null: the best is searched
    precision: str  # bf16 | fp32 | auto: bf16 where the devices compute it faster than fp32
    optim: AnyOptimizer  # only its kind matters here
    # export, as distill.teacher in conf/train.yaml: its weights and its forward pass are counted; null: none
    teacher: FilePath | None
    shown: int  # layouts in the table
    output: FilePath | None  # JSON file with all results; null: none
    output_dir: FilePath | None  # folder for memory.png; null: none

    def validate(self) -> None:
        """Raises ConfigError."""
        self.cluster.validate()
        for name in (
            "nodes",
            "global_batch_size",
            "shown",
            "max_tokens",
            "vocab_size",
            "sub_layer_parallel_size",
            "micro_batch_size",
        ):
            if getattr(self, name) is not None:
                require_positive(name, getattr(self, name))
        require_choice("precision", self.precision, PRECISIONS)
        if self.zero_stage is not None:
            EngineConfig(self.zero_stage, activation_checkpointing=False, compile=None).validate()

    def constraints(self, cluster: Cluster, model: ModelConfig) -> Constraints:
        precision = cluster.faster_precision if self.precision == AUTO else self.precision
        return Constraints(
            self.sub_layer_parallel_size, self.micro_batch_size, self.zero_stage, self.activation_checkpointing,
            self.vocab_parallel, precision, self.optim.name, self.teacher_config(model),
        )  # fmt: skip

    def teacher_config(self, model: ModelConfig) -> ModelConfig | None:
        """Raises CheckpointError where `teacher` is no export, or one that cannot teach the model."""
        if self.teacher is None:
            return None
        return read_teacher(f"teacher={self.teacher}", Path(self.teacher), model).config

    def model_config(self) -> ModelConfig:
        """Raises ConfigError where the size of the vocabulary is not given."""
        if self.model.get("vocab_size") is None and self.vocab_size is None:
            raise ConfigError("model.vocab_size is null, which takes it from the data; give vocab_size=NUMBER, the "
                              "tokenizer's")  # fmt: skip
        return parse_model(self.model, self.vocab_size)


def as_table(plan: Plan, shown: int, title: str) -> Table:
    table = Table(title=title, caption="predicted; ms of an optimizer step, GB of a device at its largest moment")
    for name in ("choice", "micro-\nbatch", "steps", "GB", "ms", "tokens/s", "MFU", "against the first"):
        table.add_column(name, justify="left" if name in ("choice", "against the first") else "right")
    for place, prediction in enumerate(plan.ranked[:shown]):
        layout = prediction.layout
        table.add_row(
            describe(layout), str(layout.micro_batch_size), str(layout.accumulation_steps),
            f"{prediction.memory.total / GB:.1f}", f"{1e3 * prediction.time.total:.1f}",
            f"{prediction.tokens_per_second:,.0f}", f"{prediction.mfu:.1%}",
            why_slower(prediction, plan.best) if place else "",
        )  # fmt: skip
    return table


def memory_table(best: Prediction) -> Table:
    table = Table(title=f"Memory of a device at the largest moment: {best.memory.moment}")
    for name in best.memory.parts:
        table.add_column(name, justify="right")
    table.add_column("total", justify="right")
    table.add_column("usable", justify="right")
    sizes = [*best.memory.parts.values(), best.memory.total, best.usable_bytes]
    table.add_row(*(f"{size / GB:.2f} GB" for size in sizes))
    return table


def time_table(best: Prediction) -> Table:
    parts = best.time.parts
    table = Table(title=f"Optimizer step, {1e3 * best.time.total:.1f} ms")
    for name in parts:
        table.add_column(name, justify="right")
    table.add_row(*(f"{1e3 * seconds:.1f} ms" for seconds in parts.values()))
    return table


def traffic_table(traffic: tuple[Collective, ...]) -> Table:
    table = Table(title="Collectives of an optimizer step, those of at least 10 kB")
    for name in ("what", "kind", "among", "number", "each", "hidden behind"):
        table.add_column(name, justify="right" if name in ("number", "each") else "left")
    for collective in traffic:
        if collective.size < 1e4:
            continue
        table.add_row(
            collective.purpose, collective.kind, collective.group, str(collective.count),
            f"{collective.size / 1e6:,.2f} MB", collective.behind or "nothing",
        )  # fmt: skip
    return table


def describe_run(tokens: int, best: Prediction) -> str:
    """Steps and time of a run over so many tokens."""
    steps = -(-tokens // best.tokens)
    return (
        f"{format_tokens(tokens)} tokens are {steps:,} steps of {best.tokens:,} tokens, which take "
        f"{duration(steps * best.time.total)}, without validation and checkpoints"
    )


def print_plan(config: PlanConfig) -> None:
    if config.output_dir is not None:
        open_output(Path(config.output_dir))
    if config.output is not None:
        open_output(Path(config.output).parent, "folder of output")
    model = config.model_config()
    cluster = measured(config.cluster) if config.cluster.name == THIS else config.cluster
    plan = search(model, cluster, config.nodes, config.global_batch_size, config.constraints(cluster, model))
    devices = plan.best.layout.devices
    title = f"{model.num_parameters:,} parameters on {devices} devices of {cluster.name}"
    console = Console(width=None if Console().is_terminal else 160)
    console.print(as_table(plan, config.shown, title))
    console.print(memory_table(plan.best))
    console.print(time_table(plan.best))
    if plan.best.traffic:
        console.print(traffic_table(plan.best.traffic))
    why = reasons(plan, cluster, model)
    for line in (*why, *plan.refused):
        print(f"- {line}")
    if config.max_tokens is not None:
        print(describe_run(config.max_tokens, plan.best))
    taught = "" if config.teacher is None else f" distill.teacher={config.teacher}"
    print(f"to train so: {plan.best.layout.overrides} engine.compile=true{taught}")
    if config.output is not None:
        record = {
            "model": to_dict(model), "cluster": asdict(cluster), "nodes": config.nodes, "reasons": why,
            "refused": list(plan.refused), "ranked": [prediction.as_dict() for prediction in plan.ranked],
        }  # fmt: skip
        Path(config.output).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        print(f"written: {config.output}")
    if config.output_dir is not None:
        path = Path(config.output_dir) / "memory.png"
        draw(plan.ranked[: config.shown], title, path)
        print(f"drawn: {path}")


def main() -> None:
    run_entry(print_plan, PlanConfig, "plan")


if __name__ == "__main__":
    main()
