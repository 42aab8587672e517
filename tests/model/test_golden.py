"""Our model against numbers computed by the authors' published code in float64; over ranks in tests/parity."""

from __future__ import annotations

import pytest
import torch
from golden import Golden

from kraken_train.training.optim import parameter_groups


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden()


def test_logits_and_loss(golden: Golden) -> None:
    model = golden.model()
    assert (model(golden.input_ids) - golden.logits).abs().max() < 1e-12
    assert abs(model.loss(golden.input_ids, golden.targets).item() - golden.loss) < 1e-13


def test_gradients(golden: Golden) -> None:
    model = golden.model()
    model.loss(golden.input_ids, golden.targets).backward()
    for name, expected in golden.gradients.items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        assert (gradient - expected).norm() / expected.norm() < 1e-6, name
    assert len(golden.gradients) == 21


def test_training_trajectory(golden: Golden) -> None:
    model = golden.model()
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    for loss_expected, norm_expected in zip(golden.losses, golden.norms, strict=True):
        loss = model.loss(golden.input_ids, golden.targets)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert abs(loss.item() - loss_expected.item()) < 1e-9
        assert abs(norm.item() - norm_expected.item()) < 1e-8
