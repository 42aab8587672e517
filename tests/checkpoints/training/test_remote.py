"""Checkpoints in object storage: on fsspec's own file systems, and on a real S3 server where one is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from helpers import wait_until
from small_checkpoints import equal, tensors

from checkpoints.training.background import CheckpointWriter
from checkpoints.training.manifest import MANIFEST, content_sha256, read_manifest
from checkpoints.training.remote import RemoteFolder, delete_newer_remote, download_newest, require_same_run
from checkpoints.training.retention import Retention
from checkpoints.training.store import SINGLE_PROCESS, find_good_checkpoint
from checkpoints.training.stored_tensors import StoredTensors
from kraken_train.common.errors import CheckpointError, ConfigError
from kraken_train.parallel.ranks import free_port

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # pytest resets the module's filter

KEYS = {
    "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
}  # fmt: skip


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """The address of a server of S3's protocol on this machine (moto), which holds a bucket `checkpoints`."""
    missing = [name for name in ("s3fs", "moto", "flask") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: pip install s3fs 'moto[server]'")
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        env={**os.environ, **KEYS},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        filesystem = fsspec.filesystem("s3", endpoint_url=address, key="test", secret="test")

        def make_bucket() -> bool:
            try:
                filesystem.mkdir("checkpoints")
            except Exception:  # not listening yet
                assert server.poll() is None, "the server has ended"
                return False
            return True

        wait_until(make_bucket)
        yield address
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(params=["memory", "file", "s3"])
def remote(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RemoteFolder:
    """An empty folder on each kind of file system."""
    if request.param == "s3":
        monkeypatch.setenv("AWS_ENDPOINT_URL", request.getfixturevalue("s3_server"))
        for name, value in KEYS.items():
            monkeypatch.setenv(name, value)
        return RemoteFolder(f"s3://checkpoints/{uuid.uuid4().hex}/run")
    if request.param == "file":
        return RemoteFolder(f"file://{tmp_path}/remote/run")
    return RemoteFolder(f"memory://{uuid.uuid4().hex}/run")


def writer(folder: Path, remote: RemoteFolder, retention: Retention, asynchronous: bool = False) -> CheckpointWriter:
    return CheckpointWriter(folder, retention, SINGLE_PROCESS, asynchronous=asynchronous, remote=remote)


def names(remote: RemoteFolder, step: int) -> set[str]:
    """Of all files of a checkpoint there, complete or not."""
    remote.filesystem.invalidate_cache()
    return {path.rpartition("/")[2] for path in remote.filesystem.find(f"{remote.root}/step-{step:08d}")}


def fetch(remote: RemoteFolder, folder: Path) -> list[str]:
    lines: list[str] = []
    download_newest(remote, folder, lines.append)
    return lines


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_new_machine_continues_from_the_newest(remote: RemoteFolder, tmp_path: Path, asynchronous: bool) -> None:
    remote.require_writable()
    assert remote.steps() == {}
    with writer(tmp_path / "here", remote, Retention(2, milestone=3), asynchronous) as saves:
        for step in range(1, 7):
            saves.save(step, tensors(step), {"updates": step, "run_id": "mine"})
    assert list(remote.steps()) == [3, 5, 6], "retention as in the run's folder"
    assert all(not names(remote, step) for step in (1, 2, 4)), "a deleted checkpoint has left files"
    assert fetch(remote, tmp_path / "there") == [f"copied the checkpoint of step 6 from {remote.url}"]
    checkpoint, problems = find_good_checkpoint(tmp_path / "there")
    assert (checkpoint.step, problems) == (6, [])
    here = read_manifest(tmp_path / "here" / "step-00000006")
    assert (checkpoint.metadata, checkpoint.files) == (here.metadata, here.files)
    assert equal(StoredTensors(checkpoint).read(), tensors(6))
    require_same_run(remote, "mine")
    with pytest.raises(CheckpointError, match="holds the checkpoints of run mine, and this is run other; use another"):
        require_same_run(remote, "other")
    delete_newer_remote(remote, 5)
    assert list(remote.steps()) == [3, 5]
    assert not names(remote, 6)


def test_a_failed_upload_ends_no_run(remote: RemoteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is reported, and the next checkpoint is copied; the end of the run raises what has become of the last one."""
    real, failures = RemoteFolder.upload_file, []

    def fails_at_even_steps(self: RemoteFolder, path: Path) -> None:
        if int(path.parent.name[-1]) % 2 == 0:
            raise CheckpointError("the network is gone")
        real(self, path)

    monkeypatch.setattr(RemoteFolder, "upload_file", fails_at_even_steps)

    def save_to(last: int) -> None:
        with CheckpointWriter(
            tmp_path / "here", Retention(9), SINGLE_PROCESS, asynchronous=True, remote=remote,
            on_upload_failed=lambda *failure: failures.append(failure),
        ) as saves:  # fmt: skip
            for step in range(1, last + 1):
                saves.save(step, tensors(step), {})

    save_to(3)
    assert list(remote.steps()) == [1, 3]
    ((step, reason),) = failures
    assert step == 2
    assert "step-00000002 is complete, but could not be copied: the network is gone" in reason
    with pytest.raises(CheckpointError, match="step-00000004 is complete, but could not be copied"):
        save_to(4)
    assert find_good_checkpoint(tmp_path / "here")[0].step == 4


def test_a_rollback_without_the_network(remote: RemoteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is discarded there is deleted with the next upload."""

    def unreachable(self: RemoteFolder) -> dict[int, float]:
        raise CheckpointError("the network is gone")

    failures: list[tuple[int, str]] = []
    with CheckpointWriter(
        tmp_path / "here", Retention(9), SINGLE_PROCESS, asynchronous=False, remote=remote,
        on_upload_failed=lambda *failure: failures.append(failure),
    ) as saves:  # fmt: skip
        for step in (1, 2, 3):
            saves.save(step, tensors(step), {})
        saves.finish()
        with monkeypatch.context() as patch:
            patch.setattr(RemoteFolder, "steps", unreachable)
            saves.discard_newer(read_manifest(tmp_path / "here" / "step-00000001"))
        assert failures == [(1, "the network is gone")]
        assert list(remote.steps()) == [1, 2, 3]
        saves.save(2, tensors(2), {})
        saves.finish()
        assert list(remote.steps()) == [1, 2]


def test_an_interrupted_upload_is_no_checkpoint(
    remote: RemoteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = RemoteFolder.upload_file

    def fails_at_the_manifest(self: RemoteFolder, path: Path) -> None:
        if path.name == MANIFEST and "00000002" in path.parent.name:
            raise CheckpointError("the network is gone")
        real(self, path)

    saves = writer(tmp_path / "here", remote, Retention(9))
    saves.save(1, tensors(1), {})
    saves.finish()
    with monkeypatch.context() as patch:
        patch.setattr(RemoteFolder, "upload_file", fails_at_the_manifest)
        saves.save(2, tensors(2), {})
        saves.finish()
    assert "the network is gone" in str(saves.upload_failure)
    assert names(remote, 2) == {".metadata", "__0_0.distcp"}
    assert list(remote.steps()) == [1]
    assert find_good_checkpoint(tmp_path / "here")[0].step == 2, "the one in the run's folder is complete"
    fetch(remote, tmp_path / "there")
    assert find_good_checkpoint(tmp_path / "there")[0].step == 1
    saves.save(2, tensors(2), {})  # as a run that has come to this step again
    saves.finish()
    assert list(remote.steps()) == [1, 2]


def test_damage_is_passed_over(remote: RemoteFolder, tmp_path: Path) -> None:
    with writer(tmp_path / "here", remote, Retention(9)) as saves:
        for step in (1, 2, 3, 4):
            saves.save(step, tensors(step), {})
    data = f"{remote.root}/step-00000004/__0_0.distcp"
    content = bytearray(remote.filesystem.cat_file(data))
    content[len(content) // 2] ^= 1
    remote.filesystem.pipe_file(data, bytes(content))
    path = tmp_path / "here" / "step-00000003" / MANIFEST
    manifest: dict[str, Any] = json.loads(path.read_text())["content"]
    manifest["files"]["../../outside"] = manifest["files"][".metadata"]
    changed = json.dumps({"content": manifest, "sha256": content_sha256(manifest)}).encode()
    remote.filesystem.pipe_file(f"{remote.root}/step-00000003/{MANIFEST}", changed)
    remote.filesystem.pipe_file(f"{remote.root}/step-00000002/{MANIFEST}", b"{")
    lines = fetch(remote, tmp_path / "there" / "checkpoints")
    assert [line.startswith("passed over a damaged checkpoint of") for line in lines] == [True, True, True, False]
    reasons = ("its SHA-256 is not", "its entry '../../outside' cannot be", "manifest.json is damaged")
    for line, reason in zip(lines, reasons, strict=False):
        assert reason in line
    assert find_good_checkpoint(tmp_path / "there" / "checkpoints")[0].step == 1
    delete_newer_remote(remote, 0)
    assert fetch(remote, tmp_path / "nothing there") == []


def test_one_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"remote_dir=nowhere://a cannot be used: .*nowhere.*kraken-train\[remote\]"):
        RemoteFolder("nowhere://a").require_writable()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"remote_dir=file://.*/file/run cannot be written to: "):
        RemoteFolder(f"file://{tmp_path}/file/run").require_writable()


def test_a_bucket_that_is_not_there(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not made: the name may be misspelt."""
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": s3_server}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CheckpointError, match=r"remote_dir=s3://chekpoints/run cannot be written to: .*bucket"):
        RemoteFolder("s3://chekpoints/run").require_writable()
