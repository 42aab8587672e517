"""Every setting of a layer with every other, for all architectures, by pairwise covering combinations.

The oracle is written out below: one stream, head and formula at a time, rotary positions as complex numbers.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import random_ids, rough_model, split_qkv
from pairwise import pairwise
from thread_ranks import compare_two_ranks
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache

from checkpoints.exports import modeling_kraken
from kraken_train.common.errors import ConfigError
from kraken_train.common.settings import to_dict
from kraken_train.inference.engine import InferenceEngine
from kraken_train.model.config import GPTConfig, KrakenConfig, ModelConfig, parse_model
from kraken_train.model.flops import attention_flops_per_token, matrix_flops_per_token
from kraken_train.model.layer_settings import FFNS, NORMS, POSITIONS
from kraken_train.model.registry import build_model

SETTINGS: dict[str, tuple[Any, ...]] = {
    "architecture": ("kraken", "standard", "parallel"),  # others are in test_rivals.py
    "norm": NORMS,
    "ffn": FFNS,
    "positions": POSITIONS,
    "qk_norm": (False, True),
    "tie_embeddings": (True, False),
    "head_dim": (None, 6, 10),
    "ffn_hidden_size": (None, 20),
    "kv_heads": (None, 2),
    "rope_theta": (10000.0, 30.0),
}
CASES = pairwise(SETTINGS)


def small_model(case: dict[str, Any]) -> ModelConfig:
    layers = {name: value for name, value in case.items() if name not in ("architecture", "kv_heads")}
    common = {"num_layers": 2, "hidden_size": 32, "vocab_size": 40, "context_length": 24, **layers}
    if case["architecture"] == "kraken":
        return KrakenConfig(num_sub_layers=2, heads_per_sub_layer=4, kv_heads_per_sub_layer=case["kv_heads"], **common)
    return GPTConfig(num_heads=4, num_kv_heads=case["kv_heads"], architecture=case["architecture"], **common)


MODELS = [small_model(case) for case in CASES]
every_combination = pytest.mark.parametrize("config", MODELS, ids=range(len(MODELS)))


def test_pairs_are_covered() -> None:
    for a, b in itertools.combinations(SETTINGS, 2):
        found = {(case[a], case[b]) for case in CASES}
        assert found == set(itertools.product(SETTINGS[a], SETTINGS[b]))
    assert len(CASES) < 20  # of 2304


def normed(config: ModelConfig, x: Tensor, gain: Tensor, norm: str | None = None) -> Tensor:
    if (norm or config.norm) == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + config.norm_epsilon).sqrt() * gain


def rotated(config: ModelConfig, x: Tensor) -> Tensor:
    """(B, T, K); value pairs (j, j + K/2) are real and imaginary parts. Angles in float32, as in Llama."""
    half = x.shape[-1] // 2
    frequencies = 1 / config.rope_theta ** (torch.arange(half, dtype=torch.float32) * 2 / x.shape[-1])
    angles = torch.arange(x.shape[1], dtype=torch.float32)[:, None] * frequencies
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(angles.cos().double(), angles.sin().double())
    return torch.cat((turned.real, turned.imag), dim=-1)


def attention(config: ModelConfig, x: Tensor, qkv: list[Tensor], gains: list[Tensor] | None, out: Tensor) -> Tensor:
    """(B, T, D) -> (B, T, D); `qkv` are the weights of queries, keys and values."""
    size, tokens = config.head_size, x.shape[1]
    query, key, value = (x @ weight.T for weight in qkv)
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    heads = []
    for head in range(config.heads):
        shared = head * config.kv_heads // config.heads
        q = query[..., head * size : (head + 1) * size]
        k, v = (part[..., shared * size : (shared + 1) * size] for part in (key, value))
        if gains is not None:
            q, k = (normed(config, part, gain, "rmsnorm") for part, gain in zip((q, k), gains, strict=True))
        if config.positions == "rope":
            q, k = rotated(config, q), rotated(config, k)
        scores = (q @ k.transpose(1, 2) / size**0.5).masked_fill(~mask, -torch.inf)
        heads.append(scores.softmax(-1) @ v)
    return torch.cat(heads, -1) @ out.T


def ffn(config: ModelConfig, x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor) -> Tensor:
    if gate is None:
        return F.gelu(x @ up.T, approximate="tanh") @ down.T
    gated = x @ gate.T
    return gated * torch.sigmoid(gated) * (x @ up.T) @ down.T


def logits_by_hand(weights: dict[str, Tensor], config: ModelConfig, ids: Tensor) -> Tensor:
    x = weights["token_embedding.weight"][ids]
    if config.positions == "learned":
        x = x + weights["position_embedding.weight"][: ids.shape[1]]
    y = kraken_by_hand(weights, config, x) if config.architecture == "kraken" else gpt_by_hand(weights, config, x)
    head = weights["token_embedding.weight" if config.tie_embeddings else "lm_head.weight"]
    return normed(config, y, weights["final_norm.weight"]) @ head.T


def kraken_by_hand(weights: dict[str, Tensor], config: ModelConfig, embedding: Tensor) -> Tensor:
    streams = [embedding] * config.num_streams
    for layer in range(config.num_layers):
        prefix = f"layers.{layer}."
        of_layer = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        total = embedding if layer == 0 else sum(streams)
        new = []
        for i, x in enumerate(streams):
            own = {name.removesuffix(".weight"): weight[i] for name, weight in of_layer.items()}
            sizes = (config.query_size, config.kv_size, config.kv_size)
            gains = [own["attention.q_norm"], own["attention.k_norm"]] if config.qk_norm else None
            h = normed(config, x, own["attention.norm"])
            a = attention(config, h, list(own["attention.qkv"].split(sizes)), gains, own["attention.out"])
            h = normed(config, a + total, own["ffn.norm"])
            new.append(x + a + ffn(config, h, own.get("ffn.gate"), own["ffn.up"], own["ffn.down"]))
        streams = new
    return sum(x @ w.T for x, w in zip(streams, weights["conjunction.weight"], strict=True))  # type: ignore[return-value]


def gpt_by_hand(weights: dict[str, Tensor], config: ModelConfig, x: Tensor) -> Tensor:
    for layer in range(config.num_layers):
        prefix = f"layers.{layer}."
        own = {n.removeprefix(prefix).removesuffix(".weight"): w for n, w in weights.items() if n.startswith(prefix)}
        qkv = split_qkv(own["attention.qkv"], config.head_size)
        gains = [own["attention.q_norm"], own["attention.k_norm"]] if config.qk_norm else None
        inner = (own.get("ffn.gate"), own["ffn.up"], own["ffn.down"])
        if config.architecture == "parallel":
            h = normed(config, x, own["norm"])
            x = x + attention(config, h, qkv, gains, own["attention.out"]) + ffn(config, h, *inner)
        else:
            x = x + attention(config, normed(config, x, own["attention_norm"]), qkv, gains, own["attention.out"])
            x = x + ffn(config, normed(config, x, own["ffn_norm"]), *inner)
    return x


@every_combination
def test_by_hand(config: ModelConfig) -> None:
    """Logits and gradients, and what the configuration declares."""
    model, ids, targets = rough_model(config), random_ids(config, 2, 11), random_ids(config, 2, 11, seed=1)
    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    expected = logits_by_hand(weights, config, ids)
    scale = expected.abs().max().item()
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-12 * scale)
    F.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()
    model.loss(ids, targets).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-8, atol=1e-11, msg=name)
    assert config.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert parse_model(to_dict(config)) == config


@every_combination
def test_two_ranks_are_one_process(config: ModelConfig) -> None:
    error, _ = compare_two_ranks(config)
    assert error < 1e-10


@every_combination
def test_engine_is_the_model(config: ModelConfig) -> None:
    """Prompts of several lengths, padded, and token by token after them."""
    model, ids = rough_model(config), random_ids(config, 3, 20)
    expected = model(ids).detach()
    engine, lengths = InferenceEngine(model, batch_size=3, capacity=20), [5, 1, 9]
    found = [engine.prefill(ids[:, :12], torch.tensor(lengths))]
    for step in range(8):
        found.append(engine.decode(ids[range(3), [length + step for length in lengths]]))
    for step, logits in enumerate(found):
        wanted = expected[range(3), [length - 1 + step for length in lengths]]
        torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-11 * expected.abs().max().item())


@every_combination
def test_transformers_is_the_model(config: ModelConfig) -> None:
    """Loss and gradients; logits whole, padded on the left, and in pieces with a cache."""
    model, ids = rough_model(config), random_ids(config, 2, 14)
    model.train()
    theirs = modeling_kraken.KrakenForCausalLM(modeling_kraken.KrakenConfig(**to_dict(config))).double()
    missing = theirs.load_state_dict(model.state_dict(), strict=False)
    assert missing.missing_keys == (["lm_head.weight"] if config.tie_embeddings else [])
    theirs.tie_weights()
    tolerance = 1e-11 * model(ids).abs().max().item()
    output = theirs(ids)
    torch.testing.assert_close(output.logits, model(ids), rtol=0, atol=tolerance)
    cache, logits = DynamicCache(config=theirs.config), []
    for piece in ids.split((6, 1, 5, 2), dim=1):
        logits.append(theirs(piece, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(logits, 1), model(ids), rtol=0, atol=tolerance)
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.int64), ids), dim=1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    torch.testing.assert_close(theirs(padded, attention_mask=mask).logits[:, 3:], model(ids), rtol=0, atol=tolerance)
    F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    named = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(named[name].grad, parameter.grad, rtol=1e-8, atol=1e-11, msg=name)


# ---------------------------------------------------------------------------------------------------------------
# Values that cannot be
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "rms"}, r"model.norm=rms is not known; use layernorm or rmsnorm .did you mean rmsnorm"),
        ({"ffn": "geglu"}, r"model.ffn=geglu is not known; use gelu or swiglu"),
        ({"positions": "alibi"}, r"model.positions=alibi is not known; use learned or rope"),
        ({"head_dim": 0}, r"model.head_dim=0 must be greater than 0"),
        ({"ffn_hidden_size": -64}, r"model.ffn_hidden_size=-64 must be greater than 0"),
        ({"rope_theta": 0.0}, r"model.rope_theta=0.0 must be greater than 0"),
        (
            {"positions": "rope", "head_dim": 7},
            r"model.head_dim=7 makes attention heads of width 7, and model.positions=rope rotates pairs of values, so "
            r"the width must be even; use model.head_dim=8 or model.positions=learned",
        ),
        (
            {"positions": "rope", "num_heads": 8, "hidden_size": 40},
            r"model.hidden_size=40 with model.num_heads=8 makes attention heads of width 5.* use model.head_dim=6 or",
        ),
        (
            {"ffn": "swiglu", "ffn_hidden_size": 90},
            r"model.ffn_hidden_size=90 is not a multiple of model.num_heads=4, and .* use 88 or 92",
        ),
        ({"hidden_size": 30}, r"model.num_heads=4 does not divide model.hidden_size=30"),
    ],
)
def test_values_that_are_refused(changes: dict[str, Any], message: str) -> None:
    config = GPTConfig(2, 32, 4, 40, 24)
    with pytest.raises(ConfigError, match=message):
        parse_model({**to_dict(config), **changes})


def test_widths_that_are_derived() -> None:
    """A SwiGLU has as many parameters as the GELU FFN that it replaces, up to rounding to 64."""
    for config in (
        KrakenConfig(4, 2, 576, 3, 64, 8, head_dim=64, ffn="swiglu"),
        GPTConfig(2, 768, 12, 64, 8, ffn="swiglu"),
        GPTConfig(2, 1024, 16, 64, 8, ffn="swiglu"),
    ):
        width = config.ffn_multiplier * config.hidden_size
        assert config.ffn_size % 64 == 0
        assert config.ffn_size % config.heads == 0 or config.architecture == "kraken"
        assert abs(3 * config.ffn_size - 2 * width) / (2 * width) < 0.05
    assert GPTConfig(2, 1024, 16, 64, 8, ffn="swiglu").ffn_size == 2752  # 43 * 64, the multiple nearest to 2730.7


@every_combination
def test_flops(config: ModelConfig) -> None:
    assert matrix_flops_per_token(config) == 6 * sum(
        parameter.numel()
        for name, parameter in build_model(config).named_parameters()
        if "norm" not in name
        and name != "position_embedding.weight"
        and (config.tie_embeddings or name != "token_embedding.weight")
    )
    width = config.num_streams * config.heads * config.head_size
    assert attention_flops_per_token(config) == 6 * config.num_layers * config.context_length * width
