"""The chunked cross-entropy against PyTorch's, and what it never holds; cut over ranks in tests/parity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import random_ids, rough_model, small_configs
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kraken_train.model.cross_entropy import IGNORED, CrossEntropy
from kraken_train.parallel.communicator import LocalCommunicator
from kraken_train.parallel.sharding import all_units

TOKENS, VOCABULARY, HIDDEN = 50, 97, 16


def chunked(tokens: int) -> CrossEntropy:
    entropy = CrossEntropy(all_units(VOCABULARY), LocalCommunicator())
    entropy.logits_at_once = tokens * VOCABULARY
    assert entropy.chunk_tokens == tokens
    return entropy


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(n, HIDDEN, generator=generator).to(dtype) for n in (TOKENS, VOCABULARY))
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    targets[5:9] = IGNORED
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")


def plain_z_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The sum over the targets that count, unweighted."""
    return F.linear(hidden, weight)[targets != IGNORED].exp().sum(1).log().square().sum()


def gradients(loss: Tensor, *of: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss / 46, of))  # as many targets count


@pytest.mark.parametrize("z_weight", [0.0, 1e-4, 0.3])
@pytest.mark.parametrize("tokens", [1, 7, TOKENS, 1000])
def test_exact(tokens: int, z_weight: float) -> None:
    hidden, weight, targets = inputs(torch.float64)
    entropy, expected = chunked(tokens), plain(hidden, weight, targets)
    torch.testing.assert_close(entropy.by_token(hidden, weight, targets), expected, rtol=0, atol=1e-13)
    expected_z = z_weight * plain_z_loss(hidden, weight, targets)
    total = entropy.total(hidden, weight, targets, z_weight)
    with torch.no_grad():
        without_gradient = entropy.total(hidden, weight, targets, z_weight)
    for losses in (total, without_gradient):
        torch.testing.assert_close(losses.cross_entropy, expected.sum(), rtol=1e-13, atol=0)
        torch.testing.assert_close(losses.z_loss, expected_z, rtol=1e-13, atol=0)
        torch.testing.assert_close(losses.objective, losses.cross_entropy + losses.z_loss, rtol=0, atol=0)
    assert [part.requires_grad for part in total] == [True, False, False, False]
    found = gradients(total.objective, hidden, weight)
    for gradient, of_plain in zip(found, gradients(expected.sum() + expected_z, hidden, weight), strict=True):
        torch.testing.assert_close(gradient, of_plain, rtol=1e-13, atol=1e-14)


# Compiling takes 10 s; so do the compiled trajectories of tests/parity.
@pytest.mark.parametrize("z_weight", [0.0, 0.3])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_bf16_is_as_exact_as_without_chunks(compiled: bool, z_weight: float) -> None:
    def objective(hidden: Tensor, weight: Tensor) -> Tensor:
        return plain(hidden, weight, targets).sum() + z_weight * plain_z_loss(hidden, weight, targets)

    hidden, weight, targets = inputs(torch.bfloat16)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    truth = gradients(objective(*exact), *exact)
    without = gradients(objective(hidden, weight), hidden, weight)
    entropy = chunked(9)
    if compiled:
        entropy.compile()
    total = entropy.total(hidden, weight, targets, z_weight)
    assert {part.dtype for part in total} == {torch.float32}
    torch.testing.assert_close(total.cross_entropy, plain(hidden, weight, targets).sum())
    for found, of_plain, true in zip(gradients(total.objective, hidden, weight), without, truth, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found - true).norm() < 1.2 * (of_plain - true).norm()


def test_sure_and_hopeless_predictions() -> None:
    """Losses of 0 and of hundreds of nats, whose probabilities fp32 cannot tell from 1 and 0."""
    weight = torch.eye(VOCABULARY, HIDDEN, requires_grad=True)
    hidden = torch.zeros(2, HIDDEN)
    hidden[:, 3] = 300.0
    targets = torch.tensor([3, 5])
    hidden.requires_grad_()
    total = chunked(1).total(hidden, weight, targets).objective
    assert total.item() == pytest.approx(300.0)
    for gradient, of_plain in zip(
        gradients(total, hidden, weight), gradients(plain(hidden, weight, targets).sum(), hidden, weight), strict=True
    ):
        torch.testing.assert_close(gradient, of_plain)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_not_all_logits_exist_at_once() -> None:
    """Neither in fp32 nor in bf16, in training or in evaluation."""
    config = small_configs(vocab_size=1500)["kraken"]
    model = rough_model(config, torch.bfloat16)
    ids = random_ids(config, 10, 16)
    model.token_embedding.cross_entropy.logits_at_once = 20 * 1500
    for step in (lambda: model.loss(ids, ids).backward(), lambda: model.token_losses(ids, ids)):
        with LargestTensor() as largest:
            step()
        assert largest.elements == 20 * 1500  # of 160 * 1500
