"""The training loop: batch, forward and backward, update, log, validate, save, roll back, stop."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from checkpoints.exports.initial import export_reader, open_initial_export
from checkpoints.training.background import CheckpointWriter
from checkpoints.training.manifest import Checkpoint
from checkpoints.training.staging import open_stage
from checkpoints.training.store import EMA_PREFIX
from checkpoints.training.stored_tensors import StoredTensors
from kraken_train.common.settings import to_dict
from kraken_train.config import TrainConfig
from kraken_train.data.dataset import Samples
from kraken_train.data.loader import BatchLoader, ranges_of_rank
from kraken_train.data.phases import PhaseSamples, RunData
from kraken_train.data.validation_set import ValidationSet
from kraken_train.evaluation.live_suites import LiveSuites
from kraken_train.health.loss_monitor import LossMonitor, Trouble
from kraken_train.health.shutdown import Interrupted, StopRequest
from kraken_train.health.stragglers import Stragglers, describe_change, describe_ranks
from kraken_train.health.watchdog import Watchdog
from kraken_train.model.config import ModelConfig
from kraken_train.model.initialization import scale_initial_weights
from kraken_train.model.registry import build_model, even_share
from kraken_train.parallel.distributed import make_communicator
from kraken_train.parallel.mesh import ParallelMesh
from kraken_train.parallel.overlap_budget import choose_budget
from kraken_train.parallel.ranks import Runtime, slurm_job
from kraken_train.parallel.step_timer import DATA, FORWARD, StepTimer
from kraken_train.recipe.batch_ramp import START, Step
from kraken_train.recipe.parametrization import parametrization_of
from kraken_train.run.folder import RunFolder
from kraken_train.training.engine import Engine, StepResult
from kraken_train.training.metrics_logger import MetricsLogger, Record
from kraken_train.training.norms import StepNorms
from kraken_train.training.precision import reduce_dtype
from kraken_train.training.profiler import StepProfiler
from kraken_train.training.remote import remote_folder
from kraken_train.training.resume import find_checkpoint_to_resume, position_of
from kraken_train.training.rollback import find_checkpoint_before, require_rollback
from kraken_train.training.started_phases import phase_records, started_phases
from kraken_train.training.step_metrics import StepMetrics
from kraken_train.training.suites import measure_suites
from kraken_train.training.summary import summary_lines
from kraken_train.training.teacher import TeacherExport, load_teacher
from kraken_train.training.validation import validate


class Trainer:
    """One start of a run, on one rank: `restore` the state, then `train`. Both are collectives."""

    def __init__(
        self,
        config: TrainConfig,
        model_config: ModelConfig,
        data: RunData,
        samples: Sequence[PhaseSamples],
        validation_sets: Sequence[ValidationSet],
        run: RunFolder,
        runtime: Runtime,
        stop: StopRequest,
        watchdog: Watchdog,
        teacher: TeacherExport | None = None,
        suites: LiveSuites | None = None,
    ) -> None:
        self.config = config
        self.model_config = model_config
        self.data = data
        self.samples = samples
        self.validation_sets = validation_sets
        self.run = run
        self.runtime = runtime
        self.stop = stop
        self.watchdog = watchdog
        self.teacher = teacher
        self.suites = suites
        size = config.parallel.sub_layer_parallel_size
        copies = config.parallel.data_parallel_size(runtime.world_size)
        budget = choose_budget(config.parallel.max_ctas, config.parallel.sm_carveout, runtime.device, size)
        self.mesh = ParallelMesh(runtime.device.type, copies, size, budget)
        self.timer = StepTimer(runtime.device)  # active in logged steps
        communicator = make_communicator(self.mesh, reduce_dtype(config.parallel), self.timer)
        shares_vocabulary = config.parallel.shares_vocabulary(model_config.vocab_size)
        units, vocabulary = even_share(model_config, self.mesh.model_rank, shares_vocabulary)
        model = build_model(model_config, config.seed, units, communicator, vocabulary)
        model.end_of_document = data.first.end_of_document if config.attention_within_documents else None
        parametrization = parametrization_of(config.optim, model_config)
        scale_initial_weights(model, lambda kind: parametrization.multipliers(kind).initial)
        self.engine = Engine(model, config, self.mesh, runtime, self.timer, parametrization)
        self.teacher_record: dict[str, str] | None = None  # of checkpoints
        if teacher is not None:
            self.teacher_record = runtime.on_first(lambda: teacher.record)
            self.engine.teacher = load_teacher(teacher, config, communicator, model.end_of_document, runtime.device)
        self.norms = StepNorms(self.engine, config.norms.every)
        stage = run.stage(config)
        if stage is not None:
            open_stage(stage, self.engine.state_bytes, runtime)
        self.checkpoints = CheckpointWriter(
            run.checkpoints,
            config.checkpoint.retention,
            runtime,
            config.checkpoint.asynchronous,
            on_saved=lambda step: self.log_event("saved", step=step),
            stage=stage,
            remote=remote_folder(config),
            on_upload_failed=self.report_failed_upload,
        )
        self.loss_monitor = LossMonitor(config.health, config.max_nonfinite_steps)
        self.stragglers = Stragglers(config.health.straggler_factor)

        self.plan = config.step_plan(model_config.context_length)

        # The state that checkpoints keep, beside the engine's.
        self.position = START  # optimizer steps done and their tokens, skipped ones included
        self.phase = 0  # number of the phase of the last of them
        self.updates = 0  # of these, those that changed the weights
        self.consumed_samples = 0  # the position in the data; not counted are steps whose results were not read yet

        self.unread: list[Step] = []  # steps done whose results were not read yet
        self.save_due = False  # save as soon as the loss gives no reason to doubt the weights

        # Set when training begins.
        self.hosts: list[str] = []  # by rank
        self.metrics: MetricsLogger | None = None  # on rank 0
        self.step_metrics: StepMetrics
        self.batches: BatchLoader

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.position.step

    @property
    def last_step(self) -> int:
        """The number of the step with which the run ends."""
        return self.plan.end(self.position).step

    # ----------------------------------------------------------------------------------------------------------
    # The loop
    # ----------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train to `max_steps`, or to `max_tokens`, or to the end of the last of `phases`.

        Raises TrainingError for losses with which training cannot continue, and Interrupted after a request to stop.
        """
        self.engine.verify_replicas()
        self.hosts = self.runtime.gather(socket.gethostname())
        self.runtime.on_first(self.open_metrics)
        with self.metrics or nullcontext():
            for line in summary_lines(
                self.config,
                self.model_config,
                self.data,
                self.validation_sets,
                self.mesh,
                self.runtime,
                self.position,
                self.hosts,
                self.teacher,
            ):
                self.print_rank0(line)
            self.step_metrics = StepMetrics(
                self.config,
                self.model_config,
                self.runtime,
                self.engine.model.end_of_document,
                None if self.teacher is None else self.teacher.config,
            )
            with (
                StepProfiler(self.config.profile, self.run, self.runtime) as profiler,
                self.checkpoints,
                BatchLoader(self.reads_of_rank(), self.runtime.device) as self.batches,
            ):
                while self.step < self.last_step:
                    with profiler.of_step(self.step + 1, may_begin=self.step % self.config.log_every == 0):
                        self.train_step()

    def train_step(self) -> None:
        """Do one optimizer step and, if its results are needed, act on those of all steps since the last time.

        Until then results stay on the device, so that no step waits for it.
        """
        config = self.config
        if config.parallel.verify_every and self.step % config.parallel.verify_every == 0:
            self.engine.verify_replicas()
        step = self.plan.step_at(self.position)
        self.timer.active = self.is_logged(step)
        self.phase = self.plan.phase_at(self.position)

        # Gradients of the micro-batches, then the update.
        lr = self.plan.learning_rate(config.optim.lr, self.position)
        self.step_metrics.begin_step(lr)
        self.engine.set_batch_size(step.samples)
        with self.norms.of_forward(step.number):
            for _ in range(self.engine.accumulation_steps):
                with self.step_metrics.wait_for_data(), self.timer.phase(DATA):
                    input_ids, targets = next(self.batches)
                self.step_metrics.count_attention(input_ids)
                self.engine.accumulate(input_ids, targets)
        with self.norms.of_update(step.number):
            # A failed background save stops all ranks as well: the save that follows raises its error on all of them.
            self.engine.step(lr, stop=self.stop.requested or self.checkpoints.failed)
        self.timer.active = False
        self.position = step.after
        self.unread.append(step)
        self.watchdog.step = self.step
        if not (self.is_recorded(step) or self.is_saved(step)):
            return

        # Log, validate, and roll back if a loss is not what it should be.
        results = self.engine.results()
        for step, result, record in self.count_steps(results):
            if self.is_logged(step):
                record.update(self.compare_ranks())
            if self.norms.is_due(step.number):
                record.update(self.norms.take())
            if self.is_validated(step):
                record.update(self.validate())
            if self.suites is not None and self.is_measured_by_suites(step):
                record.update(self.measure(self.suites))
            self.log_step(step, record, result)
            self.loss_monitor.enter(self.plan.phase_at(step.before))
            trouble = self.loss_monitor.observe(step.number, result.loss, result.applied, last=self.is_last(step))
            if trouble is not None:
                self.roll_back(trouble)
                return

        # Save and stop, unless the last losses give a reason to doubt the weights: no checkpoint keeps such weights.
        last, stop = self.is_last(step), any(result.stop for result in results)
        self.save_due |= last or stop or self.is_saved(step)
        if not self.loss_monitor.calm:
            return
        if self.save_due:
            self.save()
        if stop and not last:
            self.stop_early()

    def is_last(self, step: Step) -> bool:
        return step.number == self.last_step

    def is_logged(self, step: Step) -> bool:
        return self.is_last(step) or step.number % self.config.log_every == 0

    def is_recorded(self, step: Step) -> bool:
        """Whether there will be a record of it, whatever its result."""
        measured = self.is_validated(step) or self.is_measured_by_suites(step) or self.norms.is_due(step.number)
        return measured or self.is_logged(step)

    def is_validated(self, step: Step) -> bool:
        validation = self.config.validation
        if not (self.validation_sets and validation.enabled):
            return False
        return self.is_last(step) or validation.interval.is_reached_by(step)

    def is_measured_by_suites(self, step: Step) -> bool:
        if self.suites is None:
            return False
        return self.is_last(step) or self.config.validation.suites_interval.is_reached_by(step)

    def is_saved(self, step: Step) -> bool:
        return self.config.checkpoint.interval.is_reached_by(step)

    def reads_of_rank(self) -> Iterator[tuple[Samples, range]]:
        """The samples of each micro-batch of this rank's model copy, from here on if nothing is skipped."""
        size, mesh = self.config.micro_batch_size, self.mesh
        position, first = self.position, self.consumed_samples
        while True:  # without an end, since a rollback takes more
            step, phase = self.plan.step_at(position), self.samples[self.plan.phase_at(position)]
            for numbers in ranges_of_rank(first, first + step.samples, size, mesh.data_rank, mesh.data_size):
                yield phase.samples, phase.numbers(numbers)
            position, first = step.after, first + step.samples

    def count_steps(self, results: list[StepResult]) -> list[tuple[Step, StepResult, Record]]:
        """Count the steps of these results as done -> (step, result, metrics) of each."""
        steps, self.unread = self.unread, []
        records = self.step_metrics.take(steps, results, self.consumed_samples)
        if self.config.phases:
            for step, record in zip(steps, records, strict=True):
                record["phase"] = self.plan.phase_at(step.before)
        self.consumed_samples += sum(step.samples for step in steps)
        self.updates += sum(result.applied for result in results)
        return list(zip(steps, results, records, strict=True))

    def validate(self) -> Record:
        batch_size, progress = self.config.micro_batch_size, self.watchdog.report_progress
        return validate(self.engine.model, self.validation_sets, batch_size, self.mesh, self.runtime, progress)

    def measure(self, suites: LiveSuites) -> Record:
        batch_size, progress = self.config.micro_batch_size, self.watchdog.report_progress
        return measure_suites(suites, self.engine.model, batch_size, self.mesh, self.runtime, progress)

    def stop_early(self) -> None:
        """Wait for the save and raise Interrupted."""
        self.checkpoints.finish()
        reason = self.stop.reason or "asked to on another rank"
        self.log_event("stopping", step=self.step, reason=reason)
        self.print_rank0(f"stopped ({reason}) after step {self.step}; the same command continues")
        raise Interrupted(reason)

    # ----------------------------------------------------------------------------------------------------------
    # Checkpoints
    # ----------------------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Continue from the newest good checkpoint, or start a new run as `init_from` says. Raises CheckpointError."""
        if not self.run.resuming:
            self.load_initial_weights()
            return
        checkpoint = find_checkpoint_to_resume(
            self.run, self.config, self.model_config, self.data.first.fingerprint, self.runtime, self.print_rank0
        )
        self.load_checkpoint(checkpoint)
        self.watchdog.report_progress()
        tokens = checkpoint.metadata["tokens"]
        self.print_rank0(f"resumed from {checkpoint.path}: step {self.step}, {tokens:,} tokens")

    def load_initial_weights(self) -> None:
        """Load the weights of `init_from`, if it is set, as those of step 0."""
        if self.config.init_from is None:
            return
        export = open_initial_export(Path(self.config.init_from), self.model_config, self.data.first.tokenizer_files)
        self.runtime.on_first(export.require_weights)
        with export_reader(export) as read:
            self.engine.load_weights(read)
        self.print_rank0(f"starting with the weights of {export.folder}")

    def load_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Load the state that `save` has written. Raises CheckpointError."""
        metadata = checkpoint.metadata
        stored = StoredTensors(checkpoint)
        with_average = any(name.startswith(EMA_PREFIX) for name in stored.entries)
        self.engine.load_state(stored.fill, metadata["updates"], with_average)
        self.position = position_of(checkpoint)
        self.phase = len(started_phases(metadata)) - 1
        self.updates = metadata["updates"]
        self.consumed_samples = metadata["consumed_samples"]
        self.loss_monitor.continue_from(metadata.get("recent_losses", ()), self.phase)  # older programs kept none
        self.save_due = False

    def save(self) -> None:
        # No random number is drawn after initialisation (the order of the data is a function of seed and position),
        # so there is no generator's state to keep.
        self.checkpoints.finish()  # before there is a second copy of the state
        self.engine.verify_replicas()
        if self.metrics is not None:
            self.metrics.sync()
        metadata = {
            "model": to_dict(self.model_config),
            "config": to_dict(self.config),
            "data_fingerprint": self.data.first.fingerprint,
            "phases": phase_records(self.config, self.data.fingerprints)[: self.phase + 1],
            "run_id": self.run.run_id,
            "updates": self.updates,
            "consumed_samples": self.consumed_samples,
            "tokens": self.consumed_samples * self.model_config.context_length,
            "trained_tokens": self.position.tokens,
            "recent_losses": list(self.loss_monitor.recent),
            "world_size": self.runtime.world_size,
            "sub_layer_parallel_size": self.mesh.model_rank.size,
            "data_parallel_size": self.mesh.data_size,
            "teacher": self.teacher_record,
        }
        self.checkpoints.save(self.step, self.engine.state(), metadata)
        self.save_due = False
        self.watchdog.report_progress()

    # ----------------------------------------------------------------------------------------------------------
    # Health
    # ----------------------------------------------------------------------------------------------------------

    def roll_back(self, trouble: Trouble) -> None:
        """Continue from the newest good checkpoint from before the trouble, with the data after it.

        Raises TrainingError where the settings do not want that, where it has not helped, or where there is none. If
        the run is killed before it has saved again, it meets the same data again, and rolls back again.
        """
        require_rollback(trouble, self.loss_monitor, self.config, self.run.checkpoints)
        self.checkpoints.finish()
        checkpoint = find_checkpoint_before(trouble, self.run.checkpoints, self.runtime)
        step, consumed = self.step, self.consumed_samples
        self.load_checkpoint(checkpoint)
        self.consumed_samples, skipped = consumed, consumed - self.consumed_samples
        self.batches.go_on_with(self.reads_of_rank())
        self.engine.verify_replicas()
        self.checkpoints.discard_newer(checkpoint)
        if self.metrics is not None:
            self.metrics.rewind(self.step)
        self.watchdog.report_progress()
        self.log_event("rolled_back", step=step, to_step=self.step, reason=trouble.reason, skipped_samples=skipped)
        self.print_rank0(
            f"{trouble.reason}: back from step {step} to {checkpoint.path}, and on with the data after step {step}; "
            f"{skipped:,} samples are skipped"
        )

    def compare_ranks(self) -> Record:
        """How long this step took each rank without waiting for others; empty for a single rank. A collective."""
        seconds = self.timer.take()
        if self.runtime.world_size == 1:
            return {}
        own = [0.0] * self.runtime.world_size
        own[self.runtime.rank] = seconds.get(DATA, 0.0) + seconds.get(FORWARD, 0.0)
        by_rank = self.runtime.sum(own)
        for change in self.stragglers.observe(by_rank):
            host, factor = self.hosts[change.rank], round(change.factor, 2)
            event = "straggler" if change.slow else "straggler_over"
            self.log_event(event, step=self.step, rank=change.rank, host=host, factor=factor)
            self.print_rank0(f"note: {describe_change(change, host)} (step {self.step})")
        return describe_ranks(by_rank)

    # ----------------------------------------------------------------------------------------------------------
    # Logging
    # ----------------------------------------------------------------------------------------------------------

    def open_metrics(self) -> None:
        consumed = self.consumed_samples * self.model_config.context_length
        self.log_event(
            "started",
            start=self.run.start_number,
            step=self.step,
            world_size=self.runtime.world_size,
            precision=self.config.precision,
            last_step=self.last_step,
            last_tokens=consumed + self.plan.end(self.position).tokens - self.position.tokens,
            **slurm_job(),
        )
        self.metrics = MetricsLogger(self.config, self.run, self.step, self.last_step)

    def log_step(self, step: Step, record: Record, result: StepResult) -> None:
        """Report a step that is logged, validated or measured, or that changed no weight."""
        if self.metrics is not None and (self.is_recorded(step) or not result.applied):
            record["memory"] = self.runtime.take_peak_memory()
            self.metrics.record(record)
        if not result.applied:
            self.log_event("skipped", step=step.number)

    def log_event(self, event: str, **details: Any) -> None:
        """Append to events.jsonl, on rank 0."""
        if self.runtime.is_first:
            self.run.events.write(event, **details)

    def report_failed_upload(self, step: int, reason: str) -> None:
        self.log_event("upload_failed", step=step, reason=reason)
        self.print_rank0(f"note: {reason}; training goes on, and the next checkpoint is copied")

    def print_rank0(self, text: str) -> None:
        if self.runtime.is_first:
            print(text, flush=True)
