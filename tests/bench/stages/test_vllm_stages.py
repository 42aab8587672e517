"""The stages with vLLM: where it is not installed, and with one that answers what the test chooses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from kraken_train.bench.stages import vllm_times, vllm_tokens
from kraken_train.bench.stages.preset import VllmSizes, load_preset
from kraken_train.bench.stages.stage import Goal
from kraken_train.bench.stages.table import MET, MISSED, NOT_MEASURED, UNJUDGED, verdict
from kraken_train.bench.vllm_jobs import Answer, Job, Outcome

CALLS = ModuleType("calls")
SIZES = VllmSizes(python="/nowhere/python", ranks=2, num_layers=2, hidden_size=64, compiled=True, times=())


def test_without_vllm_the_figures_say_so() -> None:
    figures = {**vllm_tokens.measure(SIZES, CALLS).figures, **vllm_times.measure(SIZES, CALLS).figures}
    assert set(figures) == {*map(vllm_tokens.same_tokens, vllm_tokens.WAYS), vllm_times.LEAST_GAIN}
    goal = Goal("", at_least=True, on_cpu=True)
    for reason in figures.values():
        assert "/nowhere/python does not exist" in reason
        assert verdict(goal, reason, on_cpu=False) == NOT_MEASURED
        assert verdict(goal, reason, on_cpu=True) == UNJUDGED


def test_tokens_that_differ_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Job] = []

    def run_jobs(python: Path, jobs: Sequence[Job], folder: Path) -> list[Outcome]:
        (job,) = jobs
        asked.append(job)
        config = json.loads(Path(job.settings["model"], "config.json").read_text(encoding="utf-8"))
        assert config["num_sub_layers"] == SIZES.ranks
        with_graphs = not job.settings["enforce_eager"]
        return [Outcome([Answer(1.0, [[8 if with_graphs else 7]] * len(job.calls[0]), [0])])]

    monkeypatch.setattr(vllm_tokens, "run_jobs", run_jobs)
    monkeypatch.setattr(vllm_tokens, "require_vllm", lambda python: "0.32.0")
    figures = vllm_tokens.measure(SIZES, CALLS).figures
    goal = Goal("", at_least=True)
    found = [verdict(goal, figures[vllm_tokens.same_tokens(way)], on_cpu=False) for way in vllm_tokens.WAYS]
    assert found == [MET, MET, MISSED]
    assert [job.ranks for job in asked] == [1, 2, 2, 2]
    assert [job.settings.get("hf_overrides") for job in asked] == [None, {"overlap": False}, None, None]


def test_gain_of_overlapping(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = load_preset("cpu").vllm
    monkeypatch.setattr(vllm_times, "require_vllm", lambda python: "0.32.0")
    monkeypatch.setattr(
        "kraken_train.bench.vllm.run_jobs",
        lambda python, jobs, folder: [
            Outcome([Answer(4.0 if "hf_overrides" in jobs[0].settings else 2.0, [[0]], [0]) for _ in jobs[0].calls])
        ],
    )
    measured = vllm_times.measure(sizes, CALLS)
    assert measured.figures[vllm_times.LEAST_GAIN] == pytest.approx(2.0)
    assert len(measured.more["times"]) == 2
