"""From the authors' `ckpt.pt` to an export that computes the authors' numbers."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import REPOSITORY, run_here, user_error
from safetensors import safe_open

from checkpoints.exports.folder import read_export
from checkpoints.import_reference import ImportConfig, import_reference
from kraken_train.common.errors import CheckpointError

MODEL_ARGS = {
    "n_layer": 3, "n_head": 12, "n_embd": 24, "block_size": 32, "bias": False, "vocab_size": 96, "dropout": 0.0,
    "n_heads_in_split": 3, "is_split": True, "ffn_expansion": 2,
}  # fmt: skip


def golden() -> dict[str, torch.Tensor]:
    with safe_open(REPOSITORY / "tests" / "artefacts" / "kraken_4way.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)


def write_checkpoint(path: Path, **changes: Any) -> Path:
    """A file as their training script writes it; a change of None leaves an entry of model_args out."""
    weights = {n.removeprefix("weight/"): t for n, t in golden().items() if n.startswith("weight/")}
    arguments = {key: value for key, value in {**MODEL_ARGS, **changes}.items() if value is not None}
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))]).state_dict()
    checkpoint = {
        "model": {f"_orig_mod.{name}": tensor for name, tensor in weights.items()},
        "optimizer": optimizer,
        "model_args": arguments,
        "iter_num": 300,
        "best_val_loss": torch.tensor(3.1),
        "config": {"dataset": "openwebtext", "compile": True},
    }
    torch.save(checkpoint, path)
    return path


def run_import(checkpoint: Path, output: Path, heads: int | None = None) -> None:
    import_reference(ImportConfig(str(checkpoint), str(output), None, heads))


def test_golden_logits_through_the_whole_route(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "a checkpoint, (1).pt")
    result = run_here("checkpoints.import_reference", f"checkpoint={checkpoint}", f"output_dir={tmp_path / 'e'}")
    assert result.returncode == 0, result.stderr
    export = read_export(tmp_path / "e")
    assert export.training == {"step": 300}
    expected = golden()
    difference = export.load_model(torch.float64)(expected["input_ids"]) - expected["logits"]
    assert difference.abs().max() < 1e-12


@pytest.mark.parametrize("name", ["n_layer", "n_embd", "block_size", "vocab_size", "ffn_expansion", "n_head"])
def test_arguments_that_contradict_the_weights(tmp_path: Path, name: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "ckpt.pt", **{name: 7})
    with pytest.raises(CheckpointError, match=f"model_args.{name}=7 contradicts"):
        run_import(checkpoint, tmp_path / "e")
    assert not (tmp_path / "e").exists()


def test_heads_that_the_checkpoint_does_not_tell(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "ckpt.pt", n_heads_in_split=None)
    with pytest.raises(CheckpointError, match="give heads_per_sub_layer=NUMBER"):
        run_import(checkpoint, tmp_path / "e")
    run_import(checkpoint, tmp_path / "e", heads=3)
    description = json.loads((tmp_path / "e" / "config.json").read_text())
    assert description["heads_per_sub_layer"] == 3


class Payload:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_code_in_the_file_is_not_run(tmp_path: Path) -> None:
    sign = tmp_path / "was run"
    torch.save({"model": {}, "model_args": {}, "config": Payload(sign)}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Payload(sign)))
    torch.save({"model": Payload(sign)}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="nothing in it was run"):
        run_import(tmp_path / "zip.pt", tmp_path / "e")
    for name in ("plain.pt", "legacy.pt"):
        with pytest.raises(CheckpointError, match=r"not a checkpoint written by torch.save"):
            run_import(tmp_path / name, tmp_path / "e")
    assert not sign.exists()


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    message = user_error(run_here("checkpoints.import_reference", "checkpoint=no.pt", f"output_dir={tmp_path}/e"))
    assert message == "checkpoint=no.pt does not exist; name a file"
    content = write_checkpoint(tmp_path / "ckpt.pt").read_bytes()
    for name, damaged in {"empty": b"", "cut": content[:-1000], "text": b"hello"}.items():
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"not a checkpoint written by torch.save"):
            run_import(tmp_path / name, tmp_path / "e")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="no weights under `model`"):
        run_import(tmp_path / "list.pt", tmp_path / "e")
