"""Configuration: frozen dataclasses, parsed once at the edge and validated before anything else happens.

Below the entry points there is no `DictConfig`. A class here says what its settings mean and which rules they obey
(`validate`); it never repairs a value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from checkpoints.training.retention import Retention
from kraken_train.common.errors import ConfigError
from kraken_train.common.files import real_path
from kraken_train.common.free_text import FilePath, Name, Text
from kraken_train.common.token_counts import Tokens, format_tokens
from kraken_train.common.validation import divisors, require_at_least, require_choice, require_positive
from kraken_train.data.shares import whole_shares
from kraken_train.model.config import ModelConfig, ModelSettings
from kraken_train.recipe.batch_ramp import BatchRamp, BatchSize, describe_batch_size, validate_batch_size
from kraken_train.recipe.lengths import Length
from kraken_train.recipe.optimizers import AnyOptimizer
from kraken_train.recipe.parametrization import parametrization_of
from kraken_train.recipe.phases import Phase, run_length, validate_phases
from kraken_train.recipe.schedules import AnySchedule
from kraken_train.recipe.step_plan import StepPlan

AUTO = "auto"
PRECISIONS = (AUTO, "bf16", "fp32")
MOST_CTAS = 64  # NCCL's own limit
MOST_SPARED = 64  # multiprocessors; an A100 has 108, an H100 132
SET_NAME = re.compile(r"[\w.-]+")  # part of the name of a metric


@dataclass(frozen=True)
class ParallelConfig:
    """How the ranks of a run share the work: `sub_layer_parallel_size` of them hold one copy of the model.

    The copies are data parallel. A Kraken is divided by sub-layers, a baseline by attention heads.
    """

    # ranks that share one copy of the model; it divides the number of ranks and the model's num_sub_layers (a GPT's
    # num_heads)
    sub_layer_parallel_size: int
    # shard the embedding, the head and the cross-entropy as well, by rows of the vocabulary; null: where several ranks
    # share a copy
    vocab_parallel: bool | None
    reduce_dtype: str | None  # bf16 | fp32: number format of the sums over the ranks of a copy; null: that of precision
    # optimizer steps between checks that equal weights are equal on all ranks; 0: only at the start and at checkpoints
    verify_every: int
    # on a GPU, the most blocks of NCCL's kernels for the sums over the ranks of a copy, each of which occupies a
    # multiprocessor; 0: NCCL's choice; null: 16 on Hopper GPUs, else 0
    max_ctas: int | None = None
    # on a GPU, multiprocessors that GEMMs leave free while such a sum is under way; null: 16 on Hopper GPUs, else 0
    sm_carveout: int | None = None

    def validate(self) -> None:
        require_positive("parallel.sub_layer_parallel_size", self.sub_layer_parallel_size)
        for name, limit in (("max_ctas", MOST_CTAS), ("sm_carveout", MOST_SPARED)):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= limit:
                raise ConfigError(f"parallel.{name}={value} must be from 0 to {limit}, or null: by the device")
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
        if self.vocab_parallel and not self.can_share_vocabulary(model.vocab_size):
            raise ConfigError(
                f"parallel.vocab_parallel=true would leave one of parallel.sub_layer_parallel_size={size} ranks "
                f"without a row of model.vocab_size={model.vocab_size}; use parallel.vocab_parallel=false, or fewer "
                "ranks"
            )

    def can_share_vocabulary(self, vocab_size: int) -> bool:
        """Whether each rank of a copy would have some rows (`ModelRank.row_range`)."""
        size = self.sub_layer_parallel_size
        return (size - 1) * -(-vocab_size // size) < vocab_size

    def shares_vocabulary(self, vocab_size: int) -> bool:
        """Whether the ranks of a copy hold some rows of the vocabulary each, and not all."""
        if self.vocab_parallel is None:
            return self.sub_layer_parallel_size > 1 and self.can_share_vocabulary(vocab_size)
        return self.vocab_parallel


@dataclass(frozen=True)
class EngineConfig:
    """How a step is computed."""

    # DeepSpeed's ZeRO: 1 shards the optimizer state over the data-parallel ranks, 2 the gradients as well
    zero_stage: int
    # recompute the activations of attention and FFN in the backward pass instead of keeping them
    activation_checkpointing: bool
    # torch.compile attention, FFN and the loss; the first step then takes a minute; null: on a GPU, not on a CPU
    compile: bool | None
    # compute what lies between a Kraken's matrix products with Triton kernels; null: on a GPU where Triton is installed
    fused_kernels: bool | None = None

    def compiles(self, device_type: str) -> bool:
        """Whether to compile on devices of this type, a name of torch.device."""
        return device_type == "cuda" if self.compile is None else self.compile

    def validate(self) -> None:
        if self.zero_stage not in (1, 2):
            why = {
                0: "DeepSpeed's ZeRO-0 reports and clips wrong gradient norms in bf16, and stage 1 costs no more",
                3: "stage 3 shards the weights as well, which Kraken's sub-layers already do",
            }.get(self.zero_stage, "there is no such stage")
            raise ConfigError(f"engine.zero_stage={self.zero_stage} is not supported ({why}); use 1 or 2")


@dataclass(frozen=True)
class LossConfig:
    """What is added to the cross-entropy in training."""

    # weight of the z-loss, the mean of (log Z)^2 with Z = sum of exp(logit) over the vocabulary; 1e-4 in PaLM; 0: none
    z_loss: float

    def validate(self) -> None:
        if not 0 <= self.z_loss < math.inf:
            raise ConfigError(f"loss.z_loss={self.z_loss} must be at least 0 and finite, as 1e-4; 0 switches it off")


@dataclass(frozen=True)
class DistillConfig:
    """A teacher from whose predictions the model learns, see `kraken_train.training.teacher`."""

    # export of a model with the same tokenizer, of any architecture; its weights stay as they are; null: none
    teacher: FilePath | None = None
    # share w of the teacher in the loss (1 - w) cross-entropy + w T^2 KL(teacher || model); 0 measures KL only
    weight: float = 0.5
    temperature: float = 1.0  # T, by which the logits of both are divided in KL

    def validate(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ConfigError(f"distill.weight={self.weight} must be from 0 (text alone) to 1 (teacher alone)")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"distill.temperature={self.temperature} must be above 0 and finite, as 1 or 2")


@dataclass(frozen=True)
class CheckpointConfig:
    every: int  # optimizer steps; the last step is saved as well
    keep: int  # checkpoints that stay on disk, the newest ones
    asynchronous: bool  # write in the background while training continues
    # tokens, as in 100M, in place of every: the step that reaches a multiple is saved; null: every counts
    every_tokens: Tokens | None = None
    # steps; the first checkpoint at or after each multiple of it also stays; null: none
    keep_every: int | None = None
    keep_hours: float = 0  # checkpoints that are younger than so many hours also stay
    # folder on a local disk of each node: a save is written there first, and copied to run_dir while training
    # continues; null: none
    stage_dir: FilePath | None = None
    # URL of object storage, such as s3://bucket/run or gs://bucket/run, to which finished checkpoints are copied too,
    # with the same ones kept; an empty run_dir continues from the newest there; null: none
    remote_dir: Text | None = None

    @property
    def retention(self) -> Retention:
        return Retention(self.keep, self.keep_every, 3600 * self.keep_hours)

    @property
    def interval(self) -> Length:
        return Length("checkpoint.every", self.every, "checkpoint.every_tokens", self.every_tokens)

    def validate(self) -> None:
        require_positive("checkpoint.every", self.every)
        if self.every_tokens is not None:
            require_positive("checkpoint.every_tokens", self.every_tokens)
        require_positive("checkpoint.keep", self.keep)
        if self.keep_every is not None:
            require_positive("checkpoint.keep_every", self.keep_every)
        require_at_least("checkpoint.keep_hours", self.keep_hours, 0)


@dataclass(frozen=True)
class ValidationConfig:
    every: int  # optimizer steps; the last step is validated as well; 0: never
    samples: int  # samples, from the start of the validation split
    # tokens, as in 100M, in place of every: the step that reaches a multiple is validated; 0: never; null: every counts
    every_tokens: Tokens | None = None
    # further prepared folders, by a name for each: {books: DIR, code: DIR}; measured on their validation splits, with
    # so many samples each; null: none
    sets: dict[str, FilePath] | None = None
    # suites of tasks, files of conf/suite, or single tasks of them, that lm-evaluation-harness measures on the weights
    # as they are: [lambada, blimp, superglue/boolq]; null: none
    suites: list[str] | None = None
    suites_every: int = 1000  # optimizer steps; the last step as well
    # tokens, as in 1B, in place of suites_every: the step that reaches a multiple; null: suites_every counts
    suites_every_tokens: Tokens | None = None
    suite_data: FilePath | None = None  # folder of JSONL files for them, as in conf/evaluate.yaml; null: the Hub
    suite_limit: int | None = None  # documents of each task, the first ones; null: all

    @property
    def folders(self) -> dict[str, Path]:
        """Of the further sets."""
        return {name: Path(folder).expanduser() for name, folder in (self.sets or {}).items()}

    @property
    def interval(self) -> Length:
        return Length("validation.every", self.every, "validation.every_tokens", self.every_tokens)

    @property
    def suites_interval(self) -> Length:
        names = "validation.suites_every", "validation.suites_every_tokens"
        return Length(names[0], self.suites_every, names[1], self.suites_every_tokens)

    @property
    def enabled(self) -> bool:
        return (self.every if self.every_tokens is None else self.every_tokens) > 0

    def validate(self) -> None:
        self.interval.validate(minimum=0)
        require_positive("validation.samples", self.samples)
        self.suites_interval.validate(minimum=1)
        if self.suite_limit is not None:
            require_positive("validation.suite_limit", self.suite_limit)
        if self.suites is not None and len(set(self.suites)) < max(1, len(self.suites)):
            raise ConfigError(f"validation.suites={self.suites} must be names of suites, each once, or null for none")
        for name in ("suite_data", "suite_limit"):
            if self.suites is None and getattr(self, name) is not None:
                raise ConfigError(f"validation.{name}={getattr(self, name)} needs validation.suites=[NAME, ...]")
        for name, folder in (self.sets or {}).items():
            if not SET_NAME.fullmatch(name) or not folder:
                raise ConfigError(
                    f"validation.sets: {name or 'an empty name'}={folder} must be a name of letters, digits, '.', '_' "
                    "and '-' with the folder of prepared data, as in 'validation.sets={books: data/books}'"
                )


@dataclass(frozen=True)
class HealthConfig:
    """What is done when a run does not go well; see `kraken_train.health.loss_monitor` for what a spike is."""

    # time without a step, save, validation or restore after which the job ends, and three times that before the first
    # step; all ranks write their stacks to RUN_DIR/starts/NUMBER/logs first, as they do after `kill -USR2 PROCESS`;
    # less than the 1800 s after which collectives time out without such a message; 0: never
    step_seconds: float
    # warn about a rank whose own work takes so many times longer than that of the median rank; 0: never
    straggler_factor: float
    nonfinite: str  # stop | rollback: after max_nonfinite_steps
    # ignore | stop | rollback: to the newest checkpoint before the spike, and on with the data after it; a spike is
    # spike_steps losses in a row, each above median + spike_factor * deviation of the last spike_window ones; nothing
    # is saved meanwhile
    loss_spike: str
    # deviations above the median; the deviation is the median absolute one, at least 1% of the median
    spike_factor: float
    spike_window: int  # losses of which the median and the deviation are computed
    spike_steps: int  # losses in a row that make a spike
    max_rollbacks: int  # rollbacks of a start before the same step; after them it stops

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
class ProfileConfig:
    """Traces of optimizer steps, see `kraken_train.training.profiler`."""

    # [FIRST, LAST]: optimizer steps of which PyTorch's profiler writes a trace to RUN_DIR/starts/NUMBER/profiles; []:
    # none; `echo 5 > RUN_DIR/profile` traces the next 5 steps of a running job
    steps: tuple[int, ...] = ()
    ranks: tuple[int, ...] = (0,)  # that write one
    memory: bool = False  # also a snapshot of the GPU's memory over these steps, for https://pytorch.org/memory_viz

    def validate(self) -> None:
        """Raises ConfigError."""
        if self.steps and not (len(self.steps) == 2 and 1 <= self.steps[0] <= self.steps[1]):
            raise ConfigError(f"profile.steps={list(self.steps)} must be the first and the last step, as in [100,110]")
        if any(rank < 0 for rank in self.ranks):
            raise ConfigError(f"profile.ranks={list(self.ranks)} must be numbers of ranks, as in [0,7]; [] traces none")


@dataclass(frozen=True)
class NormsConfig:
    """Sizes of weights, updates and activations by layer, see `kraken_train.training.norms`."""

    # optimizer steps between those in which the sizes of weights, updates, activations and, in a Kraken, of the
    # exchanged sums are measured, layer by layer; 0: never
    every: int = 100

    def validate(self) -> None:
        """Raises ConfigError."""
        require_at_least("norms.every", self.every, 0)


@dataclass(frozen=True)
class TrackingConfig:
    """A copy of the run's metrics and events in Weights & Biases or TensorBoard."""

    kind: str  # wandb | tensorboard
    mode: str  # online | offline (W&B: in RUN_DIR/wandb, for `wandb sync`) | off
    project: Name  # project in W&B
    entity: Name | None  # user or team in W&B; null: the default one
    name: Name | None  # name of the run; null: that of the run folder
    group: Name | None  # group of runs; null: none
    tags: tuple[Name, ...]  # tags of the run
    notes: Name | None  # a text about the run; null: none
    finish_seconds: float  # longest wait at the end of training for data that has not been sent

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
    profile: ProfileConfig = ProfileConfig()
    distill: DistillConfig = DistillConfig()
    norms: NormsConfig = NormsConfig()
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
