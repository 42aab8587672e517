"""Every console script: it is a command of `python -m`, and says what it does and which version it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers import REPOSITORY, run_module

from kraken_train import __version__

SCRIPTS = dict(
    re.findall(
        r'^(kraken-[a-z-]+) = "([\w.]+):main"$', (REPOSITORY / "pyproject.toml").read_text("utf-8"), re.MULTILINE
    )
)
INTERNAL = {"launch.node", "launch.restart", "launch.slurm.snapshot", "kraken_train.common.locales",
            "kraken_train.bench.stages.program", "kraken_train.bench.stages.without_cudnn"}  # fmt: skip


@pytest.mark.parametrize("module", SCRIPTS.values(), ids=SCRIPTS)
def test_help_and_version(module: str) -> None:
    described = run_module(module, "--help")
    assert described.returncode == 0, described.stderr
    assert described.stdout.startswith(f"usage: python -m {module}")
    assert f"python -m {module} " in described.stdout.partition("\n\n")[2], "an example"
    version = run_module(module, "--version")
    assert (version.returncode, version.stdout.strip()) == (0, f"kraken-train {__version__}")


def test_every_command_has_a_script() -> None:
    sources = {path: path.read_text("utf-8") for name in ("kraken_train", "data_prep", "checkpoints", "launch")
               for path in (REPOSITORY / name).rglob("*.py")}  # fmt: skip
    commands = {name_of(path) for path, text in sources.items() if '__name__ == "__main__"' in text}
    assert commands - INTERNAL == set(SCRIPTS.values())


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
