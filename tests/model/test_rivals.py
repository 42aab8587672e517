"""The architectures that compete with Kraken, against formulas of their papers in plain PyTorch, and over two ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import MODERN, random_ids, rough_model, split_qkv
from thread_ranks import compare_two_ranks
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kraken_train.common.errors import ConfigError
from kraken_train.model.architecture import ATTENTION, FFN, ModelConfig
from kraken_train.model.config import GPTConfig
from kraken_train.model.fal_config import FALConfig
from kraken_train.model.flops import attention_flops_per_token, matrix_flops_per_token
from kraken_train.model.ladder_config import LadderConfig
from kraken_train.model.registry import build_model, even_share
from kraken_train.model.track_config import TrackConfig
from kraken_train.parallel.distributed import DistributedCommunicator
from kraken_train.parallel.sharding import ModelRank
from kraken_train.planning.fake_trace import FakeGroup
from kraken_train.recipe.optimizers import AdamWConfig
from kraken_train.recipe.parametrization import parametrization_of

COMMON: dict[str, Any] = {"num_layers": 4, "vocab_size": 96, "context_length": 24}
LADDER = LadderConfig(hidden_size=32, num_heads=4, **COMMON)
MODERN_LADDER = LadderConfig(
    hidden_size=20,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    ffn_hidden_size=30,
    tie_embeddings=False,
    **COMMON,
    **MODERN,
)
FAL = FALConfig(hidden_size=32, num_heads=4, **COMMON)
MODERN_FAL = FALConfig(
    hidden_size=20,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    ffn_hidden_size=30,
    tie_embeddings=False,
    **COMMON,
    **MODERN,
)
TRACK = TrackConfig(4, hidden_size=16, heads_per_track=2, sync_every=2, **COMMON)
MODERN_TRACK = TrackConfig(
    4, hidden_size=20, heads_per_track=4, kv_heads_per_track=2, head_dim=6, ffn_hidden_size=28, sync_every=3,
    tie_embeddings=False, **COMMON, **MODERN,
)  # fmt: skip
CONFIGS: dict[str, ModelConfig] = {
    "ladder": LADDER,
    "ladder-modern": MODERN_LADDER,
    "ladder-hybrid": replace(LADDER, ladder_layers=2, num_kv_heads=1),
    "ladder-hybrid-modern": replace(MODERN_LADDER, ladder_layers=3),
    "fal": FAL,
    "fal-modern": MODERN_FAL,
    "fal-mqa": replace(FAL, num_kv_heads=1),
    "fal-single": replace(FAL, num_layers=1),
    "track-2": TRACK,
    "track-4": replace(TRACK, sync_every=4, kv_heads_per_track=1),
    "track-8": replace(TRACK, sync_every=8, num_layers=9),
    "track-uneven": replace(TRACK, num_layers=5, num_tracks=2),
    "track-modern": MODERN_TRACK,
    "track-single": replace(TRACK, num_tracks=1, num_layers=1),
    "ladder-single": replace(LADDER, num_layers=1),
}

# ---------------------------------------------------------------------------------------------------------------
# The formulas, one process, nothing of the library but the weights
# ---------------------------------------------------------------------------------------------------------------


def normed(config: ModelConfig, x: Tensor, gain: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True) if config.norm == "layernorm" else x
    return gain * x / (x.square().mean(-1, keepdim=True) + config.norm_epsilon).sqrt()


def rotated(config: ModelConfig, x: Tensor) -> Tensor:
    """Each pair (x_j, x_(j + K/2)) of (..., T, K) as a complex number, turned by t / theta^(2 j / K)."""
    half = x.shape[-1] // 2
    rates = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turns = torch.polar(torch.ones((), dtype=torch.float64), torch.arange(x.shape[-2])[:, None] * rates)
    # The library computes angles in float32, which the limit of the comparison allows for.
    turned = torch.complex(x[..., :half], x[..., half:]) * turns
    return torch.cat([turned.real, turned.imag], dim=-1)


def attention(config: ModelConfig, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """MHA of a normed x (B, T, D), head by head."""
    size = config.head_size
    query, key, value = (
        (x @ weight.mT).unflatten(-1, (-1, size)).transpose(1, 2) for weight in split_qkv(weights["qkv"], size)
    )
    if config.qk_norm:
        query, key = (
            weights[f"{name}_norm"] * part / (part.square().mean(-1, keepdim=True) + config.norm_epsilon).sqrt()
            for name, part in (("q", query), ("k", key))
        )
    if config.positions == "rope":
        query, key = rotated(config, query), rotated(config, key)
    of_head = []
    for head in range(config.heads):
        group = head * config.kv_heads // config.heads
        scores = query[:, head] @ key[:, group].mT / size**0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        of_head.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ value[:, group])
    return torch.cat(of_head, dim=-1) @ weights["out"].mT


def ffn(config: ModelConfig, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    up = x @ weights["up"].mT
    inner = F.gelu(up, approximate="tanh") if config.ffn == "gelu" else F.silu(x @ weights["gate"].mT) * up
    return inner @ weights["down"].mT


class Plain:
    """The weights of a model, and what all formulas share."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor]) -> None:
        self.config, self.weights = config, weights

    def of(self, prefix: str) -> dict[str, Tensor]:
        names = [name for name in self.weights if name.startswith(f"{prefix}.")]
        return {name.removeprefix(f"{prefix}.").removesuffix(".weight"): self.weights[name] for name in names}

    def part(self, layer: int, name: str) -> Callable[[Tensor], Tensor]:
        """MHA(LN1 x) or FFN(LN2 x) of a layer as a function of x."""
        gain = self.weights[f"layers.{layer}.{name}_norm.weight"]
        own, compute = self.of(f"layers.{layer}.{name}"), attention if name == "attention" else ffn
        return lambda x: compute(self.config, own, normed(self.config, x, gain))

    def logits(self, ids: Tensor, hidden: Callable[[Plain, Tensor], Tensor]) -> Tensor:
        x = self.weights["token_embedding.weight"][ids]
        if self.config.positions == "learned":
            x = x + self.weights["position_embedding.weight"][: ids.shape[1]]
        last = normed(self.config, hidden(self, x), self.weights["final_norm.weight"])
        return last @ self.weights["token_embedding.weight" if self.config.tie_embeddings else "lm_head.weight"].mT


def ladder(plain: Plain, x: Tensor) -> Tensor:
    """x_(i+1) = x_i + h_(i+1)(x_(i-1)), or h_(i+1)(x_i) in the standard layers of a hybrid."""
    config = plain.config
    assert isinstance(config, LadderConfig)
    ladders = config.num_layers if config.ladder_layers is None else config.ladder_layers
    before = x
    for layer in range(config.num_layers):
        for name in ("attention", "ffn"):
            reads = before if layer >= config.num_layers - ladders else x
            before, x = x, x + plain.part(layer, name)(reads)
    return x


def fal(plain: Plain, x: Tensor) -> Tensor:
    """x + MHA(LN1 x) + FFN(LN2 x + f), with the normed output f of the first attention; the first layer is standard."""
    config, weights = plain.config, plain.weights
    first = torch.zeros_like(x)
    for layer in range(config.num_layers):
        attended = plain.part(layer, "attention")(x)
        if layer == 0:
            first = normed(config, attended, weights["layers.0.output_norm.weight"])
            x = x + attended
            x = x + plain.part(0, "ffn")(x)
        else:
            reads = normed(config, x, weights[f"layers.{layer}.ffn_norm.weight"]) + first
            x = x + attended + ffn(config, plain.of(f"layers.{layer}.ffn"), reads)
    return x


def track(plain: Plain, x: Tensor) -> Tensor:
    """Each track by itself, in its block of layers; then what each has added is added to what they began with."""
    config = plain.config
    assert isinstance(config, TrackConfig)
    for block in range(0, config.num_layers, config.sync_every):
        added = torch.zeros_like(x)
        for number in range(config.num_tracks):
            own = x
            for layer in range(block, min(block + config.sync_every, config.num_layers)):
                for name, compute in (("attention", attention), ("ffn", ffn)):
                    weights = {key: weight[number] for key, weight in plain.of(f"layers.{layer}.{name}").items()}
                    if name == "attention":  # one matrix of queries, keys and values one after the other
                        weights["qkv"] = in_groups(config, weights["qkv"])
                    own = own + compute(config, weights, normed(config, own, weights["norm"]))
            added = added + own - x
        x = x + added
    return x


def in_groups(config: ModelConfig, qkv: Tensor) -> Tensor:
    """(rows, D), all queries before all keys and values -> as `split_qkv` takes it, (G, rows of a group, D)."""
    heads = [config.heads, config.kv_heads, config.kv_heads]
    parts = qkv.split([count * config.head_size for count in heads])
    return torch.cat([part.unflatten(0, (config.kv_heads, -1)) for part in parts], dim=1)


FORMULAS = {"ladder": ladder, "fal": fal, "track": track}


@pytest.mark.parametrize("name", CONFIGS)
def test_formula(name: str) -> None:
    """Logits and all gradients."""
    config = CONFIGS[name]
    model = rough_model(config)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    ids = random_ids(config, 2, 21)
    expected = Plain(config, weights).logits(ids[:, :-1], FORMULAS[config.architecture])
    found = model(ids[:, :-1])
    assert (found - expected).abs().max() < (1e-10 if config.positions == "learned" else 2e-5)
    for logits in (expected, found):
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    for parameter, weight in weights.items():
        gradient = model.get_parameter(parameter).grad
        assert gradient is not None
        if weight.grad is None:  # the first attention's output, which a single layer does not read
            assert (config.architecture, config.num_layers) == ("fal", 1)
            assert gradient.norm() == 0
            continue
        error = (gradient - weight.grad).norm() / weight.grad.norm()
        assert error < (1e-10 if config.positions == "learned" else 1e-4), parameter


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if config.parallel_units[1] % 2 == 0])
def test_two_ranks_are_the_whole_model(name: str, recompute: bool) -> None:
    config = CONFIGS[name]
    error, calls = compare_two_ranks(config, recompute)
    assert error < 1e-10
    # And one sum of the gradients of gains, where these are equal on all ranks.
    assert calls == sum(all_reduces.count for all_reduces in config.all_reduces) + (config.num_streams == 1)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_sizes(config: ModelConfig) -> None:
    model = build_model(config)
    assert config.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    ids = random_ids(config, 2, config.context_length)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.loss(ids, ids).backward()
    per_token = matrix_flops_per_token(config) + 2 * attention_flops_per_token(config)
    assert counter.get_total_flops() == per_token * ids.numel()


# ---------------------------------------------------------------------------------------------------------------
# Ladder Residual
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ladder_layers", "behind"),
    [(None, {FFN: 4, ATTENTION: 3, None: 1}), (4, {FFN: 4, ATTENTION: 3, None: 1}),
     (2, {FFN: 2, ATTENTION: 2, None: 4}), (1, {FFN: 1, ATTENTION: 1, None: 6})],
)  # fmt: skip
def test_hidden_sums_of_a_ladder(ladder_layers: int | None, behind: dict[str | None, int]) -> None:
    config = replace(LADDER, ladder_layers=ladder_layers)
    assert {sums.behind: sums.count // 2 for sums in config.all_reduces} == behind
    assert sum(behind.values()) == 2 * config.num_layers


def test_settings_of_a_ladder() -> None:
    with pytest.raises(ConfigError, match=r"model.ladder_layers=5 is more than model.num_layers=4; use at most 4"):
        replace(LADDER, ladder_layers=5)
    with pytest.raises(ConfigError, match=r"model.ladder_layers=0 must be greater than 0"):
        replace(LADDER, ladder_layers=0)
    half = replace(LADDER, num_layers=32, ladder_layers=16)
    assert [half.at_depth(depth).ladder_layers for depth in (1, 3, 4)] == [1, 2, 2]
    assert LADDER.at_depth(2).num_ladder_layers == 2
    standard = GPTConfig(hidden_size=32, num_heads=4, **COMMON)
    assert LADDER.num_parameters == standard.num_parameters
    names = [name for name, _ in build_model(standard).named_parameters()]
    assert [name for name, _ in build_model(LADDER).named_parameters()] == names


def test_sums_of_fal() -> None:
    """One a layer and one more for the first attention, all exposed."""
    assert [(sums.behind, sums.count) for sums in FAL.all_reduces] == [(None, 2 * (4 + 1))]
    standard = GPTConfig(hidden_size=32, num_heads=4, **COMMON)
    assert FAL.num_parameters == standard.num_parameters + 32


@pytest.mark.parametrize(("layers", "sync_every", "sums"), [(16, 2, 8), (16, 4, 4), (16, 8, 2), (17, 8, 3), (3, 8, 1)])
def test_sums_of_tracks(layers: int, sync_every: int, sums: int) -> None:
    """One in a block of layers, exposed."""
    config = replace(TRACK, num_layers=layers, sync_every=sync_every)
    assert [(one.behind, one.count) for one in config.all_reduces] == [(None, 2 * sums)]


def test_settings_of_tracks() -> None:
    with pytest.raises(ConfigError, match=r"model.sync_every=0 must be greater than 0"):
        replace(TRACK, sync_every=0)
    optim = AdamWConfig(
        lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, max_grad_norm=1.0, parametrization="mup"
    )
    with pytest.raises(ConfigError, match=r"optim.parametrization=mup has no rules for model.architecture=track"):
        parametrization_of(optim, TRACK)


# ---------------------------------------------------------------------------------------------------------------
# What runs while a sum is under way
# ---------------------------------------------------------------------------------------------------------------


class Flight:
    """A sum that is under way until someone waits for it."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.beside: list[str] = []
        recorder.flights.append(self)

    def wait(self) -> None:
        self.recorder.flights.remove(self)
        self.recorder.landed.append("+".join(self.beside))


class Recorder:
    """In place of an all-reduce: what of a model's first rank is computed during each sum."""

    def __init__(self, config: ModelConfig) -> None:
        self.flights: list[Flight] = []
        self.landed: list[str] = []
        place = ModelRank(0, 2)
        communicator = DistributedCommunicator(FakeGroup(place), collective=lambda *_, **__: Flight(self))  # type: ignore[arg-type]
        self.model = build_model(config, 0, even_share(config, place)[0], communicator)
        for layer in self.model.layers:
            for name in (ATTENTION, FFN):
                part = layer.get_submodule(name)
                part.register_forward_pre_hook(lambda *_, name=name: self.computed(name))
                part.register_full_backward_pre_hook(lambda *_, name=name: self.computed(name))

    def computed(self, name: str) -> None:
        for flight in self.flights:
            flight.beside.append(name)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if config.parallel_units[1] % 2 == 0])
def test_what_hides_the_sums(name: str, recompute: bool) -> None:
    """As declared, in each of both passes; the last sum of each pass is exposed."""
    config = CONFIGS[name]
    recorder = Recorder(config)
    recorder.model.recompute = recompute
    ids = random_ids(config, 1, 8)
    loss = recorder.model.loss(ids, ids)
    forward, recorder.landed = recorder.landed, []
    loss.backward()
    backward = recorder.landed
    assert recorder.flights == []
    declared = Counter({(sums.behind or ""): sums.count // 2 for sums in config.all_reduces if sums.count})
    assert Counter(forward) == declared
    of_gains = 1 if config.num_streams == 1 else 0
    again = 2 if recompute else 1  # a part is computed once more in its own backward pass
    doubled = Counter({"+".join([behind] * (again if behind else 1)): count for behind, count in declared.items()})
    assert Counter(backward) == doubled + Counter({"": of_gains})
    assert forward[-1] == ""
