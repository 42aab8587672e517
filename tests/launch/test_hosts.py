"""Hostfiles, and the options that select hosts and slots."""

from __future__ import annotations

from pathlib import Path

import pytest

from kraken_train.common.errors import ConfigError
from launch.hosts import Slots, choose, read_hostfile


def test_read_hostfile(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# comment\nnode-1 slots=2\n\n  node-2   slots=4  # comment\n")
    hosts = {"node-1": ["0", "1"], "node-2": ["0", "1", "2", "3"]}
    assert read_hostfile(file) == hosts
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert read_hostfile(file) == hosts, "byte order mark and line ends of Windows"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node-1\n", r"hosts:1: 'node-1' must be a host and its GPUs"),
        ("node-1 slots=two\n", "hosts:1: .* must be a host"),
        ("a slots=1\nb slots=1\na slots=2\n", "hosts:3: a is listed twice"),
        ("localhost slots=1\n127.0.0.1 slots=1\n", "hosts:2: 127.0.0.1 is listed twice, as localhost"),
        ("a slots=1000000000\n", "hosts:1: .* must be a host"),
        ("a slots=0\n", "hosts:1: a has slots=0"),
        ("# nothing\n", "names no host"),
        (None, "hosts does not exist; name a file"),
    ],
)
def test_wrong_hostfiles(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "hosts"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_hostfile(file)


HOSTS: Slots = {"a": ["0", "1"], "b": ["0", "1", "2"]}


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        (("", "", None, None), HOSTS),
        (("", "", 1, None), {"a": ["0", "1"]}),
        (("", "", None, 1), {"a": ["0"], "b": ["0"]}),
        (("b:0,2", "", None, None), {"b": ["0", "2"]}),
        (("b@a:1", "", None, None), {"a": ["1"], "b": ["0", "1", "2"]}),
        (("", "a@b:1", None, None), {"b": ["0", "2"]}),
    ],
)
def test_choose(options: tuple[str, str, int | None, int | None], chosen: Slots) -> None:
    assert choose(HOSTS, *options) == chosen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("", "", 3, None), "--num_nodes 3 is more than the 2 in --hostfile [(]a, b[)]"),
        (("", "", None, 3), "--num_gpus 3 is more than a has [(]slots=2[)]"),
        (("", "", None, 0), "--num_gpus 0 must be at least 1"),
        (("c", "", None, None), "there is no host 'c'; use a, b"),
        (("a:7", "", None, None), "a has no slot '7'; use 0, 1"),
        (("", "a@b", None, None), "leaves no slot"),
        (("a", "", 1, None), "use one"),
    ],
)
def test_wrong_choices(options: tuple[str, str, int | None, int | None], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose(HOSTS, *options)
