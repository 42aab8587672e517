"""Compares runs: size, tokens, loss, perplexity, results of suites, speed.

An entry is a run folder or an export. The evaluation results of a run are those of its newest evaluated export, found
through the run's `exports.jsonl`; numbers that were not measured are left out.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints.exports.folder import CONFIG_FILE as EXPORT_CONFIG_FILE
from checkpoints.exports.folder import read_export
from kraken_train.common.errors import CheckpointError, DataError
from kraken_train.evaluation.results import (
    RESULTS_FILE,
    SAME_PERPLEXITY,
    Average,
    Results,
    SuiteResult,
    average,
    read_results,
)
from kraken_train.model.config import ModelConfig, parse_model
from kraken_train.run.exports import read_exports
from kraken_train.run.folder import METRICS_FILE, read_identity
from kraken_train.run.metrics import Run, read_run

UNKNOWN = "-"
HEADER = (
    "run",
    "model",
    "parameters",
    "tokens",
    "loss",
    "validation loss",
    "validation perplexity",
    "perplexity",
    "bits per byte",
    "tokens/s",
)


@dataclass(frozen=True)
class Entry:
    """One row of the comparison. An unknown value is None or empty."""

    label: str
    run: Run  # without records if the entry is an export
    model: ModelConfig | None = None
    tokens: int | None = None  # number of training tokens
    results: Results = field(default_factory=Results)

    def last(self, key: str) -> float | None:
        """The last logged value; None if there is none."""
        values = self.run.series(key)[1]
        return values[-1] if values else None

    @property
    def tokens_per_second(self) -> float | None:
        """The median over steps, which a few slow steps do not change."""
        values = self.run.series("tokens_per_second")[1]
        return statistics.median(values) if values else None


def read_entry(path: Path) -> Entry:
    """Read a run folder or an export. Raises DataError or CheckpointError."""
    if not (path / METRICS_FILE).exists() and (path / EXPORT_CONFIG_FILE).is_file():
        export = read_export(path)
        label = path.resolve().name
        return Entry(label, Run(label, []), export.config, export.training.get("tokens"), read_results(path))
    run = read_run(path)
    identity = read_identity(path)
    model = None if identity is None else parse_model(identity["model"])
    tokens = [record["tokens"] for record in run.records if isinstance(record.get("tokens"), int)]
    return Entry(run.label, run, model, tokens[-1] if tokens else None, results_of_run(path))


def results_of_run(run_dir: Path) -> Results:
    """The results of the run's newest export that was evaluated and still exists. Raises DataError."""
    for exported in reversed(read_exports(run_dir)):
        folder = Path(exported["path"])
        if not (folder / RESULTS_FILE).is_file():
            continue
        try:
            if read_export(folder).training.get("step") == exported["step"]:
                return read_results(folder)
        except CheckpointError as error:
            raise DataError(f"{run_dir} was exported to {folder}, which cannot be used: {error}") from error
    return Results()


def unique_labels(entries: Sequence[Entry], paths: Sequence[Path]) -> list[str]:
    """The names of the folders, with the name of the parent folder if two are the same."""
    counts = Counter(entry.label for entry in entries)
    return [
        entry.label if counts[entry.label] == 1 else "/".join(path.resolve().parts[-2:])
        for entry, path in zip(entries, paths, strict=True)
    ]


# ---------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SuiteComparison:
    """The entries that have results of a suite."""

    title: str
    tasks: list[str]  # tasks that at least one entry has
    of: int  # number of tasks in the suite
    results: dict[str, SuiteResult]  # by label of the entry
    common: list[str]  # tasks that all entries have

    def average(self, label: str) -> Average | None:
        """The average over the common tasks, so that averages are comparable."""
        result = self.results[label]
        if result.average is None or not self.common:
            return None
        scores = [[result.tasks[name].scores[result.tasks[name].metric]] for name in self.common]
        return average(scores, self.of)


def common_perplexity(entries: Sequence[Entry]) -> dict[str, dict[str, Any]]:
    """label -> perplexity, measured in the way that most entries have; if several ways do, in the newest one."""
    keys = [tuple(found[k] for k in SAME_PERPLEXITY) for entry in entries for found in entry.results.perplexity]
    if not keys:
        return {}
    counts = Counter(keys)
    chosen = max(reversed(list(counts)), key=lambda key: counts[key])
    return {
        entry.label: found
        for entry in entries
        for found in entry.results.perplexity
        if tuple(found[k] for k in SAME_PERPLEXITY) == chosen
    }


def compare_suites(entries: Sequence[Entry]) -> dict[str, SuiteComparison]:
    names = dict.fromkeys(name for entry in entries for name in entry.results.suites)
    compared = {}
    for name in names:
        results = {e.label: e.results.suites[name] for e in entries if name in e.results.suites}
        fullest = sorted(results.values(), key=lambda result: -len(result.tasks))
        tasks = list(dict.fromkeys(task for result in fullest for task in result.tasks))
        common = [task for task in tasks if all(task in result.tasks for result in fullest)]
        of = len(fullest[0].tasks) + len(fullest[0].not_run)
        compared[name] = SuiteComparison(fullest[0].title, tasks, of, results, common)
    return compared


def rows(entries: Sequence[Entry]) -> list[list[str]]:
    """Rows for HEADER."""
    measured = common_perplexity(entries)
    table = []
    for entry in entries:
        found = measured.get(entry.label, {})
        validation = entry.last("validation_loss")
        table.append(
            [
                entry.label,
                describe_model(entry.model),
                format_number(None if entry.model is None else entry.model.num_parameters, ",d"),
                format_number(entry.tokens, ",d"),
                format_number(entry.last("loss"), ".4f"),
                format_number(validation, ".4f"),
                format_number(math.exp(validation) if validation is not None and validation < 700 else None, ",.2f"),
                format_number(found.get("perplexity"), ",.2f"),
                format_number(found.get("bits_per_byte"), ".4f"),
                format_number(entry.tokens_per_second, ",.0f"),
            ]
        )
    return table


def suite_table(comparison: SuiteComparison) -> tuple[list[str], list[list[str]]]:
    """(header, rows): one row per entry, one column per task, and the average if the suite has one."""
    header, table = ["run", *comparison.tasks], []
    averages = {label: comparison.average(label) for label in comparison.results}
    has_average = any(mean is not None for mean in averages.values())
    if has_average:
        header.append(f"average of {len(comparison.common)}/{comparison.of}")
    for label, result in comparison.results.items():
        cells = [label]
        for name in comparison.tasks:
            task = result.tasks.get(name)
            score = task and task.scores[task.metric]
            cells.append(UNKNOWN if not score else with_error(score.value, score.standard_error))
        mean = averages[label]
        if has_average:
            cells.append(UNKNOWN if mean is None else with_error(mean.value, mean.standard_error))
        table.append(cells)
    return header, table


def notes(entries: Sequence[Entry]) -> list[str]:
    """Explanations of the numbers in the tables."""
    lines = ["losses: nats per token, the last one that the run logged; tokens/s: the median over its steps"]
    measured = list(common_perplexity(entries).values())
    if measured:
        example = measured[0]
        lines.append(
            f"perplexity and bits per byte: of the export, on {example['split']} of data "
            f"{example['data_fingerprint'][:12]}, mode {example['mode']}, stride {example['stride']}"
        )
    return lines


def describe_model(model: ModelConfig | None) -> str:
    if model is None:
        return UNKNOWN
    return f"{model.title}, {model.num_layers} layers of {model.hidden_size}"


def format_number(value: float | None, format_spec: str) -> str:
    return UNKNOWN if value is None else format(value, format_spec)


def with_error(value: float, error: float | None) -> str:
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


def to_json(entries: Sequence[Entry]) -> str:
    """All numbers of the tables, unrounded, as JSON."""
    measured = common_perplexity(entries)
    suites = compare_suites(entries)
    record = {
        "runs": [
            {
                "run": entry.label,
                "model": describe_model(entry.model),
                "parameters": None if entry.model is None else entry.model.num_parameters,
                "tokens": entry.tokens,
                "loss": entry.last("loss"),
                "validation_loss": entry.last("validation_loss"),
                "evaluation": measured.get(entry.label),
                "tokens_per_second": entry.tokens_per_second,
                "suites": {
                    name: {
                        "tasks": {
                            task: {
                                "metric": found.metric,
                                "value": found.scores[found.metric].value,
                                "standard_error": found.scores[found.metric].standard_error,
                            }
                            for task, found in comparison.results[entry.label].tasks.items()
                        },
                        "average": mean and {"value": mean.value, "standard_error": mean.standard_error},
                        "average_of": comparison.common,
                    }
                    for name, comparison in suites.items()
                    if entry.label in comparison.results
                    for mean in [comparison.average(entry.label)]
                },
            }
            for entry in entries
        ]
    }
    return json.dumps(record, indent=2) + "\n"
