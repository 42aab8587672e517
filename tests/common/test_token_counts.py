"""Numbers of tokens, as they are typed and printed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kraken_train.common.token_counts import format_tokens, parse_tokens


@pytest.mark.parametrize(
    ("written", "tokens"),
    [
        ("2B", 2_000_000_000),
        ("1.5b", 1_500_000_000),
        ("300M", 300_000_000),
        ("500k", 500_000),
        ("0.25 T", 250_000_000_000),
        ("1e9", 1_000_000_000),
        (1e9, 1_000_000_000),
        ("1_000", 1000),
        ("7", 7),
        (0, 0),
    ],
)
def test_units(written: object, tokens: int) -> None:
    assert parse_tokens(written) == tokens


@pytest.mark.parametrize("written", ["2G", "1.5", 2.5, "0.0001k", "-1", -1, "", "B", "2BB", float("nan"), True, None])
def test_anything_else(written: object) -> None:
    with pytest.raises(ValueError, match="no whole number of tokens; give one such as 2B"):
        parse_tokens(written)


@given(st.integers(0, 10**14) | st.integers(0, 9999).map(lambda n: n * 10**8))
def test_what_is_printed_is_the_exact_number(tokens: int) -> None:
    assert parse_tokens(format_tokens(tokens).replace(",", "")) == tokens


def test_printed_with_units_where_they_are_short() -> None:
    assert [format_tokens(n) for n in (2 * 10**9, 1500, 2_000_158_720, 12 * 10**11, 999)] == [
        "2B", "1.5k", "2,000,158,720", "1.2T", "999"
    ]  # fmt: skip
