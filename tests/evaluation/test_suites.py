"""Suites run by lm-evaluation-harness, on generated documents in the schema of the data sets on the Hub."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import rough_model, run_here, small_configs, user_error, write_small_export
from superglue_files import DOCUMENTS, WORDS, superglue

from checkpoints.exports.folder import read_export, write_export
from data_prep.tokenizers import Tokenizer
from kraken_train.common.errors import ConfigError, DataError
from kraken_train.data.dataset import TokenStream
from kraken_train.evaluation.perplexity import Sequences, document_sequences, evaluate
from kraken_train.evaluation.results import read_results
from kraken_train.evaluation.squad import compute_exact, compute_f1
from kraken_train.evaluation.suites import (
    Suite,
    SuiteRun,
    SuiteTask,
    TaskChoice,
    load_tasks,
    read_suite,
    require_harness,
    run_suite,
)
from kraken_train.model.language_model import LanguageModel


def settings(folder: Path, tmp_path: Path, **changed: Any) -> SuiteRun:
    return SuiteRun(**{"tasks": TaskChoice(data_dir=folder), "task_dir": tmp_path, "limit": None, "batch_size": 4,
                       "device": "cpu", "dtype": "float32", **changed})  # fmt: skip


@torch.no_grad()
def likelihoods(model: LanguageModel, tokenizer: Tokenizer, prompt: str, answers: list[str]) -> list[float]:
    """The log-likelihoods of the answers after the prompt, by our own model."""
    scores = []
    for answer in answers:
        before, ids = tokenizer.encode_batch([prompt, prompt + answer])
        tokens = torch.tensor([ids])
        losses = model.token_losses(tokens[:, :-1], tokens[:, 1:])
        scores.append(-losses[0, len(before) - 1 :].double().sum().item())
    return scores


def chosen(model: LanguageModel, tokenizer: Tokenizer, prompt: str, answers: list[str]) -> int:
    """The index of the most likely answer after the prompt, by our own model."""
    return int(np.argmax(likelihoods(model, tokenizer, prompt, answers)))


def test_suite_equals_our_own_model(harness: None, files: Path, tmp_path: Path, tokenizer_dir: Path) -> None:
    export = tmp_path / "export"
    config = small_configs(vocab_size=320, context_length=256)["kraken"]
    model = write_small_export(export, config, tokenizer_dir)
    from data_prep.tokenizers import load_tokenizer  # noqa: PLC0415

    tokenizer = load_tokenizer(tokenizer_dir)
    result = run_here(
        "kraken_train.evaluate", f"export_dir={export}", "suite=superglue", f"suite_data={files}", "device=cpu",
        f"output={tmp_path / 'result.json'}", f"table={tmp_path / 'table.md'}", f"task_dir={tmp_path}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = read_results(export).suites["superglue"]
    assert list(found.tasks) == ["boolq", "cb", "copa", "multirc", "record", "sglue_rte", "wic", "wsc"]
    assert all(task.documents == DOCUMENTS and task.source == "files" for task in found.tasks.values())
    assert found.tasks["boolq"].dataset == "aps/super_glue"

    documents = superglue()
    correct = {
        "boolq": [
            chosen(model, tokenizer, f"{d['passage']}\nQuestion: {d['question']}?\nAnswer:", [" no", " yes"])
            == d["label"]
            for d in documents["boolq"]
        ],
        "sglue_rte": [
            chosen(
                model,
                tokenizer,
                f"{d['premise']}\nQuestion: {d['hypothesis']} True or False?\nAnswer:",
                [" True", " False"],
            )
            == d["label"]
            for d in documents["rte"]
        ],
    }
    for name, right in correct.items():
        score = found.tasks[name].scores["acc"]
        assert score.value == pytest.approx(np.mean(right))
        assert score.standard_error == pytest.approx(np.std(right, ddof=1) / np.sqrt(DOCUMENTS))
    headline = [found.tasks[name].scores["f1" if name == "record" else "acc"].value for name in found.tasks]
    written = json.loads((tmp_path / "result.json").read_text())["suites"]["superglue"]
    assert written["averages"]["paper"]["value"] == pytest.approx(np.mean(headline))
    for text in (result.stdout, (tmp_path / "table.md").read_text(), (export / "README.md").read_text()):
        assert "average of all 8 tasks" in text
        assert f"{np.mean(headline):.4f}" in text
    # The harness's own command gives the same results with the task definitions in task_dir.
    stock = run_harness(tmp_path, export)
    for name, task in found.tasks.items():
        for metric, score in task.scores.items():
            assert stock[name][f"{metric},none"] == score.value, name


def run_harness(task_dir: Path, export: Path) -> dict[str, Any]:
    """Results of `lm_eval --model hf --include_path TASK_DIR`."""
    import lm_eval  # noqa: PLC0415
    from lm_eval.tasks import TaskManager  # noqa: PLC0415

    manager = TaskManager(include_path=str(task_dir), include_defaults=False)
    arguments = f"pretrained={export},trust_remote_code=True,dtype=float32"
    found = lm_eval.simple_evaluate(
        "hf", arguments, manager.all_subtasks, task_manager=manager, batch_size=8, device="cpu"
    )
    return found["results"]


def test_likelihoods_do_not_depend_on_the_batch_size(
    harness: None, files: Path, tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor on the dtype of the stored weights: sums in bf16 would be rounded to multiples of 1/16 or more."""
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415

    config = small_configs(vocab_size=320, context_length=256)["kraken"]
    weights = rough_model(config, torch.float32).state_dict()
    write_export(tmp_path / "e", config, weights, tokenizer_dir=tokenizer_dir, metadata={}, dtype=torch.bfloat16)
    export = read_export(tmp_path / "e")
    run, compute = settings(files, tmp_path, tasks=TaskChoice(["boolq"], files)), HFLM.loglikelihood
    seen: list[list[float]] = []

    def recording(self: HFLM, requests: list[Any], **options: Any) -> list[tuple[float, bool]]:
        answers = compute(self, requests, **options)
        seen.append([likelihood for likelihood, _ in answers])
        return answers

    monkeypatch.setattr(HFLM, "loglikelihood", recording)
    for size in (1, 8, 32):
        run_suite(export, read_suite("superglue"), dataclasses.replace(run, batch_size=size))
    model, tokenizer = export.load_model(torch.float64), export.load_tokenizer()
    expected = []
    for document in superglue()["boolq"]:
        prompt = f"{document['passage']}\nQuestion: {document['question']}?\nAnswer:"
        expected += likelihoods(model, tokenizer, prompt, [" no", " yes"])
    assert len(seen) == 3
    for found in seen:
        assert found == pytest.approx(expected, abs=1e-4)


def test_bits_per_byte_of_documents(harness: None, tmp_path: Path, tokenizer_dir: Path) -> None:
    """The harness's rolling likelihoods of documents below and above the context are those of mode=documents."""
    from lm_eval.api.instance import Instance  # noqa: PLC0415
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415

    write_small_export(tmp_path / "e", small_configs(vocab_size=320, context_length=24)["kraken"], tokenizer_dir)
    export = read_export(tmp_path / "e")
    tokenizer, texts = export.load_tokenizer(), [" ".join(WORDS[:n]) for n in (1, 3, 8, 20, 40)]
    harness_model = HFLM(str(tmp_path / "e"), trust_remote_code=True, dtype="float64", device="cpu", batch_size=2)
    rolling = harness_model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (t,), 0) for t in texts])
    documents = [[*ids, tokenizer.end_of_document] for ids in tokenizer.encode_batch(texts)]
    lengths = np.array([len(ids) for ids in documents])
    assert lengths.min() < 24 < lengths.max() / 2
    stream = TokenStream([np.concatenate(documents)])
    sequences = Sequences(*document_sequences(stream, lengths, tokenizer.end_of_document), reach_back=True)
    size = sum(len(text.encode()) for text in texts)
    found = evaluate(export.load_model(torch.float64), sequences, stride=24, batch_size=2, text_bytes=size)
    assert found.bits_per_byte == pytest.approx(-sum(rolling) / np.log(2) / size, rel=1e-12)


def test_squad_metrics() -> None:
    assert compute_exact("The Mill!", "mill") == 1
    assert compute_exact("the mill", "a windmill") == 0
    assert compute_f1("the old mill", "old mill by an old river") == pytest.approx(
        2 * (2 / 2) * (2 / 5) / (2 / 2 + 2 / 5)
    )
    assert (compute_f1("the", "a"), compute_f1("the", "mill"), compute_f1("mill", "ice")) == (1.0, 0.0, 0.0)


def test_missing_files(harness: None, files: Path, tmp_path: Path) -> None:
    suite = read_suite("superglue")
    (files / "record.jsonl").unlink()
    (files / "rte.jsonl").unlink()
    with pytest.raises(DataError, match=r"lacks files: record \(record.jsonl missing\), sglue_rte \(rte.jsonl"):
        load_tasks(suite, TaskChoice(data_dir=files), tmp_path)
    with pytest.raises(ConfigError, match=r"copas is not in suite=superglue \(did you mean copa\?\)"):
        load_tasks(suite, TaskChoice(["copas"], files), tmp_path)
    tasks, not_run = load_tasks(suite, TaskChoice(["copa", "record"], files, skip_missing=True), tmp_path)
    assert list(tasks) == ["copa"]
    assert not_run["record"] == "record.jsonl missing"
    assert not_run["boolq"] == "not selected"
    assert len(not_run) == 7


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"passage": "x", "question": "y", "label": -1}', "test sets with secret answers"),
        ('{"passage": "x", "label": 1}', "in the schema of the data set on the Hub"),
        ('{"passage": ', "in the schema of the data set on the Hub"),
        ("", "cannot be used"),
    ],
)
def test_files_of_another_schema(harness: None, files: Path, tmp_path: Path, line: str, message: str) -> None:
    (files / "boolq.jsonl").write_text(line + "\n" if line else "")
    with pytest.raises(DataError, match=message):
        load_tasks(read_suite("superglue"), TaskChoice(["boolq"], files), tmp_path)


def test_groups(harness: None, tmp_path: Path) -> None:
    """A group needs files for all of its tasks, and its tasks are those of the harness."""
    suite = Suite("blimp", "BLiMP", None, {"blimp": SuiteTask("acc")})
    with pytest.raises(DataError, match=r"blimp \(adjunct_island.jsonl and 66 more missing\)"):
        load_tasks(suite, TaskChoice(data_dir=tmp_path), tmp_path)
    from kraken_train.evaluation.suites import members, stock_tasks  # noqa: PLC0415

    index = stock_tasks().task_index
    assert len(members("blimp", index)) == 67
    assert members("boolq", index) == ["boolq"]
    for name in ("superglue", "lambada", "hellaswag", "blimp"):
        assert set(read_suite(name).tasks) <= set(index)


def test_exports_that_cannot_be_run(harness: None, files: Path, tmp_path: Path, tokenizer_dir: Path) -> None:
    arguments = ["suite=superglue", f"suite_data={files}", "device=cpu", "record=false", "tasks=[copa,multirc]"]
    write_small_export(tmp_path / "bare", small_configs()["kraken"], None)
    message = user_error(run_here("kraken_train.evaluate", f"export_dir={tmp_path / 'bare'}", *arguments))
    assert "has no tokenizer_config.json" in message
    config = small_configs(vocab_size=320, context_length=8)["standard"]
    write_small_export(tmp_path / "short", config, tokenizer_dir)
    result = run_here("kraken_train.evaluate", f"export_dir={tmp_path / 'short'}", *arguments)
    assert result.returncode == 2
    assert "tokens, but the model's context_length is 8" in result.stderr


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'kraken-train\[eval\]'"):
        require_harness("superglue")
    write_small_export(tmp_path / "e", small_configs()["kraken"], None)
    base = ["kraken_train.evaluate", f"export_dir={tmp_path / 'e'}"]
    assert "suite=superglue needs lm-evaluation-harness" in user_error(run_here(*base, "suite=superglue"))
    shutil.rmtree(tmp_path / "e")
    assert "use one of blimp, hellaswag, lambada, superglue" in user_error(run_here(*base, "suite=glue"))
