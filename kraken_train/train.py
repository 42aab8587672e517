"""Pretrains a model: python -m kraken_train.train model=NAME data_dir=DATA run_dir=RUN

On several ranks it runs under a launcher (`launch.deepspeed`, torchrun, srun). The same command continues a run that
was interrupted, on any number of ranks. The run folder holds checkpoints, metrics, events and logs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from kraken_train.common.cli import run_entry
from kraken_train.common.errors import KrakenError, RankLostError
from kraken_train.common.memory import memory_errors
from kraken_train.config import TrainConfig
from kraken_train.data.phases import RunData
from kraken_train.data.validation_set import validation_sets
from kraken_train.health.shutdown import INTERRUPTED_EXIT_CODE, Interrupted, StopRequest
from kraken_train.health.stack_dump import stacks_on_signal
from kraken_train.health.watchdog import Watchdog
from kraken_train.kernels.selection import KERNELS_SETTING, choose_kernels
from kraken_train.model.config import parse_model
from kraken_train.parallel.ranks import Runtime, another_rank_ended, read_runtime
from kraken_train.run.events import FAILED, FINISHED, INTERRUPTED
from kraken_train.run.folder import RunFolder
from kraken_train.run.rank_errors import record_error
from kraken_train.run.start import describe_error, recorded, write_environment
from kraken_train.tracking.ready import require_ready
from kraken_train.training.determinism import deterministic_algorithms, prepare_deterministic
from kraken_train.training.engine import start_processes, stop_processes
from kraken_train.training.open_run import check_run_folder, open_run_folder, take_up_staged_checkpoint
from kraken_train.training.precision import choose_precision, has_native_bf16
from kraken_train.training.profiler import require_usable
from kraken_train.training.recorded_choices import RecordedChoices, leaves_choices, recorded_choices
from kraken_train.training.remote import fetch_remote_checkpoint, require_own_remote
from kraken_train.training.suites import open_suites
from kraken_train.training.teacher import open_teacher
from kraken_train.training.trainer import Trainer

MORE_MEMORY = (
    "use a smaller micro_batch_size, engine.activation_checkpointing=true, or more ranks for a copy of the model"
)


def main() -> None:
    run_entry(train, TrainConfig, "train")


def train(config: TrainConfig) -> None:
    """Train to the end that `config` sets, from the run folder's newest good checkpoint if it has one.

    Exits with INTERRUPTED_EXIT_CODE, after saving, if a signal or the end of its launcher asked it to stop before.
    """
    runtime = read_runtime()
    choose_kernels(config.engine.fused_kernels, runtime.device, KERNELS_SETTING)  # refuses what cannot be had here
    require_usable(config.profile, runtime)
    if config.deterministic:
        prepare_deterministic(config, runtime.device.type, os.environ)
    data = RunData(config.data_phases)
    if config.attention_within_documents:
        data.require_ends_of_documents()
    model_config = parse_model(config.model, data.first.vocab_size)
    config.require_fits(model_config)
    teacher = open_teacher(config, model_config, data.first.tokenizer_files)
    validated = validation_sets(data.first, config.validation.folders, config.validation.samples, data.later_manifests)
    suites = open_suites(config.validation, data.first.tokenizer_dir, model_config.context_length)
    config.gradient_accumulation_steps(config.parallel.data_parallel_size(runtime.world_size))
    samples = data.samples(model_config.context_length, config.seed)

    stop = StopRequest()
    try:
        with ExitStack() as stack:
            rendezvous = start_processes(runtime, config.rendezvous_seconds)
            runtime.on_first(lambda: fetch_remote_checkpoint(config))
            choices = find_choices(config, runtime)
            native_bf16 = runtime.all_true(has_native_bf16(runtime.device))
            precision = choose_precision(config.precision, choices.precision, native_bf16)
            config = replace(choices.fill(config), precision=precision.name)
            config.validate()
            runtime.on_first(lambda: require_ready(config.tracking, os.environ))
            watchdog = Watchdog(
                runtime,
                rendezvous.store,
                config.watchdog_seconds,
                stop,
                rendezvous.store_rank,
                config.health.step_seconds,
            )
            stack.enter_context(watchdog)
            run = runtime.on_first(
                lambda: open_run_folder(
                    config, model_config, data.first.tokenizer_dir, data.fingerprints, stack, teacher
                )
            )
            runtime.on_first(lambda: require_own_remote(config, run.run_id))
            watchdog.log = stack.enter_context(recorded(run.start, runtime))
            watchdog.on_end = record_end_by_watchdog(run, runtime, watchdog)
            stack.enter_context(stacks_on_signal(watchdog.log))
            if runtime.is_first:
                stack.enter_context(record_outcome(run, watchdog))
            stack.enter_context(own_errors(watchdog))
            stack.enter_context(deterministic_algorithms(config.deterministic))
            write_environment(run.start, runtime)
            if runtime.is_first:
                print(precision.describe(), flush=True)
            run = take_up_staged_checkpoint(
                run, runtime, lambda: check_run_folder(config, model_config, data.fingerprints, teacher)
            )
            trainer = Trainer(
                config, model_config, data, samples, validated, run, runtime, stop, watchdog, teacher, suites
            )
            trainer.restore()
            with stop.on_signals():  # not before: until there is a step, there is nothing to save
                trainer.train()
    except Interrupted:
        stop_processes(runtime)
        sys.exit(INTERRUPTED_EXIT_CODE)
    stop_processes(runtime)


def find_choices(config: TrainConfig, runtime: Runtime) -> RecordedChoices:
    """What a run that is continued has recorded, the same on all ranks. A collective. Raises CheckpointError."""
    return runtime.on_first(
        lambda: recorded_choices(Path(config.run_dir)) if leaves_choices(config) else RecordedChoices()
    )


@contextmanager
def own_errors(watchdog: Watchdog) -> Iterator[None]:
    """Turn the error of a collective whose other rank has ended into RankLostError, a lack of memory into its own."""
    try:
        with memory_errors(MORE_MEMORY):
            yield
    except RuntimeError as error:
        watchdog.wait_for_end()
        if another_rank_ended(error):
            raise RankLostError(
                "another rank has ended, see its message; the same command continues from the newest checkpoint"
            ) from error
        raise


@contextmanager
def record_outcome(run: RunFolder, watchdog: Watchdog) -> Iterator[None]:
    """Record the outcome of this start as its final event; a start that is killed has none."""

    def record(outcome: str, reason: str | None = None) -> None:
        run.events.write("ended", start=run.start_number, step=watchdog.step, outcome=outcome, reason=reason)

    try:
        yield
    except Interrupted as interruption:
        record(INTERRUPTED, str(interruption))
        raise
    except Exception as error:
        record(FAILED, str(error) if isinstance(error, KrakenError) else f"{type(error).__name__}: {error}")
        raise
    record(FINISHED)


def record_end_by_watchdog(run: RunFolder, runtime: Runtime, watchdog: Watchdog) -> Callable[[str, bool], None]:
    """What the watchdog calls before it ends this start, whose main thread hangs: record the error and the outcome."""

    def record(message: str, follows: bool) -> None:
        record_error(run.start, replace(describe_error(RankLostError(message), runtime), follows=follows))
        if runtime.is_first:
            run.events.write("ended", start=run.start_number, step=watchdog.step, outcome=FAILED, reason=message)

    return record


if __name__ == "__main__":
    main()
