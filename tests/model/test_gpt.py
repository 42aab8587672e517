"""The two baselines against transformers' GPT-2 with zero biases, and against a plain loop."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import random_ids, rough_model, small_configs, split_qkv
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from kraken_train.model.config import GPTConfig, KrakenConfig, ModelConfig


def test_standard_form_is_gpt2() -> None:
    config = small_configs()["standard"]
    assert isinstance(config, GPTConfig)
    model = rough_model(config)
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.context_length,
            n_embd=config.hidden_size,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            attn_implementation="eager",
        )
    ).double()
    ours = model.state_dict()
    renamed = {
        "transformer.wte.weight": ours["token_embedding.weight"],
        "transformer.wpe.weight": ours["position_embedding.weight"],
        "transformer.ln_f.weight": ours["final_norm.weight"],
        "lm_head.weight": ours["token_embedding.weight"],
    }
    for layer in range(config.num_layers):
        mine, their = f"layers.{layer}", f"transformer.h.{layer}"
        renamed[f"{their}.ln_1.weight"] = ours[f"{mine}.attention_norm.weight"]
        renamed[f"{their}.ln_2.weight"] = ours[f"{mine}.ffn_norm.weight"]
        # Their Conv1D holds (in, out).
        qkv = split_qkv(ours[f"{mine}.attention.qkv.weight"], config.head_size)
        renamed[f"{their}.attn.c_attn.weight"] = torch.cat(qkv).T
        renamed[f"{their}.attn.c_proj.weight"] = ours[f"{mine}.attention.out.weight"].T
        renamed[f"{their}.mlp.c_fc.weight"] = ours[f"{mine}.ffn.up.weight"].T
        renamed[f"{their}.mlp.c_proj.weight"] = ours[f"{mine}.ffn.down.weight"].T
    missing, unexpected = theirs.load_state_dict(renamed, strict=False)
    assert not unexpected
    assert all(name.endswith(".bias") for name in missing)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()

    input_ids, targets = random_ids(config, 2, 12), random_ids(config, 2, 12, seed=1)
    expected = theirs(input_ids).logits
    torch.testing.assert_close(model(input_ids), expected, rtol=0, atol=1e-11)
    model.loss(input_ids, targets).backward()
    F.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()
    for name, parameter in theirs.named_parameters():
        if name.endswith("c_fc.weight"):
            layer = name.split(".")[2]
            mine = model.get_parameter(f"layers.{layer}.ffn.up.weight")
            torch.testing.assert_close(mine.grad, parameter.grad.T, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(model.token_embedding.weight.grad, theirs.lm_head.weight.grad, rtol=1e-9, atol=1e-12)


def test_parallel_form_by_hand() -> None:
    config = small_configs()["parallel"]
    assert isinstance(config, GPTConfig)
    model, ids = rough_model(config), random_ids(config, 2, 10)
    weights = model.state_dict()
    d = config.hidden_size
    mask = torch.full((10, 10), -torch.inf, dtype=torch.float64).triu(1)
    x = weights["token_embedding.weight"][ids] + weights["position_embedding.weight"][:10]
    for layer in range(config.num_layers):
        prefix = f"layers.{layer}"
        h = F.layer_norm(x, (d,), weights[f"{prefix}.norm.weight"])

        def heads(i: int, h: Tensor = h, prefix: str = prefix) -> Tensor:
            part = h @ split_qkv(weights[f"{prefix}.attention.qkv.weight"], config.head_size)[i].T
            return part.view(2, 10, config.num_heads, -1).transpose(1, 2)

        scores = heads(0) @ heads(1).transpose(-1, -2) / config.head_size**0.5 + mask
        mixed = (scores.softmax(-1) @ heads(2)).transpose(1, 2).reshape(2, 10, d)
        attended = mixed @ weights[f"{prefix}.attention.out.weight"].T
        up = F.gelu(h @ weights[f"{prefix}.ffn.up.weight"].T, approximate="tanh")
        x = x + attended + up @ weights[f"{prefix}.ffn.down.weight"].T
    expected = F.layer_norm(x, (d,), weights["final_norm.weight"]) @ weights["token_embedding.weight"].T
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["kraken-gqa", "kraken-mqa", "standard-gqa", "parallel-mqa"])
def test_shared_key_value_heads_are_repeated_ones(name: str) -> None:
    """Grouped-query attention is ordinary attention whose keys and values are the same for the heads of a group."""
    config = small_configs()[name]
    model, ids = rough_model(config), random_ids(config, 2, 12)
    whole = {"kv_heads_per_sub_layer": None} if isinstance(config, KrakenConfig) else {"num_kv_heads": None}
    twin = rough_model(dataclasses.replace(config, **whole))
    twin.load_state_dict({key: repeat_kv_heads(config, key, weight) for key, weight in model.state_dict().items()})
    torch.testing.assert_close(model(ids), twin(ids), rtol=0, atol=1e-11)


def repeat_kv_heads(config: ModelConfig, name: str, weight: Tensor) -> Tensor:
    if not name.endswith("qkv.weight"):
        return weight
    if isinstance(config, KrakenConfig):
        repeats = config.heads_per_sub_layer // config.kv_heads
        parts = weight.split((config.hidden_size, config.kv_size, config.kv_size), dim=1)
        query, key, value = (part.unflatten(1, (-1, config.head_size)) for part in parts)
        repeated = (query, key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1))
        return torch.cat(repeated, dim=1).flatten(1, 2)
    repeats = config.num_heads // config.kv_heads
    query, key, value = (part.unflatten(0, (-1, config.head_size)) for part in split_qkv(weight, config.head_size))
    by_head = (query, key.repeat_interleave(repeats, dim=0), value.repeat_interleave(repeats, dim=0))
    return torch.cat(by_head, dim=1)
