"""Suites during a training run, against those of an export of the same weights; and what is refused before."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import launch_ranks, run_here, run_module, small_configs, user_error, write_small_export
from integration.training import learned, overrides, records

from checkpoints.exports.folder import read_export
from kraken_train.evaluation.likelihoods import Likelihood, Request, shared_likelihoods
from kraken_train.evaluation.live_suites import LiveSuites, scores_of
from kraken_train.evaluation.results import read_results
from kraken_train.evaluation.suites import SuiteRun, TaskChoice, read_suite, run_suite
from kraken_train.parallel.ranks import Runtime

ALONE = Runtime(rank=0, local_rank=0, world_size=1, local_world_size=1)


def test_equal_to_those_of_an_export(
    harness: None, files: Path, tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same answers by another route: the harness's own model of transformers, with its own tokenizer."""
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415

    model = write_small_export(
        tmp_path / "export", small_configs(vocab_size=320, context_length=64)["kraken"], tokenizer_dir
    )
    export = read_export(tmp_path / "export")
    suites = LiveSuites(["superglue"], files, None, export.load_tokenizer(), model.context_length)
    state = torch.random.get_rng_state()
    answers: list[Likelihood] = []

    def answer(requests: Sequence[Request]) -> list[Likelihood]:
        found = shared_likelihoods(model, requests, 3, (0, 1), ALONE, lambda: None)
        answers.extend(found)
        return found

    found = suites.measure(answer)
    assert torch.equal(torch.random.get_rng_state(), state)
    first = answers[:]
    assert scores_of(suites.measure(answer)) == scores_of(found)
    assert answers == first * 2

    theirs: list[tuple[float, bool]] = []
    compute = HFLM.loglikelihood

    def record(self: HFLM, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        computed: list[tuple[float, bool]] = compute(self, requests, disable_tqdm)
        theirs.extend(computed)
        return computed

    monkeypatch.setattr(HFLM, "loglikelihood", record)
    run = SuiteRun(TaskChoice(data_dir=files), tmp_path, None, 4, "cpu", "float32")
    expected = run_suite(export, read_suite("superglue"), run)
    assert [likelihood.logarithm for likelihood in first] == pytest.approx([x for x, _ in theirs], rel=1e-5)
    assert [likelihood.greedy for likelihood in first] == [greedy for _, greedy in theirs]
    assert scores_of(found) == pytest.approx(scores_of({"superglue": expected}), rel=1e-12)


def test_during_a_run(harness: None, files: Path, data: Path, tmp_path: Path) -> None:
    """On one rank and on two: the same scores, those of the export; the training is that without suites."""
    plain, one, two = tmp_path / "plain", tmp_path / "one", tmp_path / "two"
    settings = ["model.context_length=64", f"validation.suite_data={files}", "validation.suites_every=5"]
    with_suites = [*settings, "validation.suites=[superglue]"]
    for run, more in ((plain, settings[:1]), (one, with_suites)):
        result = run_module("kraken_train.train", *overrides(data, run, *more))
        assert result.returncode == 0, result.stderr
    assert "superglue 0." in result.stdout
    launch_ranks(
        2, "-m", "kraken_train.train", *overrides(data, two, *with_suites, "parallel.sub_layer_parallel_size=2")
    )
    assert learned(one)[-1] == learned(plain)[-1]
    with_scores = [record for record in records(one) if "suite/boolq" in record]
    assert [record["step"] for record in with_scores] == [5, 10, 12]
    keys = [key for key in with_scores[-1] if key.startswith("suite/")]
    assert keys == [f"suite/{name}" for name in ("superglue", *read_suite("superglue").tasks)]
    on_two = [record for record in records(two) if "suite/boolq" in record]
    for record, other in zip(with_scores, on_two, strict=True):
        assert [other[key] for key in keys] == pytest.approx([record[key] for key in keys], rel=1e-6)

    exported = run_here("checkpoints.export", f"run_dir={one}", f"output_dir={tmp_path / 'export'}")
    assert exported.returncode == 0, exported.stderr
    evaluated = run_here(
        "kraken_train.evaluate", f"export_dir={tmp_path / 'export'}", "suite=superglue", f"suite_data={files}"
    )
    assert evaluated.returncode == 0, evaluated.stderr
    expected = scores_of(read_results(tmp_path / "export").suites)
    assert {key: with_scores[-1][key] for key in keys} == pytest.approx(expected, rel=1e-6)
    drawn = run_here("kraken_train.report", str(one), str(two), "--output", str(tmp_path / "figure.png"))
    assert drawn.returncode == 0, drawn.stderr


def test_refused_with_the_harness(harness: None, files: Path, data: Path, tmp_path: Path) -> None:
    """Before the run folder is made."""
    run = tmp_path / "run"
    settings = overrides(data, run, "validation.suites=[superglue]", f"validation.suite_data={files}")
    too_long = user_error(run_here("kraken_train.train", *settings, "model.context_length=2"))
    assert "a task has an answer of" in too_long
    assert "context_length is 2" in too_long
    (files / "copa.jsonl").unlink()
    assert "lacks files: copa (copa.jsonl missing)" in user_error(run_here("kraken_train.train", *settings))
    unknown = user_error(run_here("kraken_train.train", *settings, "validation.suites=[superglue/boolc]"))
    assert "boolc is not in suite=superglue (did you mean boolq?)" in unknown
    assert not run.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["validation.suites=[superglu]"], "suite=superglu is not known; use blimp or hellaswag"),
        (["validation.suites=[blimp,blimp]"], "must be names of suites, each once"),
        (["validation.suites=[]"], "must be names of suites, each once"),
        (["validation.suites=[blimp,blimp/blimp]"], "has the suite blimp and a task of it"),
        (["validation.suites=[superglue/copa,superglue]"], "has the suite superglue and a task of it"),
        (["validation.suites=[blimp]", "validation.suites_every=0"], "validation.suites_every=0"),
        (["validation.suites=[blimp]", "validation.suite_limit=0"], "validation.suite_limit=0 must be"),
        (["validation.suite_limit=5"], "validation.suite_limit=5 needs validation.suites"),
        (
            ["validation.suites=[blimp]", "validation.suite_data=missing"],
            "suite_data=missing is not a folder",
        ),
    ],
)
def test_refused_settings(data: Path, tmp_path: Path, settings: list[str], message: str) -> None:
    assert message in user_error(run_here("kraken_train.train", *overrides(data, tmp_path / "run", *settings)))
    assert not (tmp_path / "run").exists()


def test_refused_without_the_harness(
    tokenizer_dir: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_prep.tokenizers import load_tokenizer  # noqa: PLC0415
    from kraken_train.common.errors import ConfigError  # noqa: PLC0415

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"validation.suites=\[superglue\] needs lm-evaluation-harness.*\[eval\]"):
        LiveSuites(["superglue"], files, None, load_tokenizer(tokenizer_dir), 64)
