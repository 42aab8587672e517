"""Sweeps on the command line of `launch.submit`."""

from __future__ import annotations

from launch.stages import expand_sweeps


def test_expand_sweeps() -> None:
    assert expand_sweeps(["a=1", "run_dir=r,1"]) == [("a=1", "run_dir=r,1")]
    runs = expand_sweeps(["run_dir=runs", "optim.lr=1e-3,2e-3", "model=choice(x/y,z)", "seed=range(0,2)"])
    assert len(runs) == 8
    assert runs[0] == ("optim.lr=0.001", "model=x/y", "seed=0", "run_dir=runs/optim.lr=0.001,model=x_y,seed=0")
