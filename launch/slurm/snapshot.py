"""A copy of the code in the folder of a submission, so that a requeued job runs the code that was submitted.

`python FOLDER MODULE ARGUMENTS...` runs a module of the copy as `python -m` would. The copy comes first in the module
search path: before the current folder, which `-m` puts first, and before installed packages.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from kraken_train.run.start import COMMIT_FILE, git_commit

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kraken_train", "data_prep", "checkpoints", "launch", "conf")
FILES = ("*.py", "*.yaml", "*.sbatch")
STARTER = '''"""Runs a module of this folder: python FOLDER MODULE ARGUMENTS..."""

import os
import runpy
import sys

if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    # For processes that this one starts with -m. PYTHONSAFEPATH has an effect in Python 3.11 and newer.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    os.environ["PYTHONSAFEPATH"] = "1"
    sys.path[0] = here
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
'''


def write_snapshot(folder: Path) -> None:
    """Create `folder` and copy the running code into it. Raises OSError."""
    folder.mkdir()
    for name in FOLDERS:
        for pattern in FILES:
            for source in (ROOT / name).rglob(pattern):
                target = folder / source.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
    (folder / "__main__.py").write_text(STARTER, encoding="utf-8")
    (folder / COMMIT_FILE).write_text((git_commit() or "") + "\n", encoding="utf-8")
