"""Ranks that share a model and its teacher learn what one process does, by plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from parity.distillation import PAIRS


@pytest.mark.parametrize("ranks", [2, 4])
def test_equal_to_plain_pytorch(launched: Callable[..., dict[str, Any]], ranks: int) -> None:
    found = launched(ranks)["distillation"]
    assert len(found) == 2 * len(PAIRS)
    for case, errors in found.items():
        assert errors["gradients of the teacher"] == 0, case
        assert max(errors.values()) < 1e-10, (case, errors)
