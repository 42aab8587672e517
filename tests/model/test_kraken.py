"""Kraken against a plain loop over sub-layers that follows the paper's formulas."""

from __future__ import annotations

import ast
import subprocess
import sys
from typing import Any

import pytest
import torch
from helpers import REPOSITORY, random_ids, rough_model, small_configs
from torch import Tensor
from torch.nn import functional as F

from kraken_train.model.config import KrakenConfig
from kraken_train.model.kraken import KrakenModel
from kraken_train.parallel.communicator import LocalCommunicator


def kraken_by_hand(weights: dict[str, Tensor], config: KrakenConfig, input_ids: Tensor) -> Tensor:
    """Section 3 of the paper, sub-layer by sub-layer; PyTorch's own attention module is the oracle of MHA.

    `ffn_reads_stream` adds x_i to what an FFN reads. With `embedding_size` streams start as maps of the embedding.
    """
    read = float(config.ffn_reads_stream)
    n, d = config.num_sub_layers, config.hidden_size

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.layer_norm(x, weight.shape, weight, eps=config.norm_epsilon)

    def mha(layer: int, i: int, x: Tensor) -> Tensor:
        prefix = f"layers.{layer}.attention"
        x = norm(x, weights[f"{prefix}.norm.weight"][i]).transpose(0, 1)
        mask = torch.full((x.shape[0], x.shape[0]), -torch.inf, dtype=x.dtype).triu(1)
        out, _ = F.multi_head_attention_forward(
            x, x, x, d, config.heads_per_sub_layer, weights[f"{prefix}.qkv.weight"][i], None, None, None, False, 0.0,
            weights[f"{prefix}.out.weight"][i], None, attn_mask=mask, need_weights=False,
        )  # fmt: skip
        return out.transpose(0, 1)

    def ffn(layer: int, i: int, u: Tensor) -> Tensor:
        prefix = f"layers.{layer}.ffn"
        up = norm(u, weights[f"{prefix}.norm.weight"][i]) @ weights[f"{prefix}.up.weight"][i].T
        return F.gelu(up, approximate="tanh") @ weights[f"{prefix}.down.weight"][i].T

    embedding = weights["token_embedding.weight"][input_ids]
    embedding = embedding + weights["position_embedding.weight"][: input_ids.shape[1]]
    if config.embedding_size is None:
        streams = [embedding] * n
    else:
        streams = [embedding @ weights["embedding_maps.weight"][i].T for i in range(n)]
    for layer in range(config.num_layers):
        s = embedding if layer == 0 and config.embedding_size is None else sum(streams)
        attended = [mha(layer, i, streams[i]) for i in range(n)]
        read_by_ffn = [attended[i] + s + read * streams[i] for i in range(n)]
        streams = [streams[i] + attended[i] + ffn(layer, i, read_by_ffn[i]) for i in range(n)]
    y = sum(streams[i] @ weights["conjunction.weight"][i].T for i in range(n))
    return norm(y, weights["final_norm.weight"]) @ weights["token_embedding.weight"].T


@pytest.mark.parametrize(
    ("num_sub_layers", "changes"),
    [
        (1, {}),
        (2, {}),
        (3, {}),
        (3, {"ffn_reads_stream": True}),
        (6, {"ffn_reads_stream": True}),
        (1, {"embedding_size": 16}),
        (3, {"embedding_size": 28}),
        (2, {"embedding_size": 12, "ffn_reads_stream": True}),
    ],
    ids=str,
)
def test_logits_and_gradients(num_sub_layers: int, changes: dict[str, Any]) -> None:
    config = KrakenConfig(num_sub_layers, 3, 16, 2, 40, 12, ffn_multiplier=3, **changes)
    model = rough_model(config)
    input_ids, targets = random_ids(config, 2, 9), random_ids(config, 2, 9, seed=1)
    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    expected = kraken_by_hand(weights, config, input_ids)
    torch.testing.assert_close(model(input_ids), expected, rtol=0, atol=1e-11)

    F.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()
    model.loss(input_ids, targets).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("architecture", small_configs())
def test_a_token_sees_only_those_before_it(architecture: str) -> None:
    config = small_configs()[architecture]
    model, ids = rough_model(config), random_ids(config, 1, 10)
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] + 1) % config.vocab_size
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:])


def test_loss_is_the_mean_over_counted_targets_in_fp32() -> None:
    config = small_configs()["kraken"]
    model = rough_model(config, torch.bfloat16)
    input_ids, targets = random_ids(config, 2, 6), random_ids(config, 2, 6, seed=1)
    targets[:, 4:] = -100
    loss = model.loss(input_ids, targets)
    assert loss.dtype == torch.float32
    log_probabilities = model(input_ids).float().log_softmax(-1)
    picked = log_probabilities[:, :4].gather(-1, targets[:, :4, None])
    torch.testing.assert_close(loss, -picked.mean())


def test_too_many_tokens() -> None:
    config = small_configs(context_length=8)["kraken"]
    with pytest.raises(ValueError, match="9 tokens are more than context_length=8"):
        rough_model(config)(random_ids(config, 1, 9))


def test_model_files_import_no_runtime() -> None:
    forbidden = {"deepspeed", "os", "torch.distributed", "hydra"}
    parallel = [f"parallel/{name}.py" for name in ("sharding", "communicator", "tensor_parallel")]
    for name in (*(f"model/{path.name}" for path in (REPOSITORY / "kraken_train" / "model").glob("*.py")), *parallel):
        tree = ast.parse((REPOSITORY / "kraken_train" / name).read_text())
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                imported |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
        assert not imported & forbidden, name
        assert not any(module.startswith(("deepspeed.", "torch.distributed.")) for module in imported), name


def test_importing_the_model_loads_no_deepspeed() -> None:
    program = "import sys, kraken_train.model.registry; print('deepspeed' in sys.modules)"
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert result.stdout.strip() == "False", result.stderr


def test_sub_layers_are_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_configs()["kraken"]
    model = rough_model(config)
    assert isinstance(model, KrakenModel)
    calls = 0
    original = torch.bmm

    def counted(*arguments: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return original(*arguments)

    monkeypatch.setattr(torch, "bmm", counted)
    model(random_ids(config, 1, 4))
    assert calls == 4 * config.num_layers + 1  # qkv, out, up, down; the conjunction


# ---------------------------------------------------------------------------------------------------------------
# The seam to several devices
# ---------------------------------------------------------------------------------------------------------------


class RecordingCommunicator(LocalCommunicator):
    def __init__(self) -> None:
        self.calls: list[str] = []

    def copy_to_ranks(self, shared: Tensor) -> Tensor:
        self.calls.append("copy_to_ranks")
        return super().copy_to_ranks(shared)

    def start_all_reduce(self, streams: Tensor) -> Tensor:
        self.calls.append("start_all_reduce")
        return super().start_all_reduce(streams)

    def wait(self, handle: Tensor) -> Tensor:
        self.calls.append("wait")
        return super().wait(handle)

    def all_reduce(self, partial: Tensor) -> Tensor:
        self.calls.append("all_reduce")
        return super().all_reduce(partial)


def test_the_sum_is_under_way_during_the_attention() -> None:
    config = small_configs()["kraken"]
    communicator = RecordingCommunicator()
    model = KrakenModel(config, communicator=communicator)
    for layer in model.layers:
        layer.attention.register_forward_pre_hook(lambda *_: communicator.calls.append("attention"))
        layer.ffn.register_forward_pre_hook(lambda *_: communicator.calls.append("ffn"))
    model(random_ids(config, 1, 4))
    later_layers = ["start_all_reduce", "attention", "wait", "ffn"] * (config.num_layers - 1)
    assert communicator.calls == ["copy_to_ranks", "attention", "ffn", *later_layers, "all_reduce"]
