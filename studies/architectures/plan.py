"""What the study trains: a YAML file such as `cpu.yaml`, beside which results and verdict are written.

A cell of the study is an architecture at a size, a number of tokens and a learning rate. The rate is chosen with the
fewest tokens and the first seed; with the best one all numbers of tokens are trained, with all seeds. Each run has a
learning-rate schedule of its own length, so only last losses are compared: those on the way of a longer run are higher
than those of a run that ends there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from kraken_train.bench.grid import REFERENCE, architectures, require_axis
from kraken_train.common.errors import ConfigError
from kraken_train.common.settings import from_dict
from kraken_train.common.token_counts import Tokens, format_tokens, parse_tokens
from kraken_train.common.validation import require_at_least, require_choice, require_positive
from kraken_train.derive import derive, model_overrides, with_embedding_size
from kraken_train.model.config import ModelConfig, parse_model
from kraken_train.model.registry import ARCHITECTURES, DEFAULT_ARCHITECTURE
from kraken_train.planning.cluster import INTERCONNECTS
from studies.results import Result, Results
from studies.study import Run, Study

FEWEST = 3  # sizes, numbers of tokens and learning rates: what curves and a best rate need


@dataclass(frozen=True)
class Batch:
    """Of an optimizer step on the devices of one copy."""

    micro_batch_size: int  # samples
    accumulation_steps: int


@dataclass(frozen=True)
class TimeConfig:
    """Where the time of a training step is predicted."""

    cluster: str  # file of conf/cluster: whose devices compute
    interconnect: str  # file of conf/interconnect, between the devices of a copy
    own: Batch  # of the models that are trained
    # a model of practical size: how much faster an architecture is depends on the size
    large_name: str
    large_model: dict[str, Any]  # settings of the standard Transformer, besides those of all models
    large: Batch


@dataclass(frozen=True)
class Cell:
    architecture: str
    size: str
    tokens: int
    learning_rate: float

    @property
    def arm(self) -> str:
        tokens = format_tokens(self.tokens).replace(",", "")
        return f"{self.architecture} size={self.size} tokens={tokens} lr={self.learning_rate:g}"

    def run(self, seed: int) -> Run:
        return Run(self.arm, seed)


@dataclass(frozen=True)
class Plan:
    path: Path  # of the file
    architectures: tuple[str, ...]  # names of architectures or of `forms`
    forms: dict[str, str]  # further forms of an architecture: name in the tables -> architecture
    with_embedding_of_base: tuple[str, ...]  # whose embedding and head are as wide as the standard Transformer's
    sizes: dict[str, dict[str, Any]]  # settings of the standard Transformer, besides those of all models
    tokens: tuple[Tokens, ...]  # of the runs of each size, ascending
    learning_rates: tuple[float, ...]  # ascending
    seeds: tuple[int, ...]
    layers: dict[str, Any]  # settings of all models
    changes: dict[str, dict[str, Any]]  # settings of an architecture or form
    warmup: float  # fraction of a run
    training: dict[str, Any]  # settings of kraken_train.train
    devices: int  # that share a copy in the predicted times; sub-layers of the Krakens, and tracks
    tolerance: float  # largest relative difference of the parameters from the standard Transformer's
    max_attention_cost: float | None  # as in kraken_train.derive
    time: TimeConfig

    def validate(self) -> None:
        """Raises ConfigError."""
        for name in ("architectures", "tokens", "learning_rates", "seeds"):
            require_axis(name, getattr(self, name))
        for name, architecture in self.forms.items():
            require_choice(f"forms.{name}", architecture, architectures())
        for name in self.architectures:
            require_choice("architectures", name, (*architectures(), *self.forms))
        for name in self.with_embedding_of_base:
            require_choice("with_embedding_of_base", name, self.architectures)
            require_choice(
                f"with_embedding_of_base={name}, whose architecture", self.architecture(name), with_embedding_size()
            )
        for name in ("tokens", "learning_rates"):
            values = getattr(self, name)
            if len(values) < FEWEST or list(values) != sorted(values):
                raise ConfigError(f"{name}={list(values)} must be at least {FEWEST} values in ascending order")
        for needed in (REFERENCE, DEFAULT_ARCHITECTURE):
            if needed not in self.architectures:
                raise ConfigError(f"architectures={list(self.architectures)} must have {needed}, which others are "
                                  "compared with")  # fmt: skip
        require_at_least("seeds", len(self.seeds), 2)
        require_positive("devices", self.devices)
        require_choice("time.interconnect", self.time.interconnect, INTERCONNECTS)
        for name in ("optim", "precision"):
            if name not in self.training:
                raise ConfigError(f"training.{name} is not set; give it, since predicted times depend on it")

    def architecture(self, name: str) -> str:
        """Of an entry of `architectures`."""
        return self.forms.get(name, name)

    @property
    def krakens(self) -> list[str]:
        """The forms of Kraken, whose wins and losses the verdict names."""
        return [name for name in self.architectures if self.architecture(name) == DEFAULT_ARCHITECTURE]

    @cached_property
    def models(self) -> dict[str, dict[str, ModelConfig]]:
        """By size and architecture. Raises ConfigError where one cannot have the parameters of its size."""
        return {size: self.alike(settings) for size, settings in self.sizes.items()}

    def alike(self, settings: Mapping[str, Any]) -> dict[str, ModelConfig]:
        """A model of each architecture with the parameters of the standard Transformer with these settings."""
        base = parse_model({"architecture": REFERENCE, **self.layers, **settings})
        found = {}
        for name in self.architectures:
            architecture, changes = self.architecture(name), self.changes.get(name, {})
            if ARCHITECTURES[architecture].units_setting is None:
                found[name] = parse_model({"architecture": architecture, **self.layers, **settings, **changes})
            else:
                embedding_size = base.hidden_size if name in self.with_embedding_of_base else None
                best, *_ = derive(
                    base, self.devices, self.tolerance, self.max_attention_cost, architecture, embedding_size
                )
                found[name] = best.config.replace(**changes)
            difference = found[name].num_parameters / base.num_parameters - 1
            if abs(difference) > self.tolerance:
                raise ConfigError(f"{name} has {difference:+.1%} parameters, more than tolerance={self.tolerance} from "
                                  f"the {base.num_parameters:,} of the {REFERENCE} Transformer")  # fmt: skip
        return found

    def cell(self, arm: str) -> Cell:
        """Raises ConfigError for the arm of another plan."""
        architecture, *rest = arm.split()
        values = dict(entry.split("=") for entry in rest)
        cell = Cell(architecture, values["size"], parse_tokens(values["tokens"]), float(values["lr"]))
        if architecture not in self.architectures or cell.size not in self.sizes:
            raise ConfigError(f"{self.path} has no {arm}")
        return cell

    def overrides(self, run: Run) -> list[str]:
        """Arguments of kraken_train.train, without folders."""
        cell = self.cell(run.arm)
        settings = {
            **self.training,
            "optim.lr": f"{cell.learning_rate:g}",
            "max_tokens": cell.tokens,
            "schedule.warmup_tokens": round(self.warmup * cell.tokens),
            "seed": run.seed,
        }
        model = model_overrides(self.models[cell.size][cell.architecture])
        return [*model, *(f"{name}={value}" for name, value in settings.items())]

    @property
    def study(self) -> Study:
        return Study(
            self.overrides, "kraken_train.train", self.path.with_suffix(".jsonl"), "studies/architectures/README.md"
        )

    @property
    def all_runs(self) -> list[Run]:
        """Those that any choice of learning rates needs."""
        return [
            Cell(name, size, tokens, rate).run(seed)
            for size in self.sizes for name in self.architectures for tokens in self.tokens
            for rate in self.learning_rates for seed in self.seeds
        ]  # fmt: skip

    def results(self, runs_dir: Path) -> dict[Run, Result]:
        """Record finished runs of the folder; all recorded ones. Raises ConfigError where data or settings differ."""
        results = Results(self.study, runs_dir)
        for run in self.all_runs:
            results.is_known(run)
        return results.add(self.all_runs)

    def screening(self, size: str, architecture: str) -> dict[float, Run]:
        """The runs that choose the learning rate, by rate."""
        return {rate: Cell(architecture, size, self.tokens[0], rate).run(self.seeds[0]) for rate in self.learning_rates}

    def screened(self, size: str, architecture: str, results: Mapping[Run, Result]) -> dict[float, float]:
        """The losses of the finished ones, by rate."""
        runs = self.screening(size, architecture)
        return {rate: results[run].validation_loss for rate, run in runs.items() if run in results}

    def best_rate(self, size: str, architecture: str, results: Mapping[Run, Result]) -> float | None:
        """The rate with the least loss; None while a run of them is missing."""
        losses = self.screened(size, architecture, results)
        return min(losses, key=lambda rate: losses[rate]) if len(losses) == len(self.learning_rates) else None

    def compared(self, size: str, architecture: str, rate: float) -> dict[tuple[int, int], Run]:
        """The runs at the best rate, by tokens and seed."""
        return {
            (tokens, seed): Cell(architecture, size, tokens, rate).run(seed)
            for tokens in self.tokens for seed in self.seeds
        }  # fmt: skip

    def missing(self, sizes: Iterable[str], results: Mapping[Run, Result]) -> list[Run]:
        """The runs that can be trained now: of an architecture those that choose its learning rate, then the others."""
        runs: dict[Run, None] = {}
        for size in sizes:
            for name in self.architectures:
                rate = self.best_rate(size, name, results)
                wanted = self.screening(size, name) if rate is None else self.compared(size, name, rate)
                runs |= dict.fromkeys(run for run in wanted.values() if run not in results)
        return list(runs)


def read_plan(path: Path) -> Plan:
    """Raises ConfigError."""
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML ({error}); name a plan such as studies/architectures/cpu.yaml"
                          ) from error  # fmt: skip
    if not isinstance(entries, dict):
        raise ConfigError(f"{path} is no plan; name one such as studies/architectures/cpu.yaml")
    return from_dict({**entries, "path": path}, Plan)
