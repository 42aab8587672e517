"""Exports in transformers, in a process that cannot import any of our packages, against our model; and the way back."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from golden import Golden
from helpers import MODERN, TEXTS, random_ids, rough_model, run_here, user_error
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor

from checkpoints.exports import folder as export_folder
from checkpoints.exports import modeling_kraken
from checkpoints.exports.folder import read_export, write_export
from checkpoints.exports.transformers_tokenizer import HARD_TEXTS
from checkpoints.import_transformers import find_tokenizer
from data_prep.tokenizers import HuggingFaceTokenizer, load_tokenizer
from kraken_train.common.errors import CheckpointError
from kraken_train.inference.engine import InferenceEngine
from kraken_train.inference.generation import continue_prompts
from kraken_train.inference.sampling import Sampling
from kraken_train.model.config import GPTConfig, KrakenConfig, ModelConfig
from kraken_train.model.fal_config import FALConfig
from kraken_train.model.ladder_config import LadderConfig
from kraken_train.model.language_model import LanguageModel
from kraken_train.model.registry import build_model
from kraken_train.model.track_config import TrackConfig

COMMON = {"num_layers": 2, "context_length": 24, "vocab_size": 96}
CONFIGS: dict[str, ModelConfig] = {
    **{
        f"kraken-{n}-{kv}": KrakenConfig(n, hidden_size=16, heads_per_sub_layer=4, kv_heads_per_sub_layer=kv, **COMMON)
        for n in (2, 4, 6)
        for kv in (None, 2, 1)
    },
    **{
        f"{form}-{kv}": GPTConfig(hidden_size=24, num_heads=6, architecture=form, num_kv_heads=kv, **COMMON)
        for form in ("standard", "parallel")
        for kv in (None, 3, 1)
    },
    "kraken-stream": KrakenConfig(3, hidden_size=16, heads_per_sub_layer=4, ffn_reads_stream=True, **COMMON, **MODERN),
    "kraken-wide": KrakenConfig(4, hidden_size=16, heads_per_sub_layer=2, embedding_size=24, **COMMON),
    "kraken-wide-untied": KrakenConfig(
        2, hidden_size=16, heads_per_sub_layer=4, embedding_size=20, tie_embeddings=False, **COMMON, **MODERN
    ),
    "ladder": LadderConfig(hidden_size=24, num_heads=6, **COMMON),
    "fal": FALConfig(hidden_size=24, num_heads=6, **COMMON),
    "fal-modern": FALConfig(hidden_size=24, num_heads=6, num_kv_heads=3, **COMMON, **MODERN),
    "track": TrackConfig(4, hidden_size=16, heads_per_track=4, kv_heads_per_track=2, sync_every=1, **COMMON),
    "track-modern": TrackConfig(2, hidden_size=16, heads_per_track=4, sync_every=4, **COMMON, **MODERN),
    "ladder-hybrid": LadderConfig(hidden_size=24, num_heads=6, num_kv_heads=3, ladder_layers=1, **COMMON, **MODERN),
}
WITH_TOKENIZER = {"kraken-4-2": 320, "standard-3": 384}  # vocabulary; the second has rows that are no tokens
LIMITS = {"loss": 1e-5, "gradients": 1e-5, "gradient checkpointing": 1e-9, "bf16": 0.02}


def limit(check: str) -> float:
    return LIMITS.get(check, 1e-5 if check.startswith("fp32") else 1e-11)


def fine_model(config: ModelConfig) -> LanguageModel:
    """All of its parts matter; its weights are what an fp32 export holds."""
    return rough_model(config, torch.float32).double()


def write_case(folder: Path, model: LanguageModel, ids: Tensor, tokenizer_dir: Path | None) -> None:
    folder.mkdir()
    loss = model.loss(ids[:, :-1], ids[:, 1:].contiguous())
    loss.backward()
    words = load_tokenizer(tokenizer_dir).vocab_size if tokenizer_dir is not None else None
    prompts = ids[:, :5].tolist()
    engine = InferenceEngine(model, len(prompts), capacity=11)
    greedy = continue_prompts(engine, prompts, 6, Sampling(temperature=0), vocab_size=words)
    expected = {
        "ids": ids,
        "logits": model(ids).detach(),
        "loss": loss.detach(),
        "greedy": torch.tensor(greedy),
        **{f"gradient/{name}": p.grad for name, p in model.named_parameters() if p.grad is not None},
    }
    save_file(expected, folder / "expected.safetensors")
    weights = {name: tensor.float() for name, tensor in model.state_dict().items()}
    note = write_export(
        folder / "e", model.config, weights, tokenizer_dir=tokenizer_dir, metadata={"step": 7}, dtype=torch.float32
    )
    assert note is None
    if tokenizer_dir is not None:
        write_tokens(folder, tokenizer_dir)


def write_tokens(folder: Path, tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    texts = [*TEXTS, *HARD_TEXTS]
    ids = [list(map(int, encoded)) for encoded in tokenizer.encode_batch(texts)]
    content = {"texts": list(zip(texts, ids, strict=True)), "end": tokenizer.end_of_document}
    (folder / "tokens.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """An export for each configuration, and what transformers is to make of it."""
    folder = tmp_path_factory.mktemp("exports (a, b)")
    for name, small in CONFIGS.items():
        own = tokenizer_dir if name in WITH_TOKENIZER else None
        config = dataclasses.replace(small, vocab_size=WITH_TOKENIZER.get(name, small.vocab_size))
        write_case(folder / name, fine_model(config), random_ids(config, 2, 20), own)
    golden = Golden()
    write_case(folder / "golden", golden.model(), golden.input_ids, None)
    expected = load_file(folder / "golden" / "expected.safetensors")
    save_file({**expected, "logits": golden.logits}, folder / "golden" / "expected.safetensors")
    return folder


@pytest.fixture(scope="module")
def found(cases: Path) -> dict[str, dict[str, float]]:
    """The largest differences, as tests/checkpoints/exports/without_our_packages.py has seen them."""
    script = Path(__file__).with_name("without_our_packages.py")
    environment = {**os.environ, "HF_HOME": str(cases / "home"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-I", str(script), str(cases)]
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=cases, stdin=subprocess.DEVNULL, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return dict(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize("name", [*CONFIGS, "golden"])
def test_equal(name: str, found: dict[str, dict[str, float]]) -> None:
    assert len(found[name]) == (53 if name in WITH_TOKENIZER else 24), [*found[name]]
    wrong = {check: value for check, value in found[name].items() if not value <= limit(check)}
    assert not wrong


# ---------------------------------------------------------------------------------------------------------------
# Back again
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_TOKENIZER)
def test_what_transformers_has_saved_is_imported(
    name: str, cases: Path, found: dict[str, dict[str, float]], tmp_path: Path
) -> None:
    """In several files and float64; without a tokenizer there, and with one given."""
    with pytest.raises(CheckpointError, match="was saved by transformers; make an export of it"):
        read_export(cases / name / "saved")
    arguments = ["checkpoints.import_transformers", f"model_dir={cases / name / 'saved'}"]
    result = run_here(*arguments, f"output_dir={tmp_path / 'e'}")
    assert result.returncode == 0, result.stderr
    assert "has no tokenizer, so the export has none" in result.stdout
    before, after = read_export(cases / name / "e"), read_export(tmp_path / "e")
    assert (after.config, after.training) == (before.config, before.training)
    ids = load_file(cases / name / "expected.safetensors")["ids"]
    assert torch.equal(after.load_model()(ids), before.load_model()(ids))
    own = cases / name / "e" / "tokenizer"
    result = run_here(*arguments, f"output_dir={tmp_path / 't'}", f"tokenizer_dir={own}", "dtype=bf16")
    assert result.returncode == 0, result.stderr
    assert read_export(tmp_path / "t").dtype == torch.bfloat16
    assert read_export(tmp_path / "t").load_tokenizer().vocab_size == 320


def test_a_tokenizer_that_transformers_has_saved(cases: Path, tmp_path: Path) -> None:
    source = shutil.copytree(cases / "kraken-4-2" / "e", tmp_path / "source")
    shutil.rmtree(source / "tokenizer")
    result = run_here("checkpoints.import_transformers", f"model_dir={source}", f"output_dir={tmp_path / 'e'}")
    assert result.returncode == 0, result.stderr
    tokenizer = read_export(tmp_path / "e").load_tokenizer()
    before = load_tokenizer(cases / "kraken-4-2" / "e" / "tokenizer")
    assert (tokenizer.kind, tokenizer.end_of_document) == ("huggingface", before.end_of_document)
    assert [list(ids) for ids in tokenizer.encode_batch(TEXTS)] == before.encode_batch(TEXTS)


def test_what_cannot_be_imported(cases: Path, tmp_path: Path) -> None:
    def refused(**changes: object) -> str:
        """The error for a copy whose config.json has these changes."""
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        shutil.copytree(cases / "kraken-2-1" / "e", tmp_path / "m")
        path = tmp_path / "m" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return attempt()

    def attempt() -> str:
        arguments = (f"model_dir={tmp_path / 'm'}", f"output_dir={tmp_path / 'e'}")
        message = user_error(run_here("checkpoints.import_transformers", *arguments))
        assert not (tmp_path / "e").exists()
        return message

    assert "m is not a folder" in attempt()
    assert "format_version=6, and this program knows up to 5" in refused(format_version=6)
    assert "model_type is not kraken" in refused(model_type="gpt2")
    assert "architecture=rwkv; known: kraken, standard, parallel" in refused(architecture="rwkv")
    assert "lacks the weight layers.2" in refused(num_layers=3)
    assert "has layers.0.ffn.up.weight of shape" in refused(ffn_multiplier=3)
    weights = load_file(tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "config.json").write_text((cases / "kraken-2-1" / "e" / "config.json").read_text())
    head = weights["token_embedding.weight"]
    save_file({**weights, "lm_head.weight": head + 1}, tmp_path / "m" / "model.safetensors")
    assert "lm_head.weight and token_embedding.weight" in attempt()
    (tmp_path / "m" / "model.safetensors").write_bytes(b"cut off")
    assert "is truncated or not a safetensors file" in attempt()
    (tmp_path / "m" / "model.safetensors").unlink()
    assert "model.safetensors is missing" in attempt()
    index = {"weight_map": {"final_norm.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00002.safetensors is missing" in attempt()
    index["weight_map"]["final_norm.weight"] = "../../elsewhere.safetensors"
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "which is not a file in the same folder" in attempt()
    (tmp_path / "m" / "model.safetensors.index.json").unlink()
    (tmp_path / "m" / "adapter_model.safetensors").touch()
    assert "holds an adapter" in attempt()


def test_a_head_that_is_the_embedding_is_no_weight(cases: Path, tmp_path: Path) -> None:
    source = shutil.copytree(cases / "kraken-2-1" / "e", tmp_path / "m")
    weights = load_file(source / "model.safetensors")
    save_file({**weights, "lm_head.weight": weights["token_embedding.weight"].clone()}, source / "model.safetensors")
    result = run_here("checkpoints.import_transformers", f"model_dir={source}", f"output_dir={tmp_path / 'e'}")
    assert result.returncode == 0, result.stderr
    assert {*load_file(tmp_path / "e" / "model.safetensors")} == {*weights}


@pytest.mark.parametrize("name", ["kraken-wide", "kraken-stream", "standard-3", "track"])
def test_a_new_model_begins_as_ours(name: str) -> None:
    """Standard deviations of the initial weights; each is of hundreds of values or more."""
    config = CONFIGS[name].replace(vocab_size=512, context_length=128, num_layers=1)
    theirs = modeling_kraken.KrakenForCausalLM(modeling_kraken.KrakenConfig(**dataclasses.asdict(config)))
    weights = theirs.state_dict()
    for key, ours in build_model(config).state_dict().items():
        assert weights[key].std().item() == pytest.approx(ours.std().item(), rel=0.15, abs=1e-6), key


def test_the_file_that_travels_is_of_this_format() -> None:
    assert modeling_kraken.FORMAT_VERSION == export_folder.FORMAT_VERSION
    imports = [line.split()[1] for line in export_folder.MODELING_FILE.read_text().splitlines()
               if line.startswith(("import ", "from "))]  # fmt: skip
    others = {name.partition(".")[0] for name in imports} - sys.stdlib_module_names
    assert others <= {"torch", "transformers"}


def test_no_room_for_a_temporary_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Tokenizer(models.WordLevel({"a": 0, "<eos>": 1}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    save = HuggingFaceTokenizer.save

    def full(self: HuggingFaceTokenizer, folder: Path) -> None:
        save(self, folder)
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(HuggingFaceTokenizer, "save", full)
    with ExitStack() as held, pytest.raises(CheckpointError, match=r"temporary folder \(.*No space left.*set TMPDIR"):
        find_tokenizer(None, tmp_path, held)
