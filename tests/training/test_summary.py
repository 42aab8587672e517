"""What a start says about the machines of its ranks."""

from __future__ import annotations

import pytest

from kraken_train.training.summary import describe_spread


@pytest.mark.parametrize(
    ("hosts", "size"),
    [("aaaabbbb", 4), ("aaaabbbb", 2), ("aabbaabb", 2), ("abab", 1), ("a", 1), ("aaaaaabb", 2)],
)
def test_copies_on_one_machine_each(hosts: str, size: int) -> None:
    assert describe_spread(hosts, size) is None


@pytest.mark.parametrize(
    ("hosts", "size", "message"),
    [
        ("abababab", 4, "2 of 2 model copies exchange over the network: the ranks 0 to 3 of copy 0 are on a, b. "),
        ("aabbbbaa", 4, "2 of 2 model copies exchange over the network: the ranks 0 to 3 of copy 0 are on a, b. "),
        ("aaaaabbbbbbb", 4, "1 of 3 model copies exchange over the network: the ranks 4 to 7 of copy 1 are on a, b. "),
        ("aaabbb", 6, "1 of 1 model copies exchange over the network: the ranks 0 to 5 of copy 0 are on a, b. "),
    ],
)
def test_copies_on_several_machines(hosts: str, size: int, message: str) -> None:
    spread = describe_spread(hosts, size)
    assert spread is not None
    assert spread.startswith(message)
    assert f"parallel.sub_layer_parallel_size={size} ranks of a copy on one machine" in spread
