"""What the planner predicts of late all-reduces is what two ranks wait for, whatever the architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from helpers import shareable_configs

from parity.late_sums import LATENCIES, RANKS

NAMES = [name for name, config in shareable_configs().items() if config.parallel_units[1] % RANKS == 0]


@pytest.mark.parametrize("name", NAMES)
def test_predicted_waits(launched: Callable[..., Any], name: str) -> None:
    """In a training step and in a pass over a prompt: seconds on a clock on which the parts take what is predicted."""
    config, found = shareable_configs()[name], launched(RANKS)["late-sums"][name]
    assert len(found) == len(LATENCIES)
    for at_latency in found:
        step, prompt = at_latency["step"], at_latency["prompt"]
        assert step["computed"] == pytest.approx(step["predicted computed"])
        assert step["exposed"] == pytest.approx(step["predicted exposed"])
        assert prompt["took"] == pytest.approx(prompt["predicted"])
    hidden = [at_latency["step"]["predicted hidden"] for at_latency in found]
    assert all(hidden) if config.overlaps_communication else not any(hidden)


def test_order_of_the_architectures(launched: Callable[..., Any]) -> None:
    """With slow sums, by the share of a step that is waited for: fewest sums or hidden ones first."""
    slow = {name: found[-1]["step"] for name, found in launched(RANKS)["late-sums"].items()}
    share = {name: step["exposed"] / (step["exposed"] + step["computed"]) for name, step in slow.items()}
    assert share["kraken-4"] < share["fal"] < share["standard"]
    assert share["ladder"] < share["standard"]
    assert share["track"] < share["parallel"] < share["standard"]
