"""All that long runs need in one run: killed ten times, it ends as the one that nobody disturbed.

Phases, validation sets, suites of tasks (with lm-evaluation-harness), a weight average, a trace of some steps, sizes by
layer, deterministic algorithms, checkpoints in the background, on a local disk first and in object storage.
"""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_module, wait_for_stop
from safetensors.torch import load_file
from superglue_files import write_superglue

from integration.training import overrides, records, start_stopping

STEPS, KILLS, SEED = 300, 10, 20
TOKENS = 4 * 32  # of a step
OF_THE_MACHINE = {"tokens_per_second", "mfu", "data_wait", "memory"}


def settings(data: Path, books: Path, place: Path) -> list[str]:
    phases = (
        f"phases=[{{until: {100 * TOKENS}}}, {{until: {200 * TOKENS}, data_dir: {{{data}: 0.5, {books}: 0.5}}}}, "
        f"{{until: {STEPS * TOKENS}, data_dir: {books}, schedule: decay}}]"
    )
    suites = [
        "validation.suites=[superglue/boolq]",
        f"validation.suite_data={place.parent / 'superglue'}",
        "validation.suites_every=60",
    ]
    return [
        setting
        for setting in overrides(data, place / "run")
        if not setting.startswith(("max_steps", "checkpoint.every", "validation.every"))
    ] + [
        phases, "schedule=constant", "checkpoint.every=20", "checkpoint.keep=2", "checkpoint.keep_every=100",
        "checkpoint.asynchronous=true", f"checkpoint.stage_dir={place / 'stage'}",
        f"checkpoint.remote_dir=file://{place / 'bucket'}", "validation.every=50",
        f"validation.sets={{more: {books}}}", "ema_decay=0.98", "profile.steps=[100,102]", "norms.every=30",
        "deterministic=true", *(suites if importlib.util.find_spec("lm_eval") else []),
    ]  # fmt: skip


def of_training(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k not in OF_THE_MACHINE} for record in records(run)]


@pytest.mark.slow
def test_killed_ten_times(data: Path, books: Path, tmp_path: Path) -> None:
    write_superglue(tmp_path / "superglue")
    places = undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    for place in places:
        (place / "stage").mkdir(parents=True)
        (place / "bucket").mkdir()
    for step in sorted(random.Random(SEED).sample(range(2, STEPS), KILLS)):
        with start_stopping(step, settings(data, books, killed)) as process:
            wait_for_stop(process)
            process.kill()
    for place in places:
        result = run_module("kraken_train.train", *settings(data, books, place))
        assert result.returncode == 0, result.stderr
    assert len(list((killed / "run" / "starts").iterdir())) == KILLS + 1

    expected, found = (of_training(place / "run") for place in places)
    assert [record["step"] for record in expected] == list(range(1, STEPS + 1))
    assert found == expected
    assert {record["phase"] for record in expected} == {0, 1, 2}
    measured = {key for record in expected for key in record}
    assert {"validation_loss", "validation_loss/more"} <= measured
    assert any(key.startswith("rms/sum/") for key in measured)
    assert ("suite/boolq" in measured) == (importlib.util.find_spec("lm_eval") is not None)
    for place in places:
        assert list((place / "run").glob("starts/*/profiles/*.json*"))
        assert not list((place / "stage").rglob("*.distcp"))

    kept = sorted(path.name for path in (undisturbed / "run" / "checkpoints").glob("step-*"))
    assert kept == [f"step-{step:08}" for step in (100, 200, 280, 300)]
    for place in places:
        for folder in (place / "run" / "checkpoints", place / "bucket"):
            assert sorted(path.name for path in folder.rglob("step-*")) == kept
    exported = {}
    for kind in ("last", "ema"):
        for place in places:
            result = run_module(
                "checkpoints.export", f"run_dir={place / 'run'}", f"output_dir={place / kind}", f"weights={kind}"
            )
            assert result.returncode == 0, result.stderr
        exported[kind], again = (load_file(place / kind / "model.safetensors") for place in places)
        assert all(torch.equal(weight, again[name]) for name, weight in exported[kind].items())
    assert any(not torch.equal(weight, exported["ema"][name]) for name, weight in exported["last"].items())
