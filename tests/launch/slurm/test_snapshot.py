"""The copy of the code that a submission's jobs run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from helpers import REPOSITORY

from launch.slurm.snapshot import write_snapshot


def test_the_copy_is_imported_first(tmp_path: Path) -> None:
    """Before the code in the current folder and before installed code."""
    code = tmp_path / "code"
    write_snapshot(code)
    (code / "kraken_train" / "probe.py").write_text(
        "import sys, launch, kraken_train.common.cli as cli\n"
        "print(launch.__file__, cli.CONF_DIR, __name__, sys.argv[1:])\n"
    )
    result = subprocess.run(
        [sys.executable, str(code), "kraken_train.probe", "a=1"],
        cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout.split(" ", 3) == [f"{code}/launch/__init__.py", f"{code}/conf", "__main__", "['a=1']\n"]
