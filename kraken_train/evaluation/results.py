"""Evaluation results of an export: `evaluation.json` in its folder, which the model card and reports read.

    perplexity  one entry per data set, split, mode, stride and dtype
    suites      name -> the newest result of each task, and the reason for each task without a result

A new result replaces the earlier result of the same measurement and keeps all others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import UnionType
from typing import Any

from kraken_train.common.errors import CheckpointError, ConfigError
from kraken_train.common.files import read_file, replace_synced
from kraken_train.common.parsing import find_wrong_type, parse_mapping
from kraken_train.common.settings import from_dict, to_dict

RESULTS_FILE = "evaluation.json"
FORMAT_VERSION = 1
PERPLEXITY: dict[str, type | UnionType] = {  # what an entry must have to be shown
    **dict.fromkeys(("data_fingerprint", "split", "mode", "dtype"), str),
    **dict.fromkeys(("stride", "tokens"), int),
    **dict.fromkeys(("loss", "perplexity"), int | float),
    "bits_per_byte": int | float | None,
}
# A new entry replaces an earlier entry with the same values of these keys.
SAME_PERPLEXITY = ("data_fingerprint", "split", "mode", "stride", "dtype")


@dataclass(frozen=True)
class Score:
    value: float
    standard_error: float | None = None  # None if the harness reports none, as for the F1 of CB


@dataclass(frozen=True)
class TaskResult:
    scores: dict[str, Score]  # metric -> score
    metric: str  # the metric in the average of the suite
    benchmark_metrics: list[str]  # the metrics whose mean is in the benchmark's own average
    documents: int
    dataset: str  # its name on the Hub, also if it was read from files
    source: str  # hub | files
    harness: str  # such as "lm-eval 0.4.13"
    version: str  # version of the task in the harness
    shots: int  # examples in each prompt

    def validate(self) -> None:
        """Raises ConfigError for a result that cannot be averaged."""
        if not {self.metric, *self.benchmark_metrics} <= self.scores.keys() or not self.benchmark_metrics:
            raise ConfigError(f"the metrics {self.metric}, {', '.join(self.benchmark_metrics)} have no scores")
        if not all(math.isfinite(score.value) for score in self.scores.values()):
            raise ConfigError("a score is not finite")


@dataclass(frozen=True)
class Average:
    """An average over tasks, with equal weights."""

    value: float
    standard_error: float | None  # None if that of any task is unknown
    tasks: int  # number of tasks in the average
    of: int  # number of tasks in the suite


@dataclass(frozen=True)
class SuiteResult:
    title: str
    average: str | None  # describes the averaged metrics; None if the suite has no average
    tasks: dict[str, TaskResult]
    not_run: dict[str, str] = field(default_factory=dict)  # task -> reason

    def validate(self) -> None:
        """Raises ConfigError for results that cannot be averaged."""
        for task in self.tasks.values():
            task.validate()

    @property
    def averages(self) -> dict[str, Average]:
        """`paper`: over each task's `metric`; `benchmark`: over the means of `benchmark_metrics`, if these differ."""
        tasks, of = self.tasks.values(), len(self.tasks) + len(self.not_run)
        if self.average is None or not tasks:
            return {}
        means = {"paper": average([[task.scores[task.metric]] for task in tasks], of)}
        if any(task.benchmark_metrics != [task.metric] for task in tasks):
            means["benchmark"] = average([[task.scores[m] for m in task.benchmark_metrics] for task in tasks], of)
        return means

    def updated(self, newer: SuiteResult) -> SuiteResult:
        """The tasks of both results, from `newer` if both have a task, in the order of the suite."""
        tasks = {**self.tasks, **newer.tasks}
        order = [name for name in [*newer.tasks, *newer.not_run] if name in tasks]
        not_run = {name: reason for name, reason in newer.not_run.items() if name not in tasks}
        return replace(newer, tasks={name: tasks[name] for name in order}, not_run=not_run)


@dataclass(frozen=True)
class Results:
    perplexity: list[dict[str, Any]] = field(default_factory=list)
    suites: dict[str, SuiteResult] = field(default_factory=dict)


def average(scores: Sequence[Sequence[Score]], of: int) -> Average:
    """The mean over tasks of the mean over each task's scores.

    The errors of tasks are independent, so their squares add up; those of several metrics of one task are not, so the
    error is then unknown.
    """
    values = [math.fsum(score.value for score in task) / len(task) for task in scores]
    errors = [task[0].standard_error if len(task) == 1 else None for task in scores]
    known = [error for error in errors if error is not None]
    error = math.sqrt(math.fsum(e * e for e in known)) / len(errors) if len(known) == len(errors) else None
    return Average(math.fsum(values) / len(values), error, len(values), of)


# ---------------------------------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------------------------------


def read_results(export_dir: Path) -> Results:
    """The recorded results of an export. Raises CheckpointError if the file is damaged or of a newer format."""
    path = export_dir / RESULTS_FILE
    if not path.exists():
        return Results()
    try:
        record = parse_mapping(read_file(path))
        version = record["format_version"]
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format_version={version}, but this program reads up to {FORMAT_VERSION}; update it"
            )
        suites = {name: without_averages(suite) for name, suite in record["suites"].items()}
        for entry in record["perplexity"]:
            wrong = find_wrong_type(entry, PERPLEXITY) or next((name for name in PERPLEXITY if name not in entry), None)
            if wrong is not None:
                raise ValueError(f"an entry of perplexity has no {wrong}, or one of another type")
        return Results(list(record["perplexity"]), {n: from_dict(s, SuiteResult) for n, s in suites.items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); remove it and evaluate again") from error


def without_averages(suite: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in suite.items() if key != "averages"}


def suite_record(result: SuiteResult) -> dict[str, Any]:
    """The result for JSON, with its averages, which are not read back."""
    return {**to_dict(result), "averages": {name: to_dict(mean) for name, mean in result.averages.items()}}


def record_results(
    export_dir: Path, perplexity: dict[str, Any] | None = None, suites: dict[str, SuiteResult] | None = None
) -> Results:
    """Add results to an export's file; all results in it. Raises CheckpointError."""
    known = read_results(export_dir)
    entries = list(known.perplexity)
    if perplexity is not None:
        entries = [e for e in entries if any(e.get(key) != perplexity.get(key) for key in SAME_PERPLEXITY)]
        entries.append(perplexity)
    merged = dict(known.suites)
    for name, result in (suites or {}).items():
        merged[name] = merged[name].updated(result) if name in merged else result
    record = {
        "format_version": FORMAT_VERSION,
        "perplexity": entries,
        "suites": {name: suite_record(result) for name, result in merged.items()},
    }
    try:
        replace_synced(export_dir / RESULTS_FILE, json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise CheckpointError(f"{export_dir / RESULTS_FILE} cannot be written: {error.strerror}") from error
    return Results(entries, merged)


# ---------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------

SUITE_HEADER = ("task", "metric", "value", "standard error", "documents")
PERPLEXITY_HEADER = ("data", "split", "mode", "stride", "loss", "perplexity", "bits per byte", "tokens")


def suite_rows(result: SuiteResult) -> list[list[str]]:
    """Rows for SUITE_HEADER: all metrics of all tasks, the averages, and the tasks that were not run."""
    rows: list[list[str]] = []
    for name, task in result.tasks.items():
        metrics = sorted(task.scores, key=lambda metric: metric != task.metric)
        for metric in metrics:
            value, error = cells(task.scores[metric].value, task.scores[metric].standard_error)
            rows.append([name, metric, value, error, f"{task.documents:,}"])
    labels = {"paper": result.average, "benchmark": "mean of each task's metrics"}
    for name, mean in result.averages.items():
        complete = f"all {mean.of} tasks" if mean.tasks == mean.of else f"only {mean.tasks} of {mean.of} tasks"
        value, error = cells(mean.value, mean.standard_error)
        rows.append([f"average of {complete}", str(labels[name]), value, error, ""])
    rows += [[name, f"not run: {reason}", "", "", ""] for name, reason in result.not_run.items()]
    return rows


def perplexity_rows(entries: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Rows for PERPLEXITY_HEADER."""
    return [
        [
            f"{entry['data_fingerprint'][:12]}",
            entry["split"],
            entry["mode"],
            f"{entry['stride']:,}",
            f"{entry['loss']:.4f}",
            f"{entry['perplexity']:,.2f}",
            "" if entry["bits_per_byte"] is None else f"{entry['bits_per_byte']:.4f}",
            f"{entry['tokens']:,}",
        ]
        for entry in entries
    ]


def cells(value: float, standard_error: float | None) -> tuple[str, str]:
    return f"{value:.4f}", "unknown" if standard_error is None else f"{standard_error:.4f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(header), ["---"] * len(header), *(list(row) for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def markdown(results: Results) -> str:
    """All results as Markdown, or a sentence that there are none."""
    parts = []
    if results.perplexity:
        parts.append("Perplexity of prepared data, named by fingerprint:\n")
        parts.append(markdown_table(PERPLEXITY_HEADER, perplexity_rows(results.perplexity)) + "\n")
    for result in results.suites.values():
        parts.append(f"{result.title} ({', '.join(sorted({task.harness for task in result.tasks.values()}))}):\n")
        parts.append(markdown_table(SUITE_HEADER, suite_rows(result)) + "\n")
    return "\n".join(parts) or "Not evaluated yet.\n"
