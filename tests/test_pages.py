"""Each page of the documents can be found: from the README and in the menu of the website."""

from __future__ import annotations

import pytest
from helpers import REPOSITORY

PAGES = sorted(page.name for page in (REPOSITORY / "docs").glob("*.md"))


@pytest.mark.parametrize("name", PAGES)
def test_listed(name: str) -> None:
    assert f": {name}\n" in (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
    if name != "index.md":  # which takes the README's place on the website
        assert f"(docs/{name})" in (REPOSITORY / "README.md").read_text(encoding="utf-8")
