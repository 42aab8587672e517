"""Traces of steps: which steps they have, and who asks for them."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
import torch

from kraken_train.common.errors import ConfigError
from kraken_train.parallel.ranks import Runtime
from kraken_train.run.folder import RunFolder
from kraken_train.settings.inspection import ProfileConfig
from kraken_train.training.profiler import StepProfiler, require_usable

ONE_RANK = Runtime(0, 0, 1, 1)


def run_of(path: Path) -> RunFolder:
    run = RunFolder(path / "run", "id", resuming=False, start_number=1)
    run.start.mkdir(parents=True)
    return run


def traced(run: RunFolder) -> dict[str, list[int]]:
    """The steps of each trace, by its name; each has the product of its step."""
    found = {}
    for path in sorted((run.start / "profiles").glob("*")):
        names = [event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]
        steps = [int(name.split()[1]) for name in names if str(name).startswith("step ")]
        assert names.count("aten::mm") == len(steps)
        found[path.name] = sorted(steps)
    return found


def do_steps(profiler: StepProfiler, steps: range, log_every: int = 1) -> None:
    for step in steps:
        with profiler.of_step(step, may_begin=(step - 1) % log_every == 0):
            torch.eye(2) @ torch.eye(2)


def test_the_steps_of_the_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path)
    with StepProfiler(ProfileConfig(steps=(3, 4)), run, ONE_RANK) as profiler:
        do_steps(profiler, range(1, 7))
    assert traced(run) == {"rank-00000-steps-3-4.json.gz": [3, 4]}
    assert "rank-00000-steps-3-4.json.gz; open it at" in capsys.readouterr().err
    with StepProfiler(ProfileConfig(steps=(3, 4), ranks=(1,)), run, ONE_RANK) as profiler:
        do_steps(profiler, range(1, 7))
    assert len(traced(run)) == 1


def test_a_run_that_continues_or_ends_within_the_steps(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    with pytest.raises(ArithmeticError), StepProfiler(ProfileConfig(steps=(3, 9)), run, ONE_RANK) as profiler:
        do_steps(profiler, range(5, 8))
        raise ArithmeticError
    assert traced(run) == {"rank-00000-steps-5-7.json.gz": [5, 6, 7]}


def test_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path)
    request = run.path / "profile"

    def ask(text: str, time: int) -> None:
        request.write_text(text)
        os.utime(request, (time, time))

    ask("5\n", 1)  # of an earlier start
    with StepProfiler(ProfileConfig(), run, ONE_RANK) as profiler:
        do_steps(profiler, range(1, 3))
        ask("2\n", 2)
        do_steps(profiler, range(3, 10), log_every=4)  # read before step 5
        ask("many\n", 3)
        do_steps(profiler, range(10, 12))
        ask("1\n", 4)
        do_steps(profiler, range(12, 14))
    assert traced(run) == {"rank-00000-steps-12-12.json.gz": [12], "rank-00000-steps-5-6.json.gz": [5, 6]}
    assert "profile must hold a number of steps from 1 to 100; nothing is traced" in capsys.readouterr().err


def test_a_disk_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path)
    (run.start / "profiles").touch()  # where the folder would be
    with StepProfiler(ProfileConfig(steps=(1, 1)), run, ONE_RANK) as profiler:
        do_steps(profiler, range(1, 3))
    assert "note: the trace could not be written: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ProfileConfig(ranks=(0, 4)), r"profile.ranks=\[0, 4\]: there is no rank 4 among the 1 of this run"),
        (ProfileConfig(memory=True), "profile.memory=true records the memory of a GPU"),
    ],
)
def test_unusable(config: ProfileConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        require_usable(config, ONE_RANK)


@pytest.mark.parametrize("steps", [(3,), (5, 4), (0, 2), (1, 2, 3)])
def test_settings(steps: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="must be the first and the last step"):
        ProfileConfig(steps=steps).validate()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_and_kernels_of_a_gpu(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    runtime = Runtime(0, 0, 1, 1)
    with StepProfiler(ProfileConfig(steps=(1, 1), memory=True), run, runtime) as profiler, profiler.of_step(1, True):
        torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")
    names = {path.name for path in (run.start / "profiles").glob("*")}
    assert names == {"rank-00000-steps-1-1.json.gz", "rank-00000-steps-1-1-memory.pickle"}
    trace = gzip.decompress((run.start / "profiles" / "rank-00000-steps-1-1.json.gz").read_bytes())
    assert any(event.get("cat") == "kernel" for event in json.loads(trace)["traceEvents"])
