"""The divergence from a teacher against PyTorch's, and what it never holds; cut over ranks in tests/parity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import random_ids, rough_model, small_configs
from model.test_cross_entropy import HIDDEN, TOKENS, VOCABULARY, LargestTensor, chunked, gradients, inputs
from torch import Tensor
from torch.nn import functional as F

from kraken_train.model.cross_entropy import IGNORED
from kraken_train.model.divergence import SoftTargets

WIDTH = HIDDEN + 5  # of the teacher


def teacher(dtype: torch.dtype, share: float, temperature: float) -> SoftTargets:
    generator = torch.Generator().manual_seed(4)
    hidden, head = (torch.randn(n, WIDTH, generator=generator).to(dtype) for n in (TOKENS, VOCABULARY))
    return SoftTargets(hidden, head, share, temperature)


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, soft: SoftTargets) -> tuple[Tensor, Tensor]:
    """(cross-entropy, KL), summed over the targets that count, of at least float32."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    counted = targets != IGNORED
    logits, of_teacher = F.linear(hidden, weight).to(wide), F.linear(soft.hidden, soft.head).to(wide)
    student, teacher = ((part[counted] / soft.temperature).log_softmax(1) for part in (logits, of_teacher))
    divergence = F.kl_div(student, teacher, reduction="sum", log_target=True)
    return F.cross_entropy(logits, targets, reduction="sum"), divergence


def objective(losses: tuple[Tensor, Tensor], soft: SoftTargets) -> Tensor:
    return (1 - soft.share) * losses[0] + soft.share * soft.temperature**2 * losses[1]


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("tokens", [1, 7, 1000])
def test_exact(tokens: int, temperature: float, share: float) -> None:
    hidden, weight, targets = inputs(torch.float64)
    soft = teacher(torch.float64, share, temperature)
    expected = plain(hidden, weight, targets, soft)
    with_gradient = chunked(tokens).total(hidden, weight, targets, 0.0, soft)
    with torch.no_grad():
        without = chunked(tokens).total(hidden, weight, targets, 0.0, soft)
    for found in (with_gradient, without):
        torch.testing.assert_close(found.cross_entropy, expected[0], rtol=1e-13, atol=0)
        torch.testing.assert_close(found.divergence, expected[1], rtol=1e-13, atol=0)
        torch.testing.assert_close(found.objective, objective(expected, soft), rtol=1e-13, atol=0)
    assert [part.requires_grad for part in with_gradient] == [True, False, False, False]
    of_plain = gradients(objective(expected, soft), hidden, weight)
    for gradient, wanted in zip(gradients(with_gradient.objective, hidden, weight), of_plain, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-13)


def test_beside_a_z_loss() -> None:
    hidden, weight, targets = inputs(torch.float64)
    soft = teacher(torch.float64, 0.4, 2.0)
    found = chunked(9).total(hidden, weight, targets, 0.3, soft)
    z_loss = 0.3 * F.linear(hidden, weight)[targets != IGNORED].logsumexp(1).square().sum()
    expected = objective(plain(hidden, weight, targets, soft), soft) + z_loss
    torch.testing.assert_close(found.objective, expected, rtol=1e-13, atol=0)
    of_plain = gradients(expected, hidden, weight)
    for gradient, wanted in zip(gradients(found.objective, hidden, weight), of_plain, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_share_of_0_changes_no_bit(dtype: torch.dtype) -> None:
    hidden, weight, targets = inputs(dtype)
    found = chunked(7).total(hidden, weight, targets, 1e-4, teacher(dtype, 0.0, 2.0))
    without = chunked(7).total(hidden, weight, targets, 1e-4)
    assert float(found.divergence) > 0
    assert all(torch.equal(one, other) for one, other in zip(found[:3], without[:3], strict=True))
    pairs = zip(*(gradients(losses.objective, hidden, weight) for losses in (found, without)), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_bf16_is_as_exact_as_without_chunks(compiled: bool) -> None:
    hidden, weight, targets = inputs(torch.bfloat16)
    soft = teacher(torch.bfloat16, 0.5, 2.0)
    exact: Any = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    exact_soft = soft._replace(hidden=soft.hidden.double(), head=soft.head.double())
    truth = gradients(objective(plain(*exact, targets, exact_soft), exact_soft), *exact)
    expected = plain(hidden, weight, targets, soft)
    without = gradients(objective(expected, soft), hidden, weight)
    entropy = chunked(9)
    if compiled:
        entropy.compile()
    total = entropy.total(hidden, weight, targets, 0.0, soft)
    assert {part.dtype for part in total} == {torch.float32}
    torch.testing.assert_close(total.divergence, expected[1])
    for found, of_plain, true in zip(gradients(total.objective, hidden, weight), without, truth, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found - true).norm() < 1.2 * (of_plain - true).norm()


def test_it_is_zero_for_the_same_model() -> None:
    hidden, weight, targets = inputs(torch.float64)
    soft = SoftTargets(hidden.detach(), weight.detach(), 1.0, 3.0)
    total = chunked(9).total(hidden, weight, targets, 0.0, soft)
    assert abs(float(total.divergence)) < 1e-12
    assert all(float(gradient.abs().max()) < 1e-15 for gradient in gradients(total.objective, hidden, weight))


def test_not_all_logits_exist_at_once() -> None:
    """Neither the student's nor the teacher's."""
    configs = small_configs(vocab_size=1500)
    student, teaching = (rough_model(configs[name], torch.bfloat16) for name in ("kraken", "standard"))
    ids = random_ids(configs["kraken"], 10, 16)
    student.head.cross_entropy.logits_at_once = 32 * 1500
    with LargestTensor() as largest:
        student.losses(ids, ids, soft=teaching.soft_targets(ids, 0.5, 2.0)).objective.backward()
    assert largest.elements == 32 * 1500  # of 160 * 1500
    assert all(parameter.grad is None for parameter in teaching.parameters())
