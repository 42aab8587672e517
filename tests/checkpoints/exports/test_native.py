"""Llama and Qwen3 of transformers: their folders become exports, and exports become their folders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import MODERN, random_ids, rough_model, run_here, save_tokenizer, small_tokenizer, user_error
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from checkpoints.exports.folder import read_export, write_export
from checkpoints.exports.native import require_native, to_native
from kraken_train.common.errors import CheckpointError
from kraken_train.model.config import GPTConfig, KrakenConfig, ModelConfig
from kraken_train.model.language_model import LanguageModel

COMMON: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 40, "max_position_embeddings": 24,
    "rms_norm_eps": 1e-4,
}  # fmt: skip
THEIRS = {
    "llama": LlamaConfig(num_attention_heads=4, **COMMON),
    "llama-gqa-tied": LlamaConfig(
        num_attention_heads=4, num_key_value_heads=2, head_dim=6, tie_word_embeddings=True, **COMMON
    ),
    "llama-theta": LlamaConfig(
        num_attention_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 300.0}, **COMMON
    ),
    "qwen3": Qwen3Config(num_attention_heads=5, num_key_value_heads=5, head_dim=10, **COMMON),
    "qwen3-gqa-tied": Qwen3Config(
        num_attention_heads=4, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True, **COMMON
    ),
}
STANDARD = {name: value for name, value in MODERN.items() if name != "qk_norm"}
OURS: dict[str, ModelConfig] = {
    "llama": GPTConfig(2, 32, 4, 96, 24, **STANDARD),
    "llama-untied-mqa": GPTConfig(2, 32, 4, 96, 24, num_kv_heads=1, tie_embeddings=False, **STANDARD),
    "qwen3-gqa": GPTConfig(3, 20, 6, 96, 24, num_kv_heads=3, head_dim=8, ffn_hidden_size=30, **MODERN),
    "qwen3-untied": GPTConfig(2, 32, 4, 96, 24, tie_embeddings=False, **MODERN),
}


@pytest.fixture(autouse=True)
def norms_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of transformers compute in float32 always, which would hide differences of 1e-8."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
    monkeypatch.setattr(Qwen3RMSNorm, "forward", forward)


def make_rough(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = 1 + 0.2 * noise if "norm" in name else 0.25 * noise


def assert_equal(ours: LanguageModel, theirs: nn.Module) -> None:
    """Logits, loss and all gradients, in fp64."""
    config = ours.config
    assert isinstance(config, GPTConfig)
    ids = random_ids(config, 2, 20)
    ours.train().requires_grad_()
    logits = theirs(ids).logits
    torch.testing.assert_close(ours(ids), logits, rtol=0, atol=1e-11)
    loss = ours.loss(ids[:, :-1], ids[:, 1:])
    their_loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-12)
    assert loss.item() == pytest.approx(theirs(ids, labels=ids).loss.item(), rel=1e-5)  # which they compute in float32
    loss.backward()
    their_loss.backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.grad is not None}
    renamed = to_native(config, gradients)
    expected = dict(theirs.named_parameters())
    assert renamed.keys() == expected.keys()
    for name, gradient in renamed.items():
        torch.testing.assert_close(gradient, expected[name].grad, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("name", THEIRS)
def test_theirs_are_imported(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(THEIRS[name], dtype=torch.float64)
    make_rough(model)
    model.tie_weights()
    model.to(torch.float32).save_pretrained(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match="of transformers; make an export of it with"):
        read_export(tmp_path / "theirs")
    result = run_here(
        "checkpoints.import_transformers", f"model_dir={tmp_path / 'theirs'}", f"output_dir={tmp_path / 'e'}"
    )
    assert result.returncode == 0, result.stderr
    assert_equal(read_export(tmp_path / "e").load_model(torch.float64), model.double())


@pytest.mark.parametrize("name", OURS)
def test_ours_become_theirs(name: str, tmp_path: Path) -> None:
    config = OURS[name]
    model = rough_model(config, torch.float32)
    write_export(
        tmp_path / "n", config, model.state_dict(), tokenizer_dir=None, metadata={}, dtype=torch.float32, native=True
    )
    description = json.loads((tmp_path / "n" / "config.json").read_text())
    assert description["model_type"] == ("qwen3" if config.qk_norm else "llama")
    assert "auto_map" not in description
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "n", dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert_equal(model.double(), theirs.double())
    # And back: the same model, once what a null stands for is written out.
    result = run_here("checkpoints.import_transformers", f"model_dir={tmp_path / 'n'}", f"output_dir={tmp_path / 'e'}")
    assert result.returncode == 0, result.stderr
    back = read_export(tmp_path / "e").config
    assert back == replace(config, ffn_hidden_size=config.ffn_size, num_kv_heads=config.kv_heads)


def test_tokenizer_travels(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    config = replace(OURS["llama"], vocab_size=384)  # type: ignore[type-var]
    weights = rough_model(config, torch.float32).state_dict()
    folder = save_tokenizer(tokenizer, tmp_path / "tokenizer")
    write_export(
        tmp_path / "n", config, weights, tokenizer_dir=folder, metadata={"step": 3}, dtype=torch.bfloat16, native=True
    )
    description = json.loads((tmp_path / "n" / "config.json").read_text())
    assert description["eos_token_id"] == description["bos_token_id"] == tokenizer.end_of_document
    text = "The river bends."
    loaded = AutoTokenizer.from_pretrained(tmp_path / "n")
    (expected,) = tokenizer.encode_batch([text])
    assert loaded.encode(text, add_special_tokens=False) == list(expected)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "n", dtype=torch.float32)
    ids = torch.tensor([expected])
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (KrakenConfig(2, 2, 32, 2, 96, 24, **MODERN), "model.architecture=kraken; use format=kraken"),
        (replace(OURS["llama"], norm="layernorm"), "model.norm=rmsnorm, and this model has model.norm=layernorm"),  # type: ignore[type-var]
        (GPTConfig(2, 32, 4, 96, 24), "model.norm=rmsnorm"),
        (GPTConfig(2, 20, 6, 96, 24, head_dim=8, ffn_hidden_size=30, **STANDARD), "Llama has no model.hidden_size=20"),
    ],
)
def test_others_are_refused(config: ModelConfig, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        require_native(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "has hidden_act=gelu, and models of this program have silu only"),
        ({"attention_bias": True}, "has attention_bias=True"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "has rope_type=llama3"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "has rope_type=yarn"),
        ({"use_sliding_window": True}, "has use_sliding_window=True"),
        ({"num_hidden_layers": 4}, "lacks the weight model.layers.2."),
        ({"num_attention_heads": None}, "does not describe a model"),
        ({"num_key_value_heads": 3}, "does not describe a model: model.num_kv_heads=3 does not divide"),
        ({"head_dim": 7, "num_key_value_heads": 1}, "does not describe a model: model.head_dim=7 makes"),
        ({"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "intermediate_size": 90}, "other shapes"),
        ({"rope_scaling": "yarn"}, "rope_parameters and rope_scaling must be mappings"),
    ],
)
def test_what_cannot_be_imported(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = OURS["llama"]
    weights = rough_model(config, torch.float32).state_dict()
    write_export(tmp_path / "n", config, weights, tokenizer_dir=None, metadata={}, dtype=torch.float32, native=True)
    path = tmp_path / "n" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    result = run_here("checkpoints.import_transformers", f"model_dir={tmp_path / 'n'}", f"output_dir={tmp_path / 'e'}")
    assert message in user_error(result)
    assert not (tmp_path / "e").exists()


def test_unknown_weights_are_refused(tmp_path: Path) -> None:
    """As the biases of another model: without them it would compute something else."""
    config = OURS["llama"]
    weights = rough_model(config, torch.float32).state_dict()
    write_export(tmp_path / "n", config, weights, tokenizer_dir=None, metadata={}, dtype=torch.float32, native=True)
    path, name = tmp_path / "n" / "model.safetensors", "model.layers.0.self_attn.q_proj.bias"
    save_file({**load_file(path), name: torch.zeros(32)}, path)
    result = run_here("checkpoints.import_transformers", f"model_dir={tmp_path / 'n'}", f"output_dir={tmp_path / 'e'}")
    assert f"has the weight {name}, which models of this program do not have" in user_error(result)
