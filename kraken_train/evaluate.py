"""Evaluates an export: perplexity on prepared data, and suites of tasks.

    python -m kraken_train.evaluate export_dir=EXPORT data_dir=DATA
    python -m kraken_train.evaluate export_dir=EXPORT suite=superglue

Results are printed, and recorded in the export for its model card and reports.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from checkpoints.exports.folder import Export, read_export
from data_prep.manifest import SPLITS, Manifest, verify_quick
from kraken_train.common.cli import run_entry
from kraken_train.common.errors import CheckpointError, ConfigError, DataError
from kraken_train.common.files import file_sha256, locked
from kraken_train.common.free_text import FilePath
from kraken_train.common.validation import require_choice, require_positive
from kraken_train.evaluation.perplexity import MODES, evaluate, read_sequences
from kraken_train.evaluation.results import (
    SUITE_HEADER,
    Results,
    SuiteResult,
    markdown,
    record_results,
    suite_record,
    suite_rows,
)
from kraken_train.evaluation.suites import Suite, SuiteRun, TaskChoice, require_harness, run_suite
from kraken_train.inference.ranks import end_rank, started_ranks
from kraken_train.parallel.device import DEVICES, choose_device
from kraken_train.parallel.ranks import Runtime, read_runtime
from kraken_train.reporting.model_card import refresh_results

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class EvaluateConfig:
    """See conf/evaluate.yaml."""

    export_dir: FilePath  # folder that checkpoints.export has written
    batch_size: int  # windows, or requests of a task, in a batch; results do not depend on it
    device: str  # auto | cpu | cuda
    output: FilePath | None  # JSON file to write; null: none
    table: FilePath | None  # Markdown file to write; null: none
    record: bool  # record the results in the export: in evaluation.json and its model card
    # prepared data, for the perplexity; ranks of torchrun or deepspeed share the work; null: no perplexity
    data_dir: FilePath | None
    split: str  # validation | train
    mode: str  # stream: one sequence, cut as in training | documents: each document on its own
    # tokens from the start of one window to that of the next; null: context_length in mode stream, half of it in mode
    # documents; context_length in mode documents gives the bits per byte of lm-evaluation-harness
    stride: int | None
    dtype: str  # fp32 | fp64; the batch size changes results by less than 1e-7 in fp32 and 1e-12 in fp64
    # folder of JSONL files for the suite, in the Hub's schema, named as in conf/suite; null: from the Hub
    suite_data: FilePath | None
    tasks: list[str] | None  # tasks of the suite to run, such as [boolq,copa]; null: all
    missing: str  # error | skip: what to do with a task whose file suite_data lacks (the table shows it)
    limit: int | None  # documents per task, for trials, whose results are not recorded in the export; null: all
    # folder for the definitions of offline tasks, for `lm_eval --include_path`; null: a temporary one
    task_dir: FilePath | None
    suite: Suite | None = None  # file of conf/suite; null: no suite

    def validate(self) -> None:
        """Raises ConfigError."""
        require_choice("split", self.split, SPLITS)
        require_choice("mode", self.mode, MODES)
        require_choice("dtype", self.dtype, tuple(DTYPES))
        require_choice("missing", self.missing, ("error", "skip"))
        require_choice("device", self.device, DEVICES)
        for name in ("batch_size", "stride", "limit"):
            if getattr(self, name) is not None:
                require_positive(name, getattr(self, name))
        if self.data_dir is None and self.suite is None:
            raise ConfigError("there is nothing to evaluate; give data_dir=DATA, suite=superglue, or both")
        for name in ("suite_data", "tasks", "limit", "task_dir"):
            if self.suite is None and getattr(self, name) is not None:
                raise ConfigError(f"{name}={getattr(self, name)} needs a suite, such as suite=superglue")
        if self.task_dir is not None and self.suite_data is None:
            raise ConfigError(f"task_dir={self.task_dir} is for tasks read from files; give suite_data=FOLDER")
        if self.tasks == []:
            raise ConfigError("tasks=[] selects no task; leave it out to run all tasks of the suite")
        for name in ("output", "table"):
            path = getattr(self, name)
            if path is not None and not Path(path).parent.is_dir():
                raise ConfigError(f"{name}={path}: the folder {Path(path).parent} does not exist")
        for name in ("suite_data", "task_dir"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_dir():
                raise ConfigError(f"{name}={path} is not a folder")


def evaluate_export(config: EvaluateConfig) -> None:
    runtime = read_runtime()
    if config.suite is not None:
        if runtime.world_size > 1:
            raise ConfigError(f"suite={config.suite.name} runs in one process; start it without a launcher")
        require_harness(f"suite={config.suite.name}")
    export = read_export(Path(config.export_dir))
    if config.record and not os.access(export.folder, os.W_OK):
        raise ConfigError(f"export_dir={export.folder} cannot be written; use record=false to record nothing in it")
    record: dict[str, Any] = {"export_dir": config.export_dir}
    suites = {}
    if config.data_dir is not None:
        record |= measure_perplexity(config, export, Path(config.data_dir), runtime)
    if config.suite is not None:
        result = run_suite(export, config.suite, suite_run(config))
        suites[config.suite.name] = result
        record["suites"] = {config.suite.name: suite_record(result)}
        print_suite(result)
    if runtime.is_first:
        write_results(config, export, record, suites)


def write_results(
    config: EvaluateConfig, export: Export, record: dict[str, Any], suites: dict[str, SuiteResult]
) -> None:
    """Write the results to `output`, `table` and the export, as configured."""
    perplexity = {k: v for k, v in record.items() if k not in ("export_dir", "suites")} if config.data_dir else None
    if config.output is not None:
        write_file("output", Path(config.output), json.dumps(record, indent=2) + "\n")
    if config.table is not None:
        write_file("table", Path(config.table), markdown(Results([perplexity] if perplexity else [], suites)))
    if config.record:
        if config.limit is not None:
            print(f"not recorded in {export.folder}: only limit={config.limit} documents of each task were used")
            suites = {}
        if perplexity or suites:
            record_in_export(export, perplexity, suites)


def record_in_export(export: Export, perplexity: dict[str, Any] | None, suites: dict[str, SuiteResult]) -> None:
    """Add results to those of the export, and to its model card. Raises CheckpointError."""
    try:
        with locked(export.folder):  # another evaluation of the same export may end now
            refresh_results(export, record_results(export.folder, perplexity, suites))
    except OSError as error:
        raise CheckpointError(f"{export.folder} cannot be written: {error.strerror}") from error


def write_file(name: str, path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{name}={path} cannot be written: {error.strerror}") from error


# ---------------------------------------------------------------------------------------------------------------
# Perplexity
# ---------------------------------------------------------------------------------------------------------------


def measure_perplexity(config: EvaluateConfig, export: Export, data_dir: Path, runtime: Runtime) -> dict[str, Any]:
    """Measure on all ranks, print on the first one; the result and the settings of the measurement."""
    context_length = export.config.context_length
    stride = config.stride or (context_length if config.mode == "stream" else max(1, context_length // 2))
    if stride > context_length:
        raise ConfigError(
            f"stride={stride} would leave out tokens between windows of context_length={context_length}; use at most "
            f"{context_length}"
        )
    manifest = verify_quick(data_dir)
    require_fitting_data(export, manifest, data_dir)
    sequences = read_sequences(data_dir, config.split, manifest, config.mode)
    with started_ranks(config.device) as ranks:
        # Not in bf16, even if the export is stored in it: its rounding would depend on the batch size.
        model = export.load_model(DTYPES[config.dtype], ranks.device)
        text_bytes = manifest.splits[config.split].text_bytes
        result = evaluate(model, sequences, stride, config.batch_size, text_bytes, ranks)
    if not math.isfinite(result.loss):
        raise CheckpointError("the model's predictions are not finite: its weights are damaged or have diverged")
    if runtime.is_first:
        print(f"loss           {result.loss:.6f} nats per token")
        print(f"perplexity     {result.perplexity:.4f}")
        print(f"tokens         {result.tokens:,}")
        if result.bits_per_byte is not None:
            print(f"bits per byte  {result.bits_per_byte:.6f}")
        if config.mode == "documents" and len(sequences.stream) == manifest.splits[config.split].tokens:
            print("note: not every document ends with the end-of-document token, so the first token of each "
                  "document is not predicted")  # fmt: skip
    return {
        "data_dir": str(config.data_dir),
        "split": config.split,
        "mode": config.mode,
        "stride": stride,
        "dtype": config.dtype,
        "data_fingerprint": manifest.fingerprint,
        **dataclasses.asdict(result),
    }


def require_fitting_data(export: Export, manifest: Manifest, data_dir: Path) -> None:
    """Raises DataError unless the data were prepared with the tokenizer of the export."""
    if manifest.vocab_size > export.config.vocab_size:
        raise DataError(
            f"{data_dir} has a vocabulary of {manifest.vocab_size} tokens, but the export {export.folder} has one of "
            f"{export.config.vocab_size}; use data prepared with the export's tokenizer"
        )
    if not export.tokenizer_dir.is_dir():
        return  # only the vocabulary size is known
    for name, sha256 in manifest.tokenizer.files.items():
        path = export.tokenizer_dir / name
        if not path.is_file() or file_sha256(path) != sha256:
            raise DataError(
                f"{data_dir} was prepared with another tokenizer than {export.tokenizer_dir} ({name} differs); "
                "use data prepared with the export's tokenizer"
            )


# ---------------------------------------------------------------------------------------------------------------
# Suites
# ---------------------------------------------------------------------------------------------------------------


def suite_run(config: EvaluateConfig) -> SuiteRun:
    return SuiteRun(
        tasks=TaskChoice(
            names=config.tasks,
            data_dir=None if config.suite_data is None else Path(config.suite_data),
            skip_missing=config.missing == "skip",
        ),
        task_dir=None if config.task_dir is None else Path(config.task_dir),
        limit=config.limit,
        batch_size=config.batch_size,
        device=choose_device(config.device).type,
        dtype=str(DTYPES[config.dtype]).removeprefix("torch."),
    )


def print_suite(result: SuiteResult) -> None:
    table = Table(*SUITE_HEADER, title=result.title, title_justify="left")
    for column in table.columns[2:]:
        column.justify = "right"
    for row in suite_rows(result):
        table.add_row(*row)
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table, markup=False)


def main() -> None:
    run_entry(evaluate_export, EvaluateConfig, "evaluate")
    end_rank()


if __name__ == "__main__":
    main()
