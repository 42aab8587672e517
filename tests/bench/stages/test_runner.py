"""The stages' order, limits and records, with commands that do nothing."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from helpers import wait_until

from kraken_train.bench.acceptance import STAGES, AcceptanceConfig, choose_preset, choose_stages
from kraken_train.bench.stages.one_gpu import outcome_of_tests
from kraken_train.bench.stages.preset import MANY_GPUS, ONE_GPU, load_preset
from kraken_train.bench.stages.record import DONE, FAILED, TIMED_OUT, read_record
from kraken_train.bench.stages.runner import Runner, end
from kraken_train.bench.stages.stage import Command, Stage, Workplace
from kraken_train.common.errors import ConfigError

HANGS = "import time; time.sleep(1000)"
WRITES = "open('{}', 'a').write('x')"
PRESET = dataclasses.replace(load_preset("cpu"), limit_factor=1)


def python(code: str) -> Command:
    return Command((sys.executable, "-c", code))


def stage(name: str, code: str, minutes: float = 1.0, figures: dict[str, float] | None = None) -> Stage:
    return Stage(name, minutes, "a test", lambda place: [python(code)], lambda place: figures or {})


def runner(folder: Path) -> Runner:
    return Runner(PRESET, folder / "out", folder / "work", "a test's", lambda line: None)


def statuses(folder: Path, stages: Sequence[Stage]) -> list[str | None]:
    records = [read_record(folder / "out", each.name) for each in stages]
    return [None if record is None else record.status for record in records]


def test_a_failure_and_a_limit_hold_nothing_up(tmp_path: Path) -> None:
    stages = [
        stage("fails", "raise SystemExit('what went wrong')"),
        stage("hangs", HANGS, minutes=0),
        Stage("misses a file", 1, "", lambda place: [python("")], lambda place: place.read("missing.json")),
        stage("works", "", figures={"speed": 3.0}),
    ]
    assert runner(tmp_path).run(stages) == []
    assert statuses(tmp_path, stages) == [FAILED, TIMED_OUT, FAILED, DONE]
    failed, missed, works = (read_record(tmp_path / "out", stages[number].name) for number in (0, 2, 3))
    assert failed is not None
    assert "what went wrong" in failed.message
    assert "exit code 1" in failed.message
    assert missed is not None
    assert "FileNotFoundError" in missed.message
    assert works is not None
    assert works.figures == {"speed": 3.0}


def test_accepted_exit_codes(tmp_path: Path) -> None:
    command = dataclasses.replace(python("raise SystemExit(1)"), accepted=(0, 1))
    stages = [Stage("accepts", 1, "", lambda place: [command], lambda place: {"failed": 2})]
    runner(tmp_path).run(stages)
    assert statuses(tmp_path, stages) == [DONE]


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        ("3 passed, 2 skipped, 10 deselected in 4.2s", {"passed": 3, "failed": 0, "error": 0, "skipped": 2}),
        ("1 failed, 1 passed, 2 errors in 1.0s", {"passed": 1, "failed": 1, "error": 2, "skipped": 0}),
    ],
)
def test_outcome_of_tests(tmp_path: Path, last: str, expected: dict[str, int]) -> None:
    (tmp_path / "output.log").write_text(f"5 passed it says\nFAILED tests/a.py::test_b - AssertionError\n{last}\n")
    found = outcome_of_tests(Workplace(PRESET, tmp_path, tmp_path))
    assert found == {**expected, "what failed": "tests/a.py::test_b"}


def test_nothing_is_left_of_a_stage_that_is_ended(tmp_path: Path) -> None:
    """Not even processes in a session of their own, as ranks of torchrun are."""
    file = tmp_path / "pid"
    code = (
        "import subprocess, sys, pathlib, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', '{HANGS}'], start_new_session=True)\n"
        f"pathlib.Path({str(file)!r}).write_text(str(child.pid))\n"
        "time.sleep(1000)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    child = int(wait_until(lambda: file.exists() and file.read_text()))
    end(process)
    assert process.returncode is not None
    wait_until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE)


def test_what_is_done_is_skipped(tmp_path: Path) -> None:
    marks = {name: tmp_path / name for name in ("done", "failing")}
    stages = [
        stage("done", WRITES.format(marks["done"])),
        stage("failing", f"{WRITES.format(marks['failing'])}; raise SystemExit(1)"),
    ]
    for _ in range(2):
        runner(tmp_path).run(stages)
    assert marks["done"].read_text() == "x"
    assert marks["failing"].read_text() == "xx"
    runner(tmp_path).run(stages[:1], again=True)
    assert marks["done"].read_text() == "xx"
    other = stage("done", WRITES.format(marks["done"]) + "; 'another command'")
    runner(tmp_path).run([other])
    assert marks["done"].read_text() == "xxx"


def test_what_has_never_run_comes_first(tmp_path: Path) -> None:
    order = tmp_path / "order"
    write = "open('{}', 'a').write('{} '); raise SystemExit(1)"
    first, second = (stage(name, write.format(order, name)) for name in ("first", "second"))
    runner(tmp_path).run([first])
    runner(tmp_path).run([first, second])
    assert order.read_text() == "first second first "


def test_pieces(tmp_path: Path) -> None:
    stages = [stage("long", "", minutes=9), stage("short", "", minutes=1)]
    assert runner(tmp_path).run(stages, piece_seconds=100) == ["long"]
    assert statuses(tmp_path, stages) == [None, DONE]
    assert runner(tmp_path).run(stages, piece_seconds=541) == []
    assert statuses(tmp_path, stages) == [DONE, DONE]


@pytest.mark.parametrize(("which", "preset"), [(ONE_GPU, "one_gpu"), (MANY_GPUS, "eight_gpus")])
def test_declared_stages(which: str, preset: str, tmp_path: Path) -> None:
    """They take 24 minutes without those of vLLM, their limits fit into pieces of 9, and each has commands for GPUs."""
    stages = STAGES[which]
    assert sum(each.minutes for each in stages if not each.name.startswith("vllm")) == 24
    place = Workplace(load_preset(preset), tmp_path, tmp_path / "data")
    assert max(place.preset.minutes(each.minutes) for each in stages) < 9
    for each in stages:
        commands = list(each.commands(place))
        assert commands, each.name
        assert not any("DS_ACCELERATOR" in command.environment for command in commands)


def config(**changes: object) -> AcceptanceConfig:
    settings = {"preset": "auto", "stages": None, "again": False, "piece_minutes": None}
    return AcceptanceConfig(**{**settings, "output_dir": "out", "work_dir": "work", **changes})  # type: ignore[arg-type]


def test_choice_of_the_preset() -> None:
    assert choose_preset("auto", 0).device == "cpu"
    assert choose_preset("auto", 1) == choose_preset("auto", 4) == load_preset("one_gpu")
    assert choose_preset("auto", 8) == load_preset("eight_gpus")
    assert choose_preset("cpu", 8).sets == (ONE_GPU, MANY_GPUS)
    with pytest.raises(ConfigError, match="preset=eight_gpus needs 8 GPUs, and PyTorch sees 2"):
        choose_preset("eight_gpus", 2)


def test_choice_of_stages() -> None:
    one = load_preset("one_gpu")
    assert [each.name for each in choose_stages(config(stages=("speed", "machine")), one)] == ["machine", "speed"]
    assert len(choose_stages(config(piece_minutes=9), one)) == len(STAGES[ONE_GPU])
    with pytest.raises(ConfigError, match="stages=curve"):
        choose_stages(config(stages=("curve",)), one)
    with pytest.raises(ConfigError, match=r"piece_minutes=5 is less than the 8\.4 minutes"):
        choose_stages(config(piece_minutes=5), one)
