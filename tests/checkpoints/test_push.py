"""Which files `checkpoints.push` uploads to the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from helpers import run_here, small_configs, user_error, write_small_export

CONFIG = small_configs(vocab_size=320)["kraken"]


class ClientError(Exception):
    """An error of an unknown HTTP client."""


class Hub:
    """A replacement of huggingface_hub.HfApi that records calls."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.failure = failure

    def __call__(self) -> Hub:
        return self

    def create_repo(self, repo: str, **settings: Any) -> None:
        self.calls.append(("create", {"repo": repo, **settings}))

    def upload_folder(self, **settings: Any) -> Any:
        if self.failure is not None:
            raise self.failure
        self.calls.append(("upload", settings))
        return mock.Mock(commit_url="https://example.org/commit")


@pytest.fixture
def export_dir(tmp_path: Path, tokenizer_dir: Path) -> Path:
    write_small_export(tmp_path / "e", CONFIG, tokenizer_dir)
    (tmp_path / "e" / ".cache").mkdir()
    (tmp_path / "e" / ".cache" / "secret").touch()
    return tmp_path / "e"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    return hub


def test_dry_run(export_dir: Path, hub: Hub) -> None:
    result = run_here("checkpoints.push", f"export_dir={export_dir}", "repo=me/model", "dry_run=true", "private=false")
    assert result.returncode == 0, result.stderr
    assert "would upload 9 files" in result.stdout
    assert "me/model would be created, public" in result.stdout
    size = (export_dir / "model.safetensors").stat().st_size
    assert f"{size / 1000:.1f} kB  model.safetensors" in result.stdout
    assert "no README.md" in result.stdout
    assert "secret" not in result.stdout
    assert not hub.calls


def test_exactly_the_files_of_the_export_are_uploaded(export_dir: Path, hub: Hub) -> None:
    (export_dir / "README.md").write_text("# A model")
    result = run_here("checkpoints.push", f"export_dir={export_dir}", "repo=me/model")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("uploaded: https://example.org/commit\n")
    (_, created), (_, uploaded) = hub.calls
    assert created == {"repo": "me/model", "private": True, "exist_ok": True}
    assert (uploaded["repo_id"], uploaded["folder_path"]) == ("me/model", export_dir)
    assert uploaded["allow_patterns"] == [
        "README.md", "SHA256SUMS", "config.json", "generation_config.json", "model.safetensors", "modeling_kraken.py",
        "tokenizer.json", "tokenizer/kraken_tokenizer.json", "tokenizer/tokenizer.model", "tokenizer_config.json",
    ]  # fmt: skip


def test_errors(export_dir: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(repo: str = "me/model") -> str:
        return user_error(run_here("checkpoints.push", f"export_dir={export_dir}", f"repo={repo}"))

    for repo in ("model", "a/b/c", "me/my model"):
        assert f"repo={repo}" in refused(repo)
        assert "use ORG/NAME" in refused(repo)
    hub.failure = ClientError("no route to host")
    assert "me/model could not be written: no route to host; check the network" in refused()
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "no Hugging Face token; run `hf auth login`" in refused()
    hub.calls.clear()
    path = export_dir / "config.json"
    config = path.read_text()
    sums = (export_dir / "SHA256SUMS").rename(export_dir.with_name("sums"))
    path.write_text(json.dumps({name: value for name, value in json.loads(config).items() if name != "auto_map"}))
    assert "has no auto_map" in refused()
    path.write_text(config)
    sums.rename(export_dir / "SHA256SUMS")
    for name in ("tokenizer/tokenizer.model", "generation_config.json", "modeling_kraken.py", "model.safetensors"):
        (export_dir / name).unlink()
        assert Path(name).name in refused()
    assert not hub.calls
