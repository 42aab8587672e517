"""Data, a run, a checkpoint and an export of an earlier commit: today's commands read, continue and load them.

`artefacts/written_by_9a2225f/make.sh` made them at that commit; `expected.json` holds what that commit computed next.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import REPOSITORY, run_here, run_module
from transformers import AutoModelForCausalLM

WRITTEN = REPOSITORY / "tests" / "artefacts" / "written_by_9a2225f"
EXPECTED = json.loads((WRITTEN / "expected.json").read_text(encoding="utf-8"))
SETTINGS = [
    "model=kraken-tiny-2way", "model.num_layers=2", "model.hidden_size=16", "model.context_length=32",
    "precision=fp32", "global_batch_size=8", "micro_batch_size=8", "log_every=5", "validation.every=0",
    "tracking.mode=off", "optim.lr=3e-2", "schedule.warmup_steps=2",
]  # fmt: skip


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return Path(shutil.copytree(WRITTEN, tmp_path / "written"))


def test_data(written: Path) -> None:
    for module in ("data_prep.verify", "data_prep.inspect"):
        result = run_here(module, str(written / "data"))
        assert result.returncode == 0, result.stdout + result.stderr


def test_a_run_is_continued(written: Path) -> None:
    run = written / "run"
    for module, argument in (("kraken_train.status", str(run)), ("checkpoints.inspect", str(run))):
        result = run_here(module, argument)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "100" in result.stdout
    result = run_module("kraken_train.train", *SETTINGS, f"data_dir={written / 'data'}", f"run_dir={run}",
                        "max_steps=150")  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "resumed from" in result.stdout
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = {str(record["step"]): record["loss"] for record in records if record["step"] > 100}
    assert losses == pytest.approx(EXPECTED["losses"], rel=1e-3)  # kernels differ between machines
    assert run_here("kraken_train.report", str(run)).returncode == 0


def test_an_export(written: Path) -> None:
    export = written / "export"
    result = run_module("kraken_train.evaluate", f"export_dir={export}", f"data_dir={written / 'data'}", "dtype=fp32")
    assert result.returncode == 0, result.stdout + result.stderr
    (perplexity,) = json.loads((export / "evaluation.json").read_text(encoding="utf-8"))["perplexity"]
    assert perplexity["loss"] == pytest.approx(EXPECTED["validation_loss"], rel=1e-5)
    assert perplexity["tokens"] == EXPECTED["validation_tokens"]

    result = run_module("kraken_train.generate", f"export_dir={export}", "prompt=the rank sums", "max_new_tokens=16",
                        "temperature=0", "dtype=float32")  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "the rank sums" in result.stdout

    # The export holds its own model code, as that commit wrote it.
    model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.arange(7, 27)[None]).logits[0, -1, :16]
    torch.testing.assert_close(logits, torch.tensor(EXPECTED["logits_after_7_to_26"]), rtol=1e-4, atol=1e-4)
