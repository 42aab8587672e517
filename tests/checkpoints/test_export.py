"""Exporting a run's checkpoint."""

from __future__ import annotations

import dataclasses
import errno
import shutil
from pathlib import Path

import pytest
import torch
from helpers import rough_model, run_here, small_configs, user_error

from checkpoints.exports.folder import read_export
from checkpoints.training.retention import Retention
from checkpoints.training.writer import save_checkpoint
from kraken_train.common.settings import to_dict
from kraken_train.parallel.ranks import Runtime
from kraken_train.reporting import model_card

CONFIG = small_configs(vocab_size=320)["kraken"]


def weights(step: int) -> dict[str, torch.Tensor]:
    return rough_model(CONFIG, torch.float32, seed=step).state_dict()


@pytest.fixture
def run_dir(tmp_path: Path, tokenizer_dir: Path) -> Path:
    """A run folder with checkpoints of steps 5 and 10."""
    run = tmp_path / "run (a, b)"
    shutil.copytree(tokenizer_dir, run / "tokenizer")
    for step in (5, 10):
        tensors = {f"model.{name}": tensor for name, tensor in weights(step).items()}
        tensors |= {f"optimizer.exp_avg.{name}": torch.zeros_like(tensor) for name, tensor in weights(step).items()}
        metadata = {
            "model": to_dict(CONFIG),
            "consumed_samples": step * 8,
            "tokens": step * 8 * 24,
            "data_fingerprint": "abc",
            "world_size": 1,
        }
        save_checkpoint(run / "checkpoints", step, tensors, metadata, Retention(3), Runtime(0, 0, 1, 1))
    return run


@pytest.mark.parametrize(("settings", "step"), [([], 10), (["step=5"], 5)])
def test_weights_and_training_of_a_step(run_dir: Path, tmp_path: Path, settings: list[str], step: int) -> None:
    result = run_here("checkpoints.export", f"run_dir={run_dir}", f"output_dir={tmp_path / 'e'}", *settings)
    assert result.returncode == 0, result.stderr
    assert f"exported step {step}, {CONFIG.num_parameters:,} parameters in fp32" in result.stdout
    export = read_export(tmp_path / "e")
    assert export.config == CONFIG
    expected = {"step": step, "consumed_samples": step * 8, "tokens": step * 192, "data_fingerprint": "abc"}
    assert export.training == expected
    loaded = export.load_model().state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights(step).items())
    text = run_here("kraken_train.generate", f"export_dir={tmp_path / 'e'}", "prompt=The", "max_new_tokens=3")
    assert text.stdout.startswith("The"), text.stderr


def test_the_mean_of_checkpoints(run_dir: Path, tmp_path: Path) -> None:
    """In float64: the mean of two float32 is rounded once."""
    base = ["checkpoints.export", f"run_dir={run_dir}", f"output_dir={tmp_path / 'e'}"]
    assert "average=3 is more than the undamaged checkpoints in" in user_error(run_here(*base, "average=3"))
    assert "average=0" in user_error(run_here(*base, "average=0"))
    result = run_here(*base, "average=2")
    assert result.returncode == 0, result.stderr
    assert "exported the mean of steps 5, 10, " in result.stdout
    export = read_export(tmp_path / "e")
    assert export.training["averaged_steps"] == [5, 10]
    assert "mean of the weights of steps" in (tmp_path / "e" / "README.md").read_text()
    pairs = {name: (tensor.double(), weights(10)[name].double()) for name, tensor in weights(5).items()}
    loaded = export.load_model().state_dict()
    assert all(torch.equal(loaded[name], ((a + b) / 2).float()) for name, (a, b) in pairs.items())


def test_the_exponential_average(run_dir: Path, tmp_path: Path) -> None:
    base = ["checkpoints.export", f"run_dir={run_dir}", f"output_dir={tmp_path / 'e'}", "weights=ema"]
    assert "holds no average of the weights; train with ema_decay" in user_error(run_here(*base))
    tensors = {f"model.{name}": tensor for name, tensor in weights(20).items()}
    tensors |= {f"optimizer.ema.{name}": tensor for name, tensor in weights(7).items()}
    save_checkpoint(run_dir / "checkpoints", 20, tensors, {"model": to_dict(CONFIG)}, Retention(3), Runtime(0, 0, 1, 1))
    result = run_here(*base)
    assert result.returncode == 0, result.stderr
    assert "exported the ema of step 20, " in result.stdout
    export = read_export(tmp_path / "e")
    assert export.training["weights"] == "ema"
    assert "exponential average" in (tmp_path / "e" / "README.md").read_text()
    loaded = export.load_model().state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights(7).items())


def test_a_damaged_checkpoint_is_not_averaged(run_dir: Path, tmp_path: Path) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in weights(20).items()}
    save_checkpoint(run_dir / "checkpoints", 20, tensors, {"model": to_dict(CONFIG)}, Retention(3), Runtime(0, 0, 1, 1))
    damaged = max((run_dir / "checkpoints" / "step-00000010").glob("*.distcp"), key=lambda path: path.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    base = ["checkpoints.export", f"run_dir={run_dir}", f"output_dir={tmp_path / 'e'}"]
    result = run_here(*base, "average=2")
    assert result.returncode == 0, result.stderr
    assert "passed over a damaged checkpoint" in result.stdout
    assert "exported the mean of steps 5, 20, " in result.stdout
    assert read_export(tmp_path / "e").training["step"] == 20


def test_a_note_on_slow_head_sizes(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, hidden_size=18)  # heads of 9
    tensors = {f"model.{name}": tensor for name, tensor in rough_model(config, torch.float32).state_dict().items()}
    save_checkpoint(
        tmp_path / "run" / "checkpoints", 5, tensors, {"model": to_dict(config)}, Retention(3), Runtime(0, 0, 1, 1)
    )
    result = run_here("checkpoints.export", f"run_dir={tmp_path / 'run'}", f"output_dir={tmp_path / 'e'}")
    assert result.returncode == 0, result.stderr
    assert "note: model.hidden_size=18 with model.heads_per_sub_layer=2 makes heads of 9, and" in result.stdout


def test_bf16(run_dir: Path, tmp_path: Path) -> None:
    run_here("checkpoints.export", f"run_dir={run_dir}", f"output_dir={tmp_path / 'e'}", "dtype=bf16")
    loaded = read_export(tmp_path / "e").load_model().state_dict()
    assert all(torch.equal(loaded[name], tensor.bfloat16()) for name, tensor in weights(10).items())


def test_an_export_has_its_name_only_once_it_has_its_card(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So what is killed before its card is written does not keep the same command from being repeated."""
    command = ["checkpoints.export", f"run_dir={run_dir}", f"output_dir={tmp_path / 'e'}"]

    def refuse(path: Path, text: str) -> None:
        assert not (tmp_path / "e").exists()
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(model_card, "replace_synced", refuse)
        assert "README.md cannot be written: Input/output error" in user_error(run_here(*command))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.endswith("tmp")) == []
    assert run_here(*command).returncode == 0
    card = (tmp_path / "e" / "README.md").read_text()
    assert "export_dir=e " in card
    assert ".e.tmp" not in card


def test_export_errors(run_dir: Path, tmp_path: Path) -> None:
    base = ["checkpoints.export", f"run_dir={run_dir}"]
    assert "step=7 is not in" in user_error(run_here(*base, f"output_dir={tmp_path / 'e'}", "step=7"))
    assert "is not an empty folder" in user_error(run_here(*base, f"output_dir={run_dir}"))
    shutil.rmtree(run_dir / "checkpoints")
    user_error(run_here(*base, f"output_dir={tmp_path / 'e'}"))
    assert not (tmp_path / "e").exists()
