"""Pretraining: `python -m kraken_train.train model=NAME data_dir=DATA run_dir=RUN`, alone or under a launcher."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from checkpoints.exports.initial import export_reader, open_initial_export
from checkpoints.training.manifest import Checkpoint, has_checkpoints
from checkpoints.training.store import fill_tensors, find_good_checkpoint, model_of, set_aside_after
from checkpoints.training.writer import CheckpointWriter, go_back_to
from kraken_train.common.cli import run_entry
from kraken_train.common.errors import CheckpointError, KrakenError, RankLostError, TrainingError
from kraken_train.common.settings import to_dict
from kraken_train.config import AUTO, TrainConfig
from kraken_train.data.dataset import Samples, TrainingData
from kraken_train.data.loader import BatchLoader, ranges_of_rank
from kraken_train.evaluation.perplexity import perplexity, token_losses
from kraken_train.health.loss_monitor import LossWatch, Trouble
from kraken_train.health.shutdown import INTERRUPTED_EXIT_CODE, Interrupted, StopRequest
from kraken_train.health.stack_dump import stacks_on_signal
from kraken_train.health.stragglers import Change, Stragglers, describe_ranks
from kraken_train.health.watchdog import Watchdog
from kraken_train.model.config import ModelConfig, parse_model
from kraken_train.model.flops import device_peak_flops, training_flops_per_token
from kraken_train.model.head_dims import head_size_note
from kraken_train.model.registry import build_model, even_share
from kraken_train.parallel.distributed import make_communicator
from kraken_train.parallel.mesh import ParallelMesh
from kraken_train.parallel.ranks import Runtime, another_rank_ended, read_runtime, slurm_job
from kraken_train.parallel.step_timer import DATA, FORWARD, StepTimer
from kraken_train.run.events import FAILED, FINISHED, INTERRUPTED
from kraken_train.run.folder import RunFolder, open_run_folder, recorded_precision
from kraken_train.run.rank_errors import record_error
from kraken_train.run.recorded_settings import recorded_settings
from kraken_train.run.start import describe_error, recorded, write_environment
from kraken_train.tracking.ready import require_ready
from kraken_train.training.engine import Engine, start_processes, stop_processes
from kraken_train.training.metrics_logger import Metrics, Record
from kraken_train.training.optim import describe_jump, learning_rate
from kraken_train.training.precision import ChosenPrecision, choose_precision, has_native_bf16, reduce_dtype

LEARNING_SETTINGS = ("optim", "schedule", "max_steps", "global_batch_size", "precision")


def main() -> None:
    run_entry(train, TrainConfig, "train")


def train(config: TrainConfig) -> None:
    """Train to `config.max_steps`, from the run folder's newest good checkpoint if it has one.

    Exits with INTERRUPTED_EXIT_CODE, after saving, if a signal or the end of its launcher asked it to stop before.
    """
    runtime = read_runtime()
    data = TrainingData(config.data_shares)
    model_config = parse_model(config.model, data.vocab_size)
    config.parallel.require_fits(model_config)
    config.gradient_accumulation_steps(config.parallel.data_parallel_size(runtime.world_size))
    samples = data.samples(model_config.context_length, config.seed)

    stop = StopRequest()
    try:
        with ExitStack() as held:
            rendezvous = start_processes(runtime, config.rendezvous_seconds)
            precision = find_precision(config, runtime)
            config = replace(config, precision=precision.name)
            config.validate()
            runtime.on_first(lambda: require_ready(config.tracking, os.environ))
            watchdog = held.enter_context(
                Watchdog(
                    runtime,
                    rendezvous.store,
                    config.watchdog_seconds,
                    stop,
                    rendezvous.store_rank,
                    config.health.step_seconds,
                )
            )
            run = runtime.on_first(
                lambda: open_run_folder(config, model_config, data.tokenizer_dir, data.fingerprint, held)
            )
            watchdog.log = held.enter_context(recorded(run.start, runtime))
            watchdog.on_end = end_by_watchdog(run, runtime, watchdog)
            held.enter_context(stacks_on_signal(watchdog.log))
            if runtime.is_first:
                held.enter_context(end_told(run, watchdog))
            held.enter_context(lost_ranks_told(watchdog))
            write_environment(run.start, runtime)
            if runtime.is_first:
                print(precision.describe(), flush=True)
            trainer = Trainer(config, model_config, data, samples, run, runtime, stop, watchdog)
            trainer.restore()
            with stop.on_signals():  # before there is a step, there is nothing to save
                trainer.run_steps()
    except Interrupted:
        stop_processes(runtime)
        sys.exit(INTERRUPTED_EXIT_CODE)
    stop_processes(runtime)


def find_precision(config: TrainConfig, runtime: Runtime) -> ChosenPrecision:
    """What this start computes in, the same on all ranks. A collective. Raises CheckpointError."""
    recorded = runtime.on_first(lambda: recorded_precision(Path(config.run_dir)) if config.precision == AUTO else None)
    return choose_precision(config.precision, recorded, runtime.all_true(has_native_bf16(runtime.device)))


@contextmanager
def lost_ranks_told(watchdog: Watchdog) -> Iterator[None]:
    """What a collective says when another rank is gone becomes RankLostError."""
    try:
        yield
    except RuntimeError as error:
        watchdog.wait_for_end()
        if another_rank_ended(error):
            raise RankLostError(
                "another rank has ended, see its message; the same command continues from the newest checkpoint"
            ) from error
        raise


@contextmanager
def end_told(run: RunFolder, watchdog: Watchdog) -> Iterator[None]:
    """How the start ends is the last of its events, unless it is killed."""

    def tell(outcome: str, reason: str | None = None) -> None:
        run.events.write("ended", start=run.start_number, step=watchdog.step, outcome=outcome, reason=reason)

    try:
        yield
    except Interrupted as interruption:
        tell(INTERRUPTED, str(interruption))
        raise
    except Exception as error:
        tell(FAILED, str(error) if isinstance(error, KrakenError) else f"{type(error).__name__}: {error}")
        raise
    tell(FINISHED)


def end_by_watchdog(run: RunFolder, runtime: Runtime, watchdog: Watchdog) -> Callable[[str, bool], None]:
    """What is kept of a start that the watchdog ends, while the main thread hangs."""

    def tell(message: str, follows: bool) -> None:
        record_error(run.start, replace(describe_error(RankLostError(message), runtime), follows=follows))
        if runtime.is_first:
            run.events.write("ended", start=run.start_number, step=watchdog.step, outcome=FAILED, reason=message)

    return tell


class Trainer:
    """One start of a run, on one rank."""

    def __init__(
        self,
        config: TrainConfig,
        model_config: ModelConfig,
        data: TrainingData,
        samples: Samples,
        run: RunFolder,
        runtime: Runtime,
        stop: StopRequest,
        watchdog: Watchdog,
    ) -> None:
        self.config = config
        self.model_config = model_config
        self.data = data
        self.samples = samples
        self.batches: Iterator[tuple[Tensor, Tensor]] = iter(())  # from the first step on
        self.run = run
        self.events = run.events  # written by rank 0
        self.runtime = runtime
        self.stop = stop
        self.watchdog = watchdog
        size = config.parallel.sub_layer_parallel_size
        self.mesh = ParallelMesh(runtime.device.type, config.parallel.data_parallel_size(runtime.world_size), size)
        self.timer = StepTimer(runtime.device)  # of the steps that are logged
        communicator = make_communicator(self.mesh, reduce_dtype(config.parallel), self.timer)
        units, vocabulary = even_share(model_config, self.mesh.model_rank, config.parallel.vocab_parallel)
        model = build_model(model_config, config.seed, units, communicator, vocabulary)
        self.engine = Engine(model, config, self.mesh, runtime, self.timer)
        self.checkpoints = CheckpointWriter(
            run.checkpoints, config.checkpoint.keep, runtime, config.checkpoint.asynchronous, self.tell_saved
        )
        self.step = 0  # optimizer steps done, skipped ones included
        self.updates = 0  # of these, those that changed the weights
        self.consumed_samples = 0  # the position in the data
        # Of the steps whose results have not been read: learning rates, when they began, seconds waited for data.
        self.unread: list[float] = []
        self.started, self.waited = 0.0, 0.0
        self.save_due = False  # as soon as the loss gives no reason to doubt the weights
        self.loss_watch = LossWatch(config.health, config.max_nonfinite_steps)
        self.stragglers = Stragglers(config.health.straggler_factor)
        self.hosts: list[str] = []  # of the ranks
        self.flops_per_token = training_flops_per_token(model_config)
        self.peak_flops = config.peak_tflops * 1e12 if config.peak_tflops else None
        self.metrics: Metrics | None = None

    def run_steps(self) -> None:
        self.engine.verify_replicas()
        self.hosts = self.runtime.gather(socket.gethostname())
        self.runtime.on_first(self.start_metrics)
        with self.metrics or nullcontext():
            self.introduce()
            if self.peak_flops is None:
                self.peak_flops = device_peak_flops(self.runtime.device, self.config.precision)
            with self.checkpoints, self.load_batches() as self.batches:
                while self.step < self.config.max_steps:
                    self.train_step()

    def start_metrics(self) -> None:
        self.tell(
            "started",
            start=self.run.start_number,
            step=self.step,
            world_size=self.runtime.world_size,
            precision=self.config.precision,
            **slurm_job(),
        )
        self.metrics = Metrics(self.config, self.run, self.step)

    def train_step(self) -> None:
        if self.config.parallel.verify_every and self.step % self.config.parallel.verify_every == 0:
            self.engine.verify_replicas()
        if not self.unread:
            self.started, self.waited = time.perf_counter(), 0.0
        self.timer.active = self.is_logged(self.step + 1)
        lr = learning_rate(self.config.schedule, self.config.optim.lr, self.step, self.config.max_steps)
        for _ in range(self.engine.accumulation_steps):
            asked = time.perf_counter()
            with self.timer.phase(DATA):
                batch = next(self.batches)
            self.waited += time.perf_counter() - asked
            self.engine.accumulate(*batch)
        # A save that has failed in the background is told where the next one begins: at once.
        self.engine.step(lr, stop=self.stop.requested or self.checkpoints.failed)
        self.timer.active = False
        self.unread.append(lr)
        self.step += 1
        self.watchdog.step = self.step
        if self.is_logged(self.step) or self.is_validated(self.step) or self.step % self.config.checkpoint.every == 0:
            self.read_results()

    def is_logged(self, step: int) -> bool:
        return step == self.config.max_steps or step % self.config.log_every == 0

    def is_validated(self, step: int) -> bool:
        every = self.config.validation.every
        return self.data.has_validation and every > 0 and (step == self.config.max_steps or step % every == 0)

    def read_results(self) -> None:
        """Log what has come of the steps since the last time, and act on it; until then no step waits for the device.

        Raises TrainingError for losses with which training cannot go on, and Interrupted.
        """
        results, rates = self.engine.results(), self.unread
        self.unread = []
        seconds, batch = time.perf_counter() - self.started, self.config.global_batch_size
        tokens_per_second = len(results) * batch * self.model_config.context_length / seconds
        samples = self.consumed_samples
        self.consumed_samples += len(results) * batch
        self.updates += sum(result.applied for result in results)
        last = self.step == self.config.max_steps
        for step, (lr, result) in enumerate(zip(rates, results, strict=True), self.step - len(results) + 1):
            samples += batch
            record: Record = {
                "step": step,
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "lr": lr,
                "tokens": samples * self.model_config.context_length,
                "tokens_per_second": tokens_per_second,
                "data_wait": self.waited / seconds,
            }
            if self.peak_flops:
                device_peak = self.peak_flops * self.runtime.world_size
                record["mfu"] = self.flops_per_token * tokens_per_second / device_peak
            if self.is_logged(step):
                record |= self.compare_ranks(self.timer.take())
            if self.is_validated(step):
                record["validation_loss"] = loss = self.validate()
                record["validation_perplexity"] = perplexity(loss)
            if self.metrics is not None and (self.is_logged(step) or "validation_loss" in record or not result.applied):
                record["memory"] = self.runtime.take_peak_memory()
                self.metrics.record(record)
            if not result.applied:
                self.tell("skipped", step=step)
            trouble = self.loss_watch.observe(step, result.loss, result.applied, last and step == self.step)
            if trouble is not None:
                self.roll_back(trouble)
                return
        stop = any(result.stop for result in results)
        self.save_due |= last or stop or self.step % self.config.checkpoint.every == 0
        # In trouble nothing is saved: the newest checkpoint stays one from before it.
        if not self.loss_watch.calm:
            return
        if self.save_due:
            self.save()
        if stop and not last:
            self.checkpoints.finish()
            reason = self.stop.reason or "asked to on another rank"
            self.tell("stopping", step=self.step, reason=reason)
            self.say(f"stopped ({reason}) after step {self.step}; the same command continues")
            raise Interrupted(reason)

    def load_batches(self) -> BatchLoader:
        """The micro-batches of this rank's copy of the model from here on, without an end: a rollback takes more."""
        size, mesh = self.config.micro_batch_size, self.mesh
        ranges = ranges_of_rank(self.consumed_samples, sys.maxsize, size, mesh.data_rank, mesh.data_size)
        return BatchLoader(self.samples, ranges, self.runtime.device)

    # ----------------------------------------------------------------------------------------------------------
    # Health
    # ----------------------------------------------------------------------------------------------------------

    def compare_ranks(self, seconds: dict[str, float]) -> Record:
        """What this step took each rank without waiting for others; nothing of a single rank. A collective."""
        if self.runtime.world_size == 1:
            return {}
        own = [0.0] * self.runtime.world_size
        own[self.runtime.rank] = seconds.get(DATA, 0.0) + seconds.get(FORWARD, 0.0)
        of_ranks = self.runtime.sum(own)
        for change in self.stragglers.observe(of_ranks):
            self.tell_straggler(change)
        return describe_ranks(of_ranks)

    def tell_straggler(self, change: Change) -> None:
        place = {"rank": change.rank, "host": self.hosts[change.rank], "factor": round(change.factor, 2)}
        self.tell("straggler" if change.slow else "straggler_over", step=self.step, **place)
        what = "holds the others up" if change.slow else "no longer holds the others up"
        self.say(
            f"note: rank {change.rank} on {place['host']} {what}: it takes {change.factor:.1f} times as long as the "
            f"median rank for its own part of a step (step {self.step})"
        )

    def roll_back(self, trouble: Trouble) -> None:
        """Continue from the newest good checkpoint from before the trouble, with the data after it.

        Raises TrainingError where the settings do not want that, where it has not helped, or where there is none. If
        the run is killed before it has saved again, it meets the same data again, and rolls back again.
        """
        if not self.loss_watch.wants_rollback(trouble):
            raise TrainingError(self.describe_trouble(trouble))
        if not self.loss_watch.may_roll_back():
            raise TrainingError(
                f"{trouble.reason}, and health.max_rollbacks={self.config.health.max_rollbacks} did not suffice to get "
                f"past step {self.loss_watch.furthest}; {self.describe_checkpoints()}. Try a lower optim.lr in a new "
                "run_dir"
            )
        self.checkpoints.finish()
        checkpoint = self.find_checkpoint_before(trouble)
        step, consumed = self.step, self.consumed_samples
        self.take_over(checkpoint)
        self.consumed_samples, skipped = consumed, consumed - self.consumed_samples
        self.engine.verify_replicas()
        self.runtime.on_first(lambda: go_back_to(checkpoint))
        if self.metrics is not None:
            self.metrics.rewind(self.step)
        self.watchdog.alive()
        self.tell("rolled_back", step=step, to_step=self.step, reason=trouble.reason, skipped_samples=skipped)
        self.say(
            f"{trouble.reason}: back from step {step} to {checkpoint.path}, and on with the data after step {step}; "
            f"{skipped:,} samples are skipped"
        )

    def find_checkpoint_before(self, trouble: Trouble) -> Checkpoint:
        """Preferably one that the loss of the step after it has shown to be good. Raises TrainingError."""
        for before in (trouble.first - 1, trouble.first):
            try:
                return find_good_checkpoint(self.run.checkpoints, self.runtime, before)[0]
            except CheckpointError as error:
                problem = error
        raise TrainingError(f"{trouble.reason}, and the run cannot be rolled back: {problem}") from problem

    def describe_trouble(self, trouble: Trouble) -> str:
        if trouble.spike:
            return (
                f"{trouble.reason} (health.loss_spike=stop); {self.describe_checkpoints()}. The same command meets the "
                "same data: health.loss_spike=rollback goes on with those after it, ignore with all of them"
            )
        return (
            f"{trouble.reason} (max_nonfinite_steps={self.config.max_nonfinite_steps}); they changed no weight, and "
            f"{self.describe_checkpoints()}. Try a lower optim.lr or a longer schedule.warmup_steps in a new run_dir, "
            "or health.nonfinite=rollback"
        )

    def describe_checkpoints(self) -> str:
        kept = has_checkpoints(self.run.checkpoints)
        return f"the checkpoints in {self.run.checkpoints} are kept" if kept else "there is no checkpoint yet"

    def validate(self) -> float:
        """Mean loss in nats per token over the first `validation.samples` windows of the validation data."""
        config = self.config
        nats, tokens = 0.0, 0
        for index, windows in enumerate(
            self.data.validation_windows(
                self.model_config.context_length, config.micro_batch_size, config.validation.samples
            )
        ):
            if index % self.mesh.data_size == self.mesh.data_rank:
                batch_nats, batch_tokens = token_losses(self.engine.model, windows)
                nats += batch_nats
                tokens += batch_tokens
        # Each rank of a copy counts the copy's windows, which leaves the mean as it is.
        nats, all_tokens = self.runtime.sum([nats, float(tokens)])
        self.watchdog.alive()
        return nats / all_tokens

    # ----------------------------------------------------------------------------------------------------------
    # Checkpoints
    # ----------------------------------------------------------------------------------------------------------

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
            "data_fingerprint": self.data.fingerprint,
            "run_id": self.run.run_id,
            "updates": self.updates,
            "consumed_samples": self.consumed_samples,
            "tokens": self.consumed_samples * self.model_config.context_length,
            "recent_losses": list(self.loss_watch.recent),
            "world_size": self.runtime.world_size,
            "sub_layer_parallel_size": self.mesh.model_rank.size,
            "data_parallel_size": self.mesh.data_size,
        }
        self.checkpoints.save(self.step, self.engine.state(), metadata)
        self.save_due = False
        self.watchdog.alive()

    def restore(self) -> None:
        """Continue from the newest good checkpoint, or start a new run as `init_from` says. Raises CheckpointError."""
        if not self.run.resuming:
            self.start_from_export()
            return
        checkpoint, problems = find_good_checkpoint(self.run.checkpoints, self.runtime)
        for problem in problems:
            self.say(f"passed over a damaged checkpoint: {problem}")
        metadata = checkpoint.metadata
        for what, differs in (
            ("another model", model_of(checkpoint) != self.model_config),
            ("a run on other data", metadata["data_fingerprint"] != self.data.fingerprint),
            ("another run", metadata["run_id"] != self.run.run_id),
        ):
            if differs:
                raise CheckpointError(
                    f"{checkpoint.path} is the checkpoint of {what}; move it out of this run's folder"
                )
        self.runtime.on_first(lambda: set_aside_after(checkpoint))
        self.require_steps_to_go(checkpoint)
        self.take_over(checkpoint)
        self.watchdog.alive()
        self.say(f"resumed from {checkpoint.path}: step {self.step}, {metadata['tokens']:,} tokens")

    def take_over(self, checkpoint: Checkpoint) -> None:
        """Become what the run was when it saved this. Raises CheckpointError."""
        metadata = checkpoint.metadata
        self.engine.load_state(lambda tensors: fill_tensors(checkpoint, tensors), metadata["updates"])
        self.step, self.updates = checkpoint.step, metadata["updates"]
        self.consumed_samples = metadata["consumed_samples"]
        self.loss_watch.continue_from(metadata.get("recent_losses", ()))  # which older programs did not keep
        self.save_due = False

    def start_from_export(self) -> None:
        """The weights of `init_from`, if it is set, as those of step 0."""
        if self.config.init_from is None:
            return
        export = open_initial_export(Path(self.config.init_from), self.model_config, self.data.tokenizer_files)
        with export_reader(export) as read:
            self.engine.load_weights(read)
        self.say(f"starting with the weights of {export.folder}")

    def require_steps_to_go(self, checkpoint: Checkpoint) -> None:
        """Tell which settings differ from the checkpoint's. Raises CheckpointError if they come too late to matter."""
        before, now = recorded_settings(checkpoint.metadata["config"]), to_dict(self.config)
        changes = differences(before, now)
        for change in changes:
            self.say(f"changed since the checkpoint: {change}")
        others = "; ".join(change for change in changes if not change.startswith("max_steps"))
        if checkpoint.step > self.config.max_steps or (checkpoint.step == self.config.max_steps and others):
            raise CheckpointError(
                f"run_dir={self.run.path} holds a run that has done {checkpoint.step} steps"
                f"{f' with other settings ({others})' if others else ''}, and max_steps={self.config.max_steps}; "
                "raise max_steps, or use another run_dir"
            )
        jump = describe_jump(before, now, checkpoint.step)
        if jump is not None and checkpoint.step < self.config.max_steps:
            self.say(f"note: {jump}")

    # ----------------------------------------------------------------------------------------------------------
    # Words
    # ----------------------------------------------------------------------------------------------------------

    def tell(self, event: str, **details: Any) -> None:
        if self.runtime.is_first:
            self.events.write(event, **details)

    def tell_saved(self, step: int) -> None:
        self.tell("saved", step=step)

    def say(self, text: str) -> None:
        if self.runtime.is_first:
            print(text, flush=True)

    def introduce(self) -> None:
        steps = self.config.max_steps - self.step
        self.say(
            f"{self.model_config.architecture}, {self.model_config.num_parameters:,} parameters, "
            f"{self.mesh.data_size} x {self.mesh.model_rank.size} {self.runtime.device.type} ranks (model copies x "
            f"ranks of a copy), {self.config.precision}, "
            f"ZeRO-{self.config.engine.zero_stage}; {self.data.describe()}; {steps} steps to go of "
            f"{self.config.global_batch_size} x {self.model_config.context_length} tokens "
            f"({self.engine.accumulation_steps} micro-batches of {self.config.micro_batch_size} per copy)"
        )
        for note in self.data.repetitions():
            self.say(f"note: {note}")
        if self.config.max_steps < self.config.schedule.warmup_steps:
            self.say(
                f"note: the run of max_steps={self.config.max_steps} ends within its warm-up of "
                f"schedule.warmup_steps={self.config.schedule.warmup_steps}, before the peak learning rate"
            )
        head_sizes = head_size_note(self.model_config)
        if head_sizes is not None and self.step == 0:
            self.say(f"note: {head_sizes}")
        size = self.mesh.model_rank.size
        if self.runtime.local_world_size % size:
            self.say(
                f"note: parallel.sub_layer_parallel_size={size} does not divide the {self.runtime.local_world_size} "
                "ranks of a machine, so some model copies exchange over the network"
            )
        if self.config.validation.every and not self.data.has_validation:
            self.say("no validation: the data were prepared without a validation split")


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """The settings with influence on what is learned that differ, as "optim.lr: 0.001 -> 0.002"."""
    found = []
    for group in LEARNING_SETTINGS:
        old, new = there[group], here[group]
        pairs = {f"{group}.{k}": (old.get(k), new[k]) for k in new} if isinstance(new, dict) else {group: (old, new)}
        found += [f"{name}: {before} -> {now}" for name, (before, now) in pairs.items() if before != now]
    return found


if __name__ == "__main__":
    main()
