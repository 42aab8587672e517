"""A copy of the code beside a run, so that a requeued job continues with the code that was submitted.

`python FOLDER MODULE ARGUMENTS...` runs a module of the copy as `python -m` would, but the copy comes first: before
the current folder, which `-m` would prefer, and before what is installed.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from kraken_train.run.start import COMMIT_FILE, git_commit

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("kraken_train", "data_prep", "checkpoints", "launch", "conf")
KEPT = ("*.py", "*.yaml", "*.sbatch")
STARTER = '''"""Runs a module of this folder: python FOLDER MODULE ARGUMENTS..."""

import os
import runpy
import sys

if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    # For what is started from here with -m; PYTHONSAFEPATH is understood by Python 3.11 and newer.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    os.environ["PYTHONSAFEPATH"] = "1"
    sys.path[0] = here
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
'''


def write_snapshot(folder: Path) -> None:
    """Copy the code that runs now into `folder`, which is created. Raises OSError."""
    folder.mkdir()
    for part in PARTS:
        for pattern in KEPT:
            for source in (ROOT / part).rglob(pattern):
                target = folder / source.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
    (folder / "__main__.py").write_text(STARTER, encoding="utf-8")
    (folder / COMMIT_FILE).write_text((git_commit() or "") + "\n", encoding="utf-8")
