"""The sums of gradients over the copies are scattered: each copy gets those that its part of the optimizer reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("ranks", "size"), [(2, 1), (4, 1), (4, 2)])
def test_a_part_is_that_of_an_all_reduce(launched: Callable[..., Any], ranks: int, size: int, optimizer: str) -> None:
    """To the bit on gloo, which adds in the same order for both. NCCL may add in another one."""
    found = launched(ranks)["gradient-sums"][f"{size} {optimizer}"]
    groups, compared = found["groups"]
    assert groups == compared >= 2
    assert found["difference"] <= (1e-6 if "nccl" in found["backend"] else 0)
    assert found["cleared"], "what is left of other copies' parts would be added to the next step's"
