"""Recorded evaluation results: averages, updates and tables."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from kraken_train.common.errors import CheckpointError
from kraken_train.evaluation.results import (
    Results,
    Score,
    SuiteResult,
    TaskResult,
    markdown,
    read_results,
    record_results,
    suite_rows,
)


def task(scores: dict[str, tuple[float, float | None]], metric: str, *benchmark: str) -> TaskResult:
    found = {name: Score(*score) for name, score in scores.items()}
    return TaskResult(found, metric, list(benchmark or [metric]), 10, "org/data", "files", "lm-eval 1", "2.0", 0)


BOOLQ = task({"acc": (0.6, 0.03)}, "acc")
CB = task({"acc": (0.5, 0.04), "f1": (0.3, None)}, "acc", "acc", "f1")
RECORD = task({"em": (0.2, 0.01), "f1": (0.4, 0.02)}, "f1", "f1", "em")
PERPLEXITY = {"data_fingerprint": "abc" * 8, "split": "validation", "mode": "stream", "stride": 8, "dtype": "fp32",
              "loss": 2.0, "perplexity": math.exp(2), "tokens": 100, "bits_per_byte": None}  # fmt: skip


def suite(tasks: dict[str, TaskResult], **not_run: str) -> SuiteResult:
    return SuiteResult("Some suite", "accuracy, F1 for ReCoRD", tasks, not_run)


def test_averages() -> None:
    complete = suite({"boolq": BOOLQ, "cb": CB, "record": RECORD}).averages
    assert complete["paper"].value == pytest.approx((0.6 + 0.5 + 0.4) / 3)
    assert complete["paper"].standard_error == pytest.approx(math.sqrt(0.03**2 + 0.04**2 + 0.02**2) / 3)
    assert complete["benchmark"].value == pytest.approx((0.6 + (0.5 + 0.3) / 2 + (0.4 + 0.2) / 2) / 3)
    # F1 of CB has none, and the metrics of one task are not independent.
    assert complete["benchmark"].standard_error is None
    assert (complete["paper"].tasks, complete["paper"].of) == (3, 3)
    partial = suite({"boolq": BOOLQ}, cb="no file").averages
    assert set(partial) == {"paper"}
    assert (partial["paper"].tasks, partial["paper"].of) == (1, 2)
    assert SuiteResult("Another", None, {"boolq": BOOLQ}).averages == {}


def test_a_later_evaluation_replaces_the_same_measurement(tmp_path: Path) -> None:
    record_results(tmp_path, PERPLEXITY, {"s": suite({"cb": CB}, boolq="not selected", record="no file")})
    better = task({"acc": (0.9, 0.01)}, "acc")
    record_results(tmp_path, {**PERPLEXITY, "stride": 4}, {"s": suite({"boolq": better}, cb="no file", record="x")})
    record_results(tmp_path, {**PERPLEXITY, "loss": 1.0}, {"other": suite({"record": RECORD})})
    results = read_results(tmp_path)
    assert [(entry["stride"], entry["loss"]) for entry in results.perplexity] == [(4, 2.0), (8, 1.0)]
    assert results.suites["s"].tasks == {"boolq": better, "cb": CB}
    assert results.suites["s"].not_run == {"record": "x"}
    assert results.suites["other"].tasks == {"record": RECORD}
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["suites"]["s"]["averages"]["paper"]["value"] == pytest.approx(0.7)


def test_tables() -> None:
    result = suite({"boolq": BOOLQ, "cb": CB}, record="record.jsonl missing")
    rows = suite_rows(result)
    assert rows[0] == ["boolq", "acc", "0.6000", "0.0300", "10"]
    assert rows[2] == ["cb", "f1", "0.3000", "unknown", "10"]
    assert rows[3][:4] == ["average of only 2 of 3 tasks", "accuracy, F1 for ReCoRD", "0.5500", "0.0250"]
    assert rows[-1][:2] == ["record", "not run: record.jsonl missing"]
    text = markdown(Results([PERPLEXITY], {"s": result}))
    assert "| abcabcabcabc | validation | stream | 8 | 2.0000 | 7.39 |  | 100 |" in text
    assert "| boolq | acc | 0.6000 | 0.0300 | 10 |" in text
    assert "Some suite (lm-eval 1)" in text
    assert markdown(Results()) == "Not evaluated yet.\n"


def test_unusable_file(tmp_path: Path) -> None:
    assert read_results(tmp_path) == Results()
    for text, message in (
        ("{", "is damaged"),
        ('{"format_version": 1, "perplexity": []}', "is damaged"),
        ('{"format_version": 1, "perplexity": [], "suites": {"s": {"title": 3}}}', "is damaged"),
        ('{"format_version": 1, "perplexity": [{}], "suites": {}}', "an entry of perplexity has no "),
        ('{"format_version": 2, "perplexity": [], "suites": {}}', "reads up to 1"),
    ):
        (tmp_path / "evaluation.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            read_results(tmp_path)
