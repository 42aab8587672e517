"""The harness, where it is installed, and documents for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from superglue_files import write_superglue


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return write_superglue(tmp_path / "files")


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips without the harness; puts its caches into a temporary folder."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (the extra eval)")
    import datasets  # noqa: PLC0415
    import transformers.dynamic_module_utils as modules  # noqa: PLC0415

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
