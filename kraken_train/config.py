"""Configuration: frozen dataclasses, parsed once at the edge and validated before anything else happens.

Below the entry points there is no `DictConfig`. A class here says what its settings mean and which rules they obey
(`validate`); it never repairs a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from kraken_train.common.errors import ConfigError
from kraken_train.common.files import real_path
from kraken_train.common.free_text import FilePath
from kraken_train.common.token_counts import Tokens, format_tokens
from kraken_train.common.validation import require_at_least, require_choice, require_positive
from kraken_train.data.shares import whole_shares
from kraken_train.model.config import ModelConfig, ModelSettings
from kraken_train.recipe.batch_ramp import BatchRamp, BatchSize, describe_batch_size, validate_batch_size
from kraken_train.recipe.lengths import Length
from kraken_train.recipe.optimizers import AnyOptimizer
from kraken_train.recipe.parametrization import parametrization_of
from kraken_train.recipe.phases import Phase, run_length, validate_phases
from kraken_train.recipe.schedules import AnySchedule
from kraken_train.recipe.step_plan import StepPlan
from kraken_train.settings.checkpoint import CheckpointConfig
from kraken_train.settings.engine import EngineConfig
from kraken_train.settings.health import HealthConfig
from kraken_train.settings.inspection import NormsConfig, ProfileConfig
from kraken_train.settings.loss import DistillConfig, LossConfig
from kraken_train.settings.parallel import ParallelConfig
from kraken_train.settings.tracking import TrackingConfig
from kraken_train.settings.validation import ValidationConfig

AUTO = "auto"
PRECISIONS = (AUTO, "bf16", "fp32")


@dataclass(frozen=True)
class TrainConfig:
    """A training run; see conf/train.yaml for the defaults."""

    model: ModelSettings  # parsed with the data's vocabulary by `parse_model`
    # folder that data_prep.prepare has written, or several with weights: {data/web: 0.7, data/books: 0.3}
    data_dir: FilePath | dict[str, Any]
    run_dir: FilePath  # folder of the run: checkpoints, metrics, logs
    # export of the same model, whose weights a new run starts with; null: initial weights are drawn from the seed
    init_from: FilePath | None
    max_steps: int  # optimizer steps
    # samples of context_length tokens per optimizer step, over all ranks; a ramp, as in {0: 128, 1B: 256}: 128 in the
    # steps that begin before 1B tokens, then 256
    global_batch_size: BatchSize
    micro_batch_size: int  # samples per rank and forward pass; gradients are accumulated up to global_batch_size
    seed: int  # of the initial weights and of the order of samples
    # bf16 (with fp32 master weights and accumulation) | fp32 | auto: bf16 where every rank's device computes it
    # natively (CUDA from compute capability 8.0, CPUs with AMX-BF16 or AVX512-BF16), else fp32; a continued run keeps
    # its precision
    precision: str
    # a token sees no other document of its sample, and positions begin anew in each document
    attention_within_documents: bool
    resume: str  # auto: continue if the run folder has a checkpoint | never | must
    # a step whose loss or gradient is not finite is skipped; after so many in a row health.nonfinite applies
    max_nonfinite_steps: int
    # optimizer steps between reads of the results from the device; requests to stop are answered then, too
    log_every: int
    peak_tflops: float | None  # peak of a device, for the MFU; null: from a table of GPUs; a CPU is measured
    rendezvous_seconds: float  # time for all ranks to start; then those that started name the missing ones and end
    watchdog_seconds: float  # a rank that is dead or stopped for so long ends the job; 0: no watchdog
    optim: AnyOptimizer
    schedule: AnySchedule
    parallel: ParallelConfig
    engine: EngineConfig
    loss: LossConfig
    checkpoint: CheckpointConfig
    validation: ValidationConfig
    tracking: TrackingConfig
    health: HealthConfig
    # tokens to train on, as in 2B, in place of max_steps: the step that reaches them is the last; null: max_steps count
    max_tokens: Tokens | None = None
    # in place of max_tokens, as in [{until: 8B}, {until: 10B, data_dir: {web: 0.3, books: 0.7}, schedule: decay}]; each
    # ends with the step that reaches its tokens, the last one ends the run. data_dir: null is that of the phase
    # before. schedule: continue, or decay: linear to 0 at the end of the run. null: none
    phases: tuple[Phase, ...] | None = None
    # keep an exponential average of the weights too: after each update, average = d average + (1 - d) weights with this
    # d, such as 0.999; `checkpoints.export weights=ema` exports it; null: none
    ema_decay: float | None = None
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    norms: NormsConfig = field(default_factory=NormsConfig)
    # the same training on the same devices gives the same bits, also after a kill: deterministic algorithms only, and
    # an error where an operation has none; slower on a GPU
    deterministic: bool = False

    def validate(self) -> None:
        """Rules that need neither data nor machine. Raises ConfigError."""
        for name in ("max_steps", "micro_batch_size", "max_nonfinite_steps", "log_every"):
            require_positive(name, getattr(self, name))
        if self.max_tokens is not None:
            require_positive("max_tokens", self.max_tokens)
        if self.phases is not None:
            validate_phases(self.phases)
            self.validate_beside_phases(self.phases)
        validate_batch_size(self.global_batch_size)
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError(
                f"ema_decay={self.ema_decay} must be between 0 and 1, such as 0.999, which averages over the last 1000 "
                "updates or so; or null for no average"
            )
        for name in ("data_dir", "run_dir"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty; give {name}=FOLDER")
        self.data_phases  # noqa: B018 (checks the weights)
        stage = self.checkpoint.stage_dir
        if stage is not None and real_path(stage).is_relative_to(real_path(self.run_dir)):
            raise ConfigError(
                f"checkpoint.stage_dir={stage} is in run_dir={self.run_dir}, to which checkpoints are copied from "
                "there; use a folder on a local disk of each node"
            )
        require_choice("precision", self.precision, PRECISIONS)
        require_choice("resume", self.resume, ("auto", "never", "must"))
        if self.peak_tflops is not None:
            require_positive("peak_tflops", self.peak_tflops)
        require_positive("rendezvous_seconds", self.rendezvous_seconds)
        require_at_least("watchdog_seconds", self.watchdog_seconds, 0)
        for part in (
            self.optim, self.schedule, self.parallel, self.engine, self.loss, self.checkpoint, self.validation,
            self.tracking, self.health, self.profile, self.distill, self.norms,
        ):  # fmt: skip
            part.validate()
        if self.precision == "fp32" and self.parallel.reduce_dtype == "bf16":
            raise ConfigError(
                "parallel.reduce_dtype=bf16 would round what precision=fp32 computes; use fp32 or null for it"
            )
        context_length = self.model.get("context_length")
        if isinstance(context_length, int):
            self.step_plan(context_length)

    def validate_beside_phases(self, phases: Sequence[Phase]) -> None:
        """Raises ConfigError where a setting of the run says something else than its phases."""
        end, first = phases[-1].until, phases[0].data_dir
        if self.max_tokens not in (None, end):
            raise ConfigError(
                f"max_tokens={format_tokens(self.max_tokens)} is not the end of the last of the phases, "
                f"{format_tokens(end)}; leave max_tokens out"
            )
        if first is not None and whole_shares(first, "phases[0].data_dir") != whole_shares(self.data_dir):
            raise ConfigError(
                f"phases[0].data_dir={first} is not data_dir={self.data_dir}, with which a run begins; give it as "
                "data_dir alone"
            )

    @property
    def length(self) -> Length:
        """Of the run."""
        return run_length(self.max_steps, self.max_tokens, self.phases or ())

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The samples of a step: one number, or those of the ramp in their order."""
        size = self.global_batch_size
        return (size,) if isinstance(size, int) else tuple(size.values())

    def step_plan(self, context_length: int) -> StepPlan:
        """Raises ConfigError where the run is too short for its schedule."""
        ramp = BatchRamp(self.global_batch_size, context_length)
        plan = StepPlan(self.length, self.schedule, ramp, self.phases or ())
        plan.require_fits()
        return plan

    def require_fits(self, model: ModelConfig) -> None:
        """Raises ConfigError unless the model can be trained so: its ranks, lengths in tokens and parametrization."""
        self.parallel.require_fits(model)
        self.step_plan(model.context_length)
        parametrization_of(self.optim, model)

    @property
    def data_phases(self) -> dict[int, dict[Path, int]]:
        """What the run reads, by the tokens after which it begins to.

        Of each phase the prepared folders and how many samples each gives of `sum(shares)`: the weights as whole
        numbers.
        """
        shares = whole_shares(self.data_dir)
        phases = {0: shares}
        for number, (before, phase) in enumerate(pairwise(self.phases or ()), 1):
            if phase.data_dir is not None:
                shares = whole_shares(phase.data_dir, f"phases[{number}].data_dir")
            phases[before.until] = shares
        return phases

    @property
    def data_folders(self) -> set[Path]:
        """All that the run reads for training."""
        return {folder for shares in self.data_phases.values() for folder in shares}

    def gradient_accumulation_steps(self, data_parallel_size: int) -> int:
        """Micro-batches per rank and optimizer step, at most. Raises ConfigError where a batch does not divide."""
        samples = self.micro_batch_size * data_parallel_size
        for size in self.batch_sizes:
            if size % samples:
                below = size // samples * samples
                would = f"{below} or {below + samples}" if below else str(samples)
                alone = isinstance(self.global_batch_size, int)
                raise ConfigError(
                    f"global_batch_size={describe_batch_size(self.global_batch_size)}"
                    f"{'' if alone else f': {size}'} is not a multiple of micro_batch_size="
                    f"{self.micro_batch_size} times {data_parallel_size} data-parallel ranks; "
                    f"use {'global_batch_size=' if alone else ''}{would}, or another micro_batch_size"
                )
        return max(self.batch_sizes) // samples
