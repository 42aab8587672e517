"""Configuration: frozen dataclasses, parsed once at the edge and validated before anything else happens.

Below the entry points there is no `DictConfig`. A class here says what its settings mean and which rules they obey
(`validate`); it never repairs a value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from kraken_train.common.errors import ConfigError
from kraken_train.common.free_text import FilePath, Name
from kraken_train.common.validation import divisors, require_at_least, require_choice, require_positive
from kraken_train.model.config import ModelConfig, ModelSettings
from kraken_train.recipe.optimizers import AdamWConfig
from kraken_train.recipe.schedules import AnySchedule

AUTO = "auto"
PRECISIONS = (AUTO, "bf16", "fp32")
LARGEST_PERIOD = 1_000_000  # samples after which a blend of data repeats: half a second and 16 MB to schedule


@dataclass(frozen=True)
class ParallelConfig:
    """How the ranks of a run share the work: `sub_layer_parallel_size` of them hold one copy of the model.

    The copies are data parallel. A Kraken is divided by sub-layers, a baseline by attention heads.
    """

    sub_layer_parallel_size: int
    vocab_parallel: bool  # divide the embedding, the head and the cross-entropy too, by rows of the vocabulary
    reduce_dtype: str | None  # bf16 | fp32: what sums over the ranks of a copy are computed in; null: the precision
    verify_every: int  # optimizer steps between checks that equal weights are equal; 0: at start and checkpoints only

    def validate(self) -> None:
        require_positive("parallel.sub_layer_parallel_size", self.sub_layer_parallel_size)
        if self.reduce_dtype is not None:
            require_choice("parallel.reduce_dtype", self.reduce_dtype, ("bf16", "fp32"))
        require_at_least("parallel.verify_every", self.verify_every, 0)

    def data_parallel_size(self, world_size: int) -> int:
        """Copies of the model among `world_size` ranks. Raises ConfigError."""
        size = self.sub_layer_parallel_size
        if world_size % size:
            raise ConfigError(
                f"parallel.sub_layer_parallel_size={size} does not divide the {world_size} "
                f"rank{'s' if world_size > 1 else ''} of this run; start a multiple of {size} ranks, or use "
                f"{' or '.join(divisors(world_size))}"
            )
        return world_size // size

    def require_fits(self, model: ModelConfig) -> None:
        """Raises ConfigError unless the ranks of a copy can share the model evenly."""
        size = self.sub_layer_parallel_size
        name, total = model.parallel_units
        if total % size:
            raise ConfigError(
                f"parallel.sub_layer_parallel_size={size} does not divide {name}={total}; use "
                f"{' or '.join(divisors(total))}"
            )
        if self.vocab_parallel and model.vocab_size % size:
            raise ConfigError(
                f"parallel.sub_layer_parallel_size={size} does not divide model.vocab_size={model.vocab_size}, which "
                "parallel.vocab_parallel=true divides too; use parallel.vocab_parallel=false or model.vocab_size="
                f"{-(-model.vocab_size // size) * size}"
            )


@dataclass(frozen=True)
class EngineConfig:
    """How a step is computed."""

    zero_stage: int  # 1 shards the optimizer state over the data-parallel ranks, 2 the gradients as well
    activation_checkpointing: bool  # keep no activations within attention and FFN, compute them again when needed
    compile: bool  # torch.compile attention and FFN

    def validate(self) -> None:
        if self.zero_stage not in (1, 2):
            why = {
                0: "DeepSpeed's ZeRO-0 reports and clips wrong gradient norms in bf16, and stage 1 costs no more",
                3: "stage 3 shards the weights as well, which Kraken's sub-layers already do",
            }.get(self.zero_stage, "there is no such stage")
            raise ConfigError(f"engine.zero_stage={self.zero_stage} is not supported ({why}); use 1 or 2")


@dataclass(frozen=True)
class CheckpointConfig:
    every: int  # optimizer steps; a checkpoint is also written after the last step
    keep: int  # how many of the newest checkpoints stay on disk
    asynchronous: bool  # write in the background while training goes on

    def validate(self) -> None:
        require_positive("checkpoint.every", self.every)
        require_positive("checkpoint.keep", self.keep)


@dataclass(frozen=True)
class ValidationConfig:
    every: int  # optimizer steps; also after the last step; 0 means never
    samples: int  # samples of the validation split, from its start

    def validate(self) -> None:
        require_at_least("validation.every", self.every, 0)
        require_positive("validation.samples", self.samples)


@dataclass(frozen=True)
class HealthConfig:
    """What is done when a run does not go well; see `kraken_train.health.loss_monitor` for what a spike is."""

    step_seconds: float  # without a step, save, validation or restore end the job; 3 times that before the first step
    straggler_factor: float  # a rank that needs so many times longer than the median one is told; 0: never
    nonfinite: str  # stop | rollback: after max_nonfinite_steps
    loss_spike: str  # ignore | stop | rollback
    spike_factor: float  # deviations above the median
    spike_window: int  # losses that the median and the deviation are of
    spike_steps: int  # in a row
    max_rollbacks: int  # before a start gives up getting past the same step

    def validate(self) -> None:
        require_at_least("health.step_seconds", self.step_seconds, 0)
        if self.straggler_factor != 0 and not self.straggler_factor > 1:
            raise ConfigError(f"health.straggler_factor={self.straggler_factor} must be above 1, or 0 to tell of none")
        require_choice("health.nonfinite", self.nonfinite, ("stop", "rollback"))
        require_choice("health.loss_spike", self.loss_spike, ("ignore", "stop", "rollback"))
        require_positive("health.spike_factor", self.spike_factor)
        require_at_least("health.spike_window", self.spike_window, 2)
        require_positive("health.spike_steps", self.spike_steps)
        require_positive("health.max_rollbacks", self.max_rollbacks)


@dataclass(frozen=True)
class TrackingConfig:
    """A copy of the run's metrics and events in Weights & Biases or TensorBoard."""

    kind: str  # wandb | tensorboard
    mode: str  # online | offline | off
    project: Name
    entity: Name | None
    name: Name | None
    group: Name | None
    tags: tuple[Name, ...]
    notes: Name | None
    finish_seconds: float  # at the end of training, for the copy to become complete

    def validate(self) -> None:
        require_choice("tracking.kind", self.kind, ("wandb", "tensorboard"))
        require_choice("tracking.mode", self.mode, ("online", "offline", "off"))
        if self.kind == "tensorboard" and self.mode == "online":
            raise ConfigError("tracking.mode=online: TensorBoard only has files; use offline or off with it")
        require_at_least("tracking.finish_seconds", self.finish_seconds, 0)


@dataclass(frozen=True)
class TrainConfig:
    """A training run; see conf/train.yaml for the defaults."""

    model: ModelSettings  # parsed with the data's vocabulary by `parse_model`
    data_dir: FilePath | dict[str, Any]  # a prepared folder, or several with their weights, see `data_shares`
    run_dir: FilePath
    init_from: FilePath | None  # an export whose weights a new run starts with; null: they are drawn from the seed
    max_steps: int  # optimizer steps
    global_batch_size: int  # samples of context_length tokens per optimizer step, over all ranks and micro-batches
    micro_batch_size: int  # samples per rank and forward pass
    seed: int
    precision: str  # auto: as the run began, else bf16 where all devices have it natively; bf16 (fp32 masters) | fp32
    resume: str  # auto: continue if the run folder has a checkpoint; never; must
    max_nonfinite_steps: int  # this many skipped steps in a row stop the run, when their results are read
    log_every: int  # optimizer steps after which results are read from the device, as they are at validations and saves
    peak_tflops: float | None  # the device's peak for the MFU; null: from a table, or measured on a CPU
    rendezvous_seconds: float  # for all ranks to start; then those that are there name the others, and end
    watchdog_seconds: float  # a rank that is dead or stopped for so long ends the job; 0: never
    optim: AdamWConfig
    schedule: AnySchedule
    parallel: ParallelConfig
    engine: EngineConfig
    checkpoint: CheckpointConfig
    validation: ValidationConfig
    tracking: TrackingConfig
    health: HealthConfig

    def validate(self) -> None:
        """Rules that need neither data nor machine. Raises ConfigError."""
        for name in ("max_steps", "global_batch_size", "micro_batch_size", "max_nonfinite_steps", "log_every"):
            require_positive(name, getattr(self, name))
        for name in ("data_dir", "run_dir"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty; give {name}=FOLDER")
        self.data_shares  # noqa: B018 (checks the weights)
        require_choice("precision", self.precision, PRECISIONS)
        require_choice("resume", self.resume, ("auto", "never", "must"))
        if self.peak_tflops is not None:
            require_positive("peak_tflops", self.peak_tflops)
        require_positive("rendezvous_seconds", self.rendezvous_seconds)
        require_at_least("watchdog_seconds", self.watchdog_seconds, 0)
        for part in (
            self.optim, self.schedule, self.parallel, self.engine, self.checkpoint, self.validation, self.tracking,
            self.health,
        ):  # fmt: skip
            part.validate()
        if self.precision == "fp32" and self.parallel.reduce_dtype == "bf16":
            raise ConfigError(
                "parallel.reduce_dtype=bf16 would round what precision=fp32 computes; use fp32 or null for it"
            )
        self.schedule.require_fits(self.max_steps)

    @property
    def data_shares(self) -> dict[Path, int]:
        """The prepared folders and how many samples each gives of `sum(shares)`: the weights as whole numbers."""
        weights = {self.data_dir: 1} if isinstance(self.data_dir, str) else self.data_dir
        return whole_shares(weights)

    def gradient_accumulation_steps(self, data_parallel_size: int) -> int:
        """Micro-batches per rank and optimizer step. Raises ConfigError where the batch does not divide."""
        samples = self.micro_batch_size * data_parallel_size
        if self.global_batch_size % samples:
            below = self.global_batch_size // samples * samples
            would = f"{below} or {below + samples}" if below else str(samples)
            raise ConfigError(
                f"global_batch_size={self.global_batch_size} is not a multiple of micro_batch_size="
                f"{self.micro_batch_size} times {data_parallel_size} data-parallel ranks; "
                f"use global_batch_size={would}, or another micro_batch_size"
            )
        return self.global_batch_size // samples


def whole_shares(weights: dict[str, Any]) -> dict[Path, int]:
    """Decimal weights as the smallest whole numbers in the same ratio: 0.75 and 0.25 are 3 and 1.

    Raises ConfigError for what is no weight, and where the numbers sum up to more than LARGEST_PERIOD.
    """
    for folder, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ConfigError(
                f"data_dir: the weight {weight} of {folder} must be a number greater than 0, as in "
                "'data_dir={data/web: 0.7, data/books: 0.3}'"
            )
    fractions = [Fraction(str(weight)) for weight in weights.values()]  # what was typed, not its binary neighbour
    denominator = math.lcm(*(fraction.denominator for fraction in fractions))
    shares = [int(fraction * denominator) for fraction in fractions]
    shares = [share // math.gcd(*shares) for share in shares]
    if sum(shares) > LARGEST_PERIOD:
        raise ConfigError(
            f"data_dir: the weights {', '.join(map(str, weights.values()))} are in the ratio "
            f"{':'.join(map(str, shares))}, but the numbers may sum up to {LARGEST_PERIOD} at most so that they can "
            "be kept exactly; round the weights, or give whole numbers such as 2 and 1"
        )
    folders = {Path(folder).expanduser(): share for folder, share in zip(weights, shares, strict=True)}
    if len(folders) < len(weights):
        raise ConfigError(f"data_dir names a folder twice ({', '.join(weights)}); give it once, with one weight")
    return folders
