"""Training with a teacher: what it computes, what a checkpoint keeps of it, and which teachers are refused."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import launch_ranks, rough_model, run_module, user_error, write_small_export
from parity.common import settings
from torch.nn import functional as F

from checkpoints.training.store import find_good_checkpoint, read_weights
from checkpoints.training.stored_tensors import StoredTensors
from integration.training import learned, overrides, records
from kraken_train.common.errors import CheckpointError, ConfigError
from kraken_train.data.dataset import TrainingData
from kraken_train.data.validation_set import validation_sets
from kraken_train.model.config import GPTConfig, KrakenConfig, ModelConfig, padded_vocab_size
from kraken_train.model.registry import build_model
from kraken_train.settings.loss import DistillConfig
from kraken_train.settings.parallel import ParallelConfig
from kraken_train.training.resume import changed_settings
from kraken_train.training.teacher import open_teacher

# As the data's tokenizer has 320 tokens. It could read more than the 32 tokens of the run's samples.
TEACHER = GPTConfig(
    num_layers=2, hidden_size=24, num_heads=6, vocab_size=padded_vocab_size(320), context_length=40, positions="rope"
)
STUDENT = KrakenConfig(4, num_layers=2, hidden_size=16, heads_per_sub_layer=2, vocab_size=320, context_length=32)
SHORT = ("max_steps=6", "checkpoint.every=3", "attention_within_documents=true", "distill.temperature=2")


@pytest.fixture(scope="module")
def export(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "export"
    write_small_export(folder, TEACHER, data / "tokenizer")
    return folder


def train(data: Path, run: Path, *more: str) -> str:
    result = run_module("kraken_train.train", *overrides(data, run, *SHORT, *more))
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def reference(data: Path, export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("reference") / "run"
    output = train(data, run, f"distill.teacher={export}")
    assert f"teacher: standard, {TEACHER.num_parameters:,} parameters, of {export}; weight 0.5" in output
    assert " | KL " in output
    return run


def test_the_first_step_and_the_validation_are_as_by_hand(data: Path, reference: Path) -> None:
    """With PyTorch's functions on all logits, documents apart for the teacher too."""
    prepared = TrainingData({data: 1})
    student, teacher = build_model(STUDENT), rough_model(TEACHER, torch.float32)
    student.end_of_document = teacher.end_of_document = prepared.end_of_document
    tokens = torch.from_numpy(prepared.samples(32, seed=0).batch(range(4)))
    assert (tokens == prepared.end_of_document).any()
    logits, of_teacher = (model(tokens[:, :-1]).flatten(0, 1) for model in (student, teacher))
    divergence = F.kl_div(
        (logits / 2).log_softmax(1), (of_teacher / 2).log_softmax(1), reduction="batchmean", log_target=True
    )
    cross_entropy = F.cross_entropy(logits, tokens[:, 1:].flatten())
    (0.5 * cross_entropy + 0.5 * 2**2 * divergence).backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in student.parameters()])  # type: ignore[misc]
    first = records(reference)[0]
    assert first["distill_kl"] == pytest.approx(divergence.item(), rel=1e-5)
    assert first["loss"] == pytest.approx(cross_entropy.item(), rel=1e-6)
    assert first["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)

    trained = read_weights(reference)
    student.load_state_dict(trained.weights)
    (validated,) = validation_sets(prepared, {}, 5)
    windows = [torch.from_numpy(window) for window in validated.windows(32, 5)]
    losses = [F.cross_entropy(student(w[:, :-1]).flatten(0, 1), w[:, 1:].flatten()) for w in windows]
    assert records(reference)[-1]["validation_loss"] == pytest.approx(losses[0].item(), rel=1e-5)


def test_a_checkpoint_has_the_fingerprint_only_and_resumes_to_the_bit(
    data: Path, export: Path, reference: Path, tmp_path: Path
) -> None:
    """The export may have moved; another one is refused."""
    checkpoint, _ = find_good_checkpoint(reference / "checkpoints")
    assert checkpoint.metadata["teacher"]["folder"] == str(export)
    names = {name.partition(".")[2] for name in StoredTensors(checkpoint).entries if name.startswith("model.")}
    assert names == set(build_model(STUDENT).state_dict())
    run, moved, other = tmp_path / "run", tmp_path / "moved", tmp_path / "other"
    shutil.copytree(reference, run)
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    shutil.copytree(export, moved)
    write_small_export(other, dataclasses.replace(TEACHER, norm_epsilon=1e-4), data / "tokenizer")
    refused = run_module("kraken_train.train", *overrides(data, run, *SHORT, f"distill.teacher={other}"))
    assert f"was trained with another teacher than distill.teacher={other}" in user_error(refused)
    output = train(data, run, f"distill.teacher={moved}")
    assert "resumed from" in output
    assert "changed since" not in output
    assert learned(run) == learned(reference)
    assert [step["distill_kl"] for step in records(run)] == [step["distill_kl"] for step in records(reference)]


def test_a_weight_of_0_changes_no_bit(data: Path, export: Path, tmp_path: Path) -> None:
    """Of what is learned; and another weight does."""
    runs = {"without": [], "with": [f"distill.teacher={export}", "distill.weight=0"]}
    for name, more in runs.items():
        train(data, tmp_path / name, "precision=bf16", "max_steps=3", *more)
    without, observed = (learned(tmp_path / name) for name in runs)
    assert observed == without
    weights, of_observed = (read_weights(tmp_path / name).weights for name in runs)
    assert all(torch.equal(of_observed[name], weight) for name, weight in weights.items())
    assert records(tmp_path / "with")[-1]["distill_kl"] > 0
    assert "distill_kl" not in records(tmp_path / "without")[0]


@pytest.mark.slow
def test_two_ranks_share_both(data: Path, export: Path, reference: Path, tmp_path: Path) -> None:
    """And a run that had a teacher may go on without one."""
    run = tmp_path / "run"
    shared = [f"distill.teacher={export}", "parallel.sub_layer_parallel_size=2"]
    launch_ranks(2, "-m", "kraken_train.train", *overrides(data, run, *SHORT, *shared))
    for found, expected in zip(learned(run), learned(reference), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    assert [step["distill_kl"] for step in records(run)] == pytest.approx(
        [step["distill_kl"] for step in records(reference)], rel=1e-5
    )
    output = train(data, run, "max_steps=7")
    assert f"changed since the checkpoint: distill.teacher: {export} -> None" in output


def open_with(folder: Path, model: ModelConfig, tokenizer_files: dict[str, str], size: int = 1) -> Any:
    config = dataclasses.replace(
        settings(),
        distill=DistillConfig(str(folder)),
        parallel=ParallelConfig(size, vocab_parallel=None, reduce_dtype=None, verify_every=0),
    )
    return open_teacher(config, model, tokenizer_files)


def test_what_cannot_teach(data: Path, export: Path, tmp_path: Path) -> None:
    files = TrainingData({data: 1}).tokenizer_files
    for size in (1, 2):
        assert open_with(export, STUDENT, files, size).config == TEACHER
    for folder, model, known, size, message in [
        (tmp_path / "nowhere", STUDENT, files, 1, r"distill\.teacher=.*nowhere is not a folder"),
        (data, STUDENT, files, 1, "is missing, so .* is not an export"),
        (export, STUDENT, {"tokenizer.model": "0" * 64}, 1, r"another tokenizer .* \(tokenizer\.model differs\)"),
        (export, STUDENT.replace(vocab_size=384), files, 1, "has model.vocab_size=320, and this model 384; train with"),
        (export, STUDENT.replace(context_length=41), files, 1, r"has model.context_length=40, less than the 41 tokens"),
        (export, STUDENT, files, 4, r"does not divide model.num_heads=6 of the teacher .* use 1 or 2, or another"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            open_with(folder, model, known, size)


def test_settings() -> None:
    for wrong, message in (
        (DistillConfig(weight=1.5), r"distill\.weight=1\.5 must be from 0"),
        (DistillConfig(weight=float("nan")), r"distill\.weight=nan must be from 0"),
        (DistillConfig(temperature=0), r"distill\.temperature=0 must be above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            wrong.validate()


def test_changes_that_a_resumption_tells() -> None:
    """The weight, and a teacher that comes or goes, but not where its folder is."""
    without = {"teacher": None, "weight": 0.5, "temperature": 1.0}

    def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
        others = dict.fromkeys(("optim", "schedule", "max_steps", "max_tokens", "phases", "precision", "loss"))
        same = {**others, "global_batch_size": 8, "attention_within_documents": False}
        return changed_settings({**same, "distill": before}, {**same, "distill": now})

    assert changes({**without, "teacher": "a"}, {**without, "teacher": "b"}) == []
    assert changes(without, {**without, "teacher": "b"}) == ["distill.teacher: None -> b"]
    assert changes({**without, "weight": 1.0}, without) == ["distill.weight: 1.0 -> 0.5"]
