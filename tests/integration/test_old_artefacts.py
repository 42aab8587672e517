"""Data, a run with a checkpoint, and an export that an earlier commit wrote: the commands of today read them.

`artefacts/written_by_9a2225f/README.md` says how they were made; `expected.json` there holds what that commit computed
from them. Only public commands are used here, so that the test holds however the library is organized.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.dynamic_module_utils as modules
from forked import REPOSITORY
from helpers import run_here, run_module
from transformers import AutoModelForCausalLM

WRITTEN = REPOSITORY / "tests" / "artefacts" / "written_by_9a2225f"
EXPECTED = json.loads((WRITTEN / "expected.json").read_text(encoding="utf-8"))
FINGERPRINT = "9879375ef90c4149f62f61c9740dc237"  # of the data's content
SETTINGS = [
    "model=kraken-tiny-2way", "model.num_layers=2", "model.hidden_size=16", "model.context_length=32",
    "precision=fp32", "global_batch_size=8", "micro_batch_size=8", "log_every=5", "validation.every=0",
    "tracking.mode=off", "optim.lr=3e-2", "schedule.warmup_steps=2", "checkpoint.keep=1",
]  # fmt: skip


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return Path(shutil.copytree(WRITTEN, tmp_path / "written"))


def output_words(module: str, *arguments: object, fork: bool = False) -> str:
    """What the command prints, with one space between words; it must succeed."""
    result = (run_module if fork else run_here)(module, *map(str, arguments))
    assert result.returncode == 0, result.stdout + result.stderr
    return " ".join(result.stdout.split())


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_data(written: Path) -> None:
    verified = output_words("data_prep.verify", written / "data")
    inspected = output_words("data_prep.inspect", written / "data")
    for printed in (verified, inspected):
        assert FINGERPRINT in printed
        assert "40,258 tokens" in printed
        assert "110 documents, 36,999 tokens" in printed
    assert "sentencepiece, 300 tokens" in inspected


def test_a_run_is_continued(written: Path) -> None:
    run = written / "run"
    assert "step 100 of 100 (100.0%)" in output_words("kraken_train.status", run)
    inspected = output_words("checkpoints.inspect", run)
    for fact in ("step 100 updates 100", "25,600 consumed", "ee5878df", FINGERPRINT, "14,480 values", "28,960 values"):
        assert fact in inspected

    # The folder has moved since, so data_dir is given again.
    printed = output_words(
        "kraken_train.train", *SETTINGS, f"data_dir={written / 'data'}", f"run_dir={run}", "max_steps=150", fork=True
    )
    assert f"resumed from {run / 'checkpoints' / 'step-00000100'}" in printed
    before, after = read_lines(WRITTEN / "run" / "metrics.jsonl"), read_lines(run / "metrics.jsonl")
    assert after[: len(before)] == before
    losses = {str(record["step"]): record["loss"] for record in after[len(before) :]}
    assert losses == pytest.approx(EXPECTED["losses"], rel=1e-4)  # other kernels: 1e-7

    output_words("kraken_train.report", run)
    assert (run / "curves.png").stat().st_size > 0
    assert "step 150 of 150 (100.0%)" in output_words("kraken_train.status", run)


def test_an_export(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export = written / "export"
    output_words(
        "kraken_train.evaluate", f"export_dir={export}", f"data_dir={written / 'data'}", "dtype=fp32", fork=True
    )
    (result,) = json.loads((export / "evaluation.json").read_text(encoding="utf-8"))["perplexity"]
    assert result["perplexity"] == pytest.approx(EXPECTED["validation_perplexity"], rel=1e-4)
    assert result["loss"] == pytest.approx(EXPECTED["validation_loss"], rel=1e-5)
    assert result["tokens"] == EXPECTED["validation_tokens"]

    # Each step's two highest logits differ by at least 0.01; other kernels change a logit by about 2e-7.
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(EXPECTED["prompts"]) + "\n", encoding="utf-8")
    generated = run_module(
        "kraken_train.generate", f"export_dir={export}", f"prompts_file={prompts}", "max_new_tokens=12", "temperature=0"
    )
    assert generated.returncode == 0, generated.stdout + generated.stderr
    assert [json.loads(line) for line in generated.stdout.splitlines()] == EXPECTED["texts"]

    # The export holds its own model code, as that commit wrote it.
    monkeypatch.setattr(modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True, dtype=torch.float32)
    ids = torch.arange(7, 27)[None]
    with torch.no_grad():
        output = model(ids, labels=ids)
    logits = torch.tensor(EXPECTED["logits_after_7_to_26"])
    torch.testing.assert_close(output.logits[0, -1, : len(logits)], logits, rtol=1e-5, atol=1e-5)
    assert output.loss.item() == pytest.approx(EXPECTED["loss_of_7_to_26"], rel=1e-5)
