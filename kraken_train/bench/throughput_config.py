"""Settings of `kraken_train.bench.throughput`, with the names of those of training."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from kraken_train.bench.authors_step import require_paper_layers
from kraken_train.bench.grid import require_axis
from kraken_train.common.cli import CONF_DIR, compose_choice, compose_command
from kraken_train.common.errors import ConfigError
from kraken_train.common.free_text import FilePath
from kraken_train.common.validation import require_choice, require_positive
from kraken_train.config import PRECISIONS, TrainConfig
from kraken_train.model.config import ModelConfig, parse_model
from kraken_train.parallel.device import DEVICES
from kraken_train.recipe.optimizers import AdamWConfig, AnyOptimizer
from kraken_train.settings.engine import EngineConfig
from kraken_train.settings.parallel import ParallelConfig

DEEPSPEED, TORCH = "deepspeed", "torch"
AUTHORS = "authors"  # of an entry, for the models that `authors` names
ENGINES = (DEEPSPEED, TORCH)


@dataclass(frozen=True)
class Entry:
    """One thing that is measured."""

    name: str  # a file of conf/model
    model: ModelConfig
    engine: str  # of ENGINES, or AUTHORS

    def __str__(self) -> str:
        return self.name if self.engine == DEEPSPEED else f"{self.name} ({self.engine})"


@dataclass(frozen=True)
class ThroughputConfig:
    """See conf/throughput.yaml."""

    models: tuple[str, ...]  # files of conf/model
    reference: str | None  # model that the others are compared with; null: the first
    # deepspeed: as training uses it | torch: the same in plain PyTorch, to see what DeepSpeed costs
    engines: tuple[str, ...]
    # Krakens of `models` that are also trained by the authors' step: a loop over sub-layers, fp32 weights, autocast
    authors: tuple[str, ...]
    vocab_size: int  # of models without one, if there is no data_dir
    context_length: int | None  # tokens; null: the model's own
    micro_batch_size: int  # samples per rank and forward pass
    gradient_accumulation_steps: int  # micro-batches per optimizer step
    # bf16 (with fp32 master weights and accumulation) | fp32 | auto: bf16 where all devices compute it natively
    precision: str
    steps: int  # optimizer steps that are timed together
    rounds: int  # rounds over all models; times are medians
    data_dir: FilePath | None  # folder that data_prep.prepare has written; null: random tokens in memory
    output_dir: FilePath  # folder for throughput.json and throughput.png
    device: str  # auto | cpu | cuda
    peak_tflops: float | None  # peak of a device, for the MFU; null: from a table of GPUs; a CPU is measured
    optim: AnyOptimizer
    parallel: ParallelConfig
    engine: EngineConfig

    def validate(self) -> None:
        """Rules that need no machine. Raises ConfigError."""
        require_axis("models", self.models)
        require_axis("engines", self.engines)
        for name in self.models:
            require_choice("models", name, model_names())
        for name in self.engines:
            require_choice("engines", name, ENGINES)
        for name in self.authors:
            require_choice("authors", name, model_names())
            if name not in self.models:
                raise ConfigError(f"authors={name} is not among the models that are measured; give models=[{name}] too")
        if self.reference is not None:
            require_choice("reference", self.reference, self.models)
        for name in ("vocab_size", "micro_batch_size", "gradient_accumulation_steps", "steps", "rounds"):
            require_positive(name, getattr(self, name))
        for name in ("context_length", "peak_tflops"):
            if getattr(self, name) is not None:
                require_positive(name, getattr(self, name))
        require_choice("precision", self.precision, PRECISIONS)
        require_choice("device", self.device, DEVICES)
        if not self.output_dir:
            raise ConfigError("output_dir is empty; give output_dir=FOLDER")
        if self.authors and not isinstance(self.optim, AdamWConfig):
            raise ConfigError(f"authors: their code trains with optim=adamw only, not optim={self.optim.name}")
        if TORCH in self.engines and not isinstance(self.optim, AdamWConfig):
            raise ConfigError(
                f"engines={','.join(self.engines)}: {TORCH} trains with optim=adamw only, not optim={self.optim.name}; "
                f"use engines=[{DEEPSPEED}]"
            )
        for part in (self.optim, self.parallel, self.engine):
            part.validate()

    def entries(self, data_vocab_size: int | None = None) -> list[Entry]:
        """The models to measure, the reference first. Raises ConfigError where ranks or data do not fit a model.

        `data_vocab_size` is that of `data_dir`; without data `vocab_size` stands for it where a model names none.
        """
        reference = self.reference or self.models[0]
        found = []
        for name in sorted(self.models, key=lambda name: name != reference):
            try:
                model = self.parse(name, data_vocab_size)
                self.parallel.require_fits(model)
            except ConfigError as error:
                raise ConfigError(f"models: {name}: {error}") from None
            found += [Entry(name, model, engine) for engine in self.engines]
            if name in self.authors:
                try:
                    require_paper_layers(model)
                except ConfigError as error:
                    raise ConfigError(f"authors: {name}: {error}") from None
                found.append(Entry(name, model, AUTHORS))
        return found

    def parse(self, name: str, data_vocab_size: int | None) -> ModelConfig:
        settings = compose_choice("model", name)
        if settings["vocab_size"] is None and data_vocab_size is None:
            settings["vocab_size"] = self.vocab_size
        model = parse_model(settings, data_vocab_size)
        return model if self.context_length is None else model.replace(context_length=self.context_length)

    def global_batch_size(self, data_parallel_size: int) -> int:
        """Samples per optimizer step."""
        return self.micro_batch_size * self.gradient_accumulation_steps * data_parallel_size

    def training(self, data_parallel_size: int) -> TrainConfig:
        """The settings for the engine, others as in conf/train.yaml; nothing is saved, validated or tracked."""
        defaults = compose_command(["data_dir=none", "run_dir=none"], TrainConfig, "train")
        return dataclasses.replace(
            defaults,
            global_batch_size=self.global_batch_size(data_parallel_size),
            micro_batch_size=self.micro_batch_size,
            precision=self.precision,
            optim=self.optim,
            parallel=self.parallel,
            engine=self.engine,
        )


def model_names() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in (CONF_DIR / "model").glob("*.yaml")))
