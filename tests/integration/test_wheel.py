"""A wheel in an environment of its own, started from another folder: what it needs of conf/ and launch/ is in it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from helpers import REPOSITORY

pytest.importorskip("build", reason="build is not installed (the extra dev)")


def run(*command: str, folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_a_wheel_works_elsewhere(tmp_path: Path) -> None:
    source = tmp_path / "source"
    run("git", "clone", "--quiet", str(REPOSITORY), str(source), folder=tmp_path)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source),
        folder=tmp_path)  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    run(sys.executable, "-m", "venv", "venv", folder=tmp_path)
    # The dependencies are those of this environment; its own editable install is not found through a .pth file.
    (site_packages,) = (tmp_path / "venv" / "lib").glob("python3*/site-packages")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    run("venv/bin/pip", "install", "--quiet", "--no-deps", str(wheel), folder=tmp_path)

    where = run("venv/bin/python", "-c", "import conf, checkpoints, launch.slurm.script as s; print(s.__file__)",
                folder=tmp_path)  # fmt: skip
    assert where.startswith(str(site_packages))
    scripts = tmp_path / "venv" / "bin"
    run(str(scripts / "kraken-prepare"), "source=embedded", "max_documents=60", "validation_fraction=0.1",
        "tokenizer.vocab_size=600", "output_dir=data", folder=tmp_path)  # fmt: skip
    run(str(scripts / "kraken-train"), "model=kraken-tiny-2way", "data_dir=data", "run_dir=run", "max_steps=2",
        "validation.every=0", folder=tmp_path)  # fmt: skip
    run(str(scripts / "kraken-export"), "run_dir=run", "output_dir=export", folder=tmp_path)
    assert "finished" in run(str(scripts / "kraken-status"), "run", folder=tmp_path)
    shipped = {path.name for path in (site_packages / "launch" / "slurm").glob("*.sbatch")}
    assert shipped == {path.name for path in (REPOSITORY / "launch" / "slurm").glob("*.sbatch")} != set()
