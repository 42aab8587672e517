"""A vocabulary that the ranks of a copy cannot divide evenly is shared by rows, without a row that is padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from parity.uneven_vocabulary import CONFIG, SIZES


def test_the_rows_are_those_of_the_model(launched: Callable[..., Any]) -> None:
    rows = launched(4)["uneven-vocabulary"]["rows"]
    assert rows == {"4": [33, 33, 33, 32], "2": [66, 65, 66, 65], "1": [131] * 4}
    assert sum(rows["4"]) == CONFIG.vocab_size


@pytest.mark.parametrize("saved", SIZES)
def test_a_state_is_the_same_at_every_degree(launched: Callable[..., Any], saved: int) -> None:
    """To the bit, weights and moments; a checkpoint that is read whole has the shapes of the model."""
    found = launched(4)["uneven-vocabulary"]
    assert found[f"{saved}, read whole"]
    assert [found[f"{saved} -> {loaded}"] for loaded in SIZES if loaded != saved] == [True, True]
