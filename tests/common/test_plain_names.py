"""Names of files in a list that a stranger may have written."""

from __future__ import annotations

import pytest

from kraken_train.common.files import is_plain_name


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "../a", "a\0", "a" * 256, "\u00e9" * 128, 3])
def test_what_names_no_file_of_a_folder(name: object) -> None:
    assert not is_plain_name(name)


@pytest.mark.parametrize("name", ["a" * 255, "a b", ".a", "\u00e9" * 127])
def test_what_names_one(name: str) -> None:
    assert is_plain_name(name)
