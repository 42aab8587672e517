"""Where a run is, as told from its folder: while it runs, after each way to end, and on what was left half written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import REPOSITORY, run_here, user_error, wait_until

from integration.training import overrides, records
from kraken_train.common.durations import duration
from kraken_train.run.exports import record_export
from kraken_train.run.logs import follow, merged
from kraken_train.run.next_step import next_step
from kraken_train.run.rank_errors import RankError, record_error
from kraken_train.run.state import RunState, read_state

ENOUGH_STEPS = 8  # the validation after step 6 included
MANY_STEPS = 100_000_000  # which no machine does while it is looked at
NOON = "2026-11-27T12:00:00+00:00"


@pytest.fixture(scope="module")
def running_and_interrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunState, Path]:
    """What was told of a run while it ran, and the run after SIGTERM."""
    run = tmp_path_factory.mktemp("status") / "cut"
    command = [sys.executable, "-m", "kraken_train.train", *overrides(data, run, f"max_steps={MANY_STEPS}")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        wait_until(lambda: process.poll() is not None or len(records_so_far(run)) >= ENOUGH_STEPS)
        state = read_state(run)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 143
    return state, run


def records_so_far(run: Path) -> list[str]:
    file = run / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def changed(running_and_interrupted: tuple[RunState, Path], tmp_path: Path) -> Callable[..., Path]:
    """`changed(change, *more)`: a copy of the interrupted run, with other events."""

    def copy(change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Path:
        run = tmp_path / "copy"
        shutil.copytree(running_and_interrupted[1], run)
        events = change([json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()])
        (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        return run

    return copy


def without_end(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] not in ("stopping", "ended")]


def test_finished(changed: Callable[..., Path]) -> None:
    run = changed(lambda events: [*events[:-2], events[-1] | {"outcome": "finished", "reason": None}])
    logged = records(run)
    last, steps = logged[-1], logged[-1]["step"]
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(f"max_steps: {MANY_STEPS}", f"max_steps: {steps}"))
    state = read_state(run)
    assert (state.state, state.step, state.max_steps) == ("finished", steps, steps)
    validation = [record["validation_loss"] for record in logged if "validation_loss" in record]
    assert (state.loss, state.validation_loss) == (last["loss"], validation[-1])
    assert state.checkpoint_step == steps
    assert state.seconds_left is None
    assert [(start.from_step, start.to_step, start.outcome) for start in state.starts] == [(0, steps, "finished")]
    assert "checkpoints.export" in next_step(state)

    shown = run_here("kraken_train.status", str(run))
    assert shown.returncode == 0
    for words in (
        "state       finished",
        f"step        {steps} of {steps} (100.0%)",
        f"loss        {last['loss']:.4f}",
    ):
        assert words in shown.stdout
    verified = run_here("kraken_train.status", str(run), "--verify")
    assert f"verified    step {steps}, all 2 files" in verified.stdout
    (told,) = json.loads(run_here("kraken_train.status", str(run), "--json").stdout)
    assert told["state"] == "finished"
    assert told["starts"][0]["hosts"] == [os.uname().nodename]


def test_running_and_interrupted(running_and_interrupted: tuple[RunState, Path]) -> None:
    running, run = running_and_interrupted
    assert running.state == "running"
    assert running.step >= ENOUGH_STEPS
    assert running.starts[-1].outcome == "running"
    tokens = 4 * 32  # per step
    assert running.tokens_per_second is not None
    left = (MANY_STEPS - running.step) * tokens / running.tokens_per_second
    assert running.seconds_left == pytest.approx(left, rel=0.1)
    assert "--log --follow" in next_step(running)

    state = read_state(run)
    assert (state.state, state.reason) == ("interrupted", "SIGTERM")
    assert state.checkpoint_step == state.step == records(run)[-1]["step"]
    assert "-m kraken_train.train" in next_step(state)
    assert f"run_dir={run}" in next_step(state)

    header, *rows = run_here("kraken_train.status", str(run), str(run)).stdout.splitlines()
    assert header.split()[:3] == ["run", "state", "step"]
    for row in rows:
        assert row.split()[:3] == [str(run), "interrupted", f"{state.step}/{MANY_STEPS}"]
    assert len(rows) == 2


def test_died(changed: Callable[..., Path]) -> None:
    """Killed: no end is told and nobody holds the lock, however fresh; on another machine, when it is old."""
    run = changed(without_end)
    (run / ".lock").touch()
    assert read_state(run).state == "died"
    (run / ".lock").write_text("process 1 on another-machine")
    in_an_hour, an_hour_ago = time.time() + 3600, time.time() - 3600
    os.utime(run / ".lock", (in_an_hour, in_an_hour))  # fresh, however long it takes to look
    assert read_state(run).state == "running"
    os.utime(run / ".lock", (an_hour_ago, an_hour_ago))
    assert read_state(run).state == "died"
    record_error(run / "starts" / "0001", RankError("t", 3, "n1", 7, "was killed by SIGKILL", None, False, True))
    shown = run_here("kraken_train.status", str(run)).stdout
    assert "rank 3 (process 7 on n1): was killed by SIGKILL" in shown
    assert "the same command continues" in shown

    (run / "starts" / "0002").mkdir()  # and the next start before it could tell anything
    state = read_state(run)
    assert state.state == "died"
    assert len(state.starts) == 2


@pytest.mark.parametrize(("helps", "words"), [(False, "do what the error says"), (True, "the same command continues")])
def test_failed(changed: Callable[..., Path], helps: bool, words: str) -> None:
    run = changed(lambda events: [*without_end(events), {"time": NOON, "event": "ended", "start": 1, "step": 9,
                                                         "outcome": "failed", "reason": "another rank"}])  # fmt: skip
    folder = run / "starts" / "0001"
    record_error(folder, RankError("2", 0, "n1", 7, "another rank has ended", None, True, True))
    record_error(folder, RankError("3", 1, "n2", 8, "the loss was not finite", None, False, helps))
    state = read_state(run)
    assert (state.state, state.reason) == ("failed", "rank 1 (process 8 on n2): the loss was not finite")
    assert [error.rank for error in state.errors] == [1]
    assert words in next_step(state)


def test_waiting(changed: Callable[..., Path]) -> None:
    requeued = {"time": NOON, "event": "requeued", "job": "17", "reason": "a node failed"}
    run = changed(lambda events: [*events, requeued])
    state = read_state(run)
    assert (state.state, state.reason) == ("waiting", "job 17 was requeued: a node failed")
    assert state.requeues == 1
    assert "squeue --job 17" in next_step(state)
    # Its next start has died before it could tell of itself.
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": NOON, "event": "allocated", "job": "17", "earlier_starts": 1}) + "\n")
    assert read_state(run).state == "waiting"
    (run / "starts" / "0002").mkdir()
    assert read_state(run).state == "died"


def test_what_is_half_written(changed: Callable[..., Path]) -> None:
    run = changed(lambda events: events)
    before = read_state(run)
    for name in ("events.jsonl", "metrics.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"time": "2026-')
    (run / "config.yaml").write_text("max_steps: [")
    (run / "starts" / "0001" / "environment.json").write_text("{")
    (run / "checkpoints" / "step-00999999").mkdir()
    state = read_state(run)
    assert (state.state, state.step, state.loss) == (before.state, before.step, before.loss)
    assert state.max_steps == before.max_steps  # from the settings of its start
    assert state.command is None
    assert state.checkpoint_step == before.checkpoint_step
    assert state.damaged_checkpoints == (f"{run}/checkpoints/step-00999999/manifest.json is missing",)
    assert run_here("kraken_train.status", str(run)).returncode == 0


def finished(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [*events[:-2], events[-1] | {"outcome": "finished", "reason": None}]


def newest(run: Path, name: str) -> Path:
    return max((run / "checkpoints").glob("step-*")) / name


def truncate_all(run: Path) -> None:
    for file in (run / "checkpoints").glob("*/*.distcp"):
        os.truncate(file, 100)


def replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


EXPORT, AGAIN, FROM_START = "python -m checkpoints.export run_dir={run} ", "do the steps after {before} again: cd", (
    "there is no checkpoint, so the same command trains from the start: cd"
)  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "problem", "step", "then"),
    [
        (lambda run: shutil.rmtree(run / "checkpoints"), None, None, FROM_START),
        (lambda run: newest(run, "__0_0.distcp").write_bytes(b""), "has 0 bytes instead of", "before", AGAIN),
        (lambda run: os.truncate(newest(run, ".metadata"), 9), "has 9 bytes instead of", "before", AGAIN),
        (lambda run: newest(run, "__0_0.distcp").unlink(), "__0_0.distcp is missing", "before", AGAIN),
        (lambda run: newest(run, "manifest.json").write_bytes(b""), "manifest.json is damaged", "before", AGAIN),
        (lambda run: replace_by_folder(newest(run, "manifest.json")), "json cannot be read", "before", AGAIN),
        (truncate_all, "has 100 bytes instead of", None, "first restore a checkpoint from a copy, or mv {run}/checkp"),
        (lambda run: (run / "checkpoints" / "latest").write_text("step-00099999"), None, "last", EXPORT),
        (lambda run: (run / "run.json").unlink(), "{run}/run.json is missing", "last", EXPORT),
        (lambda run: (run / "run.json").write_bytes(b""), "{run}/run.json is damaged", "last", "first rm {run}/run."),
        (lambda run: (run / "metrics.jsonl").unlink(), "{run}/metrics.jsonl is missing", "last", EXPORT),
        (lambda run: (run / "config.yaml").unlink(), "{run}/config.yaml is missing", "last", EXPORT),
    ],
)  # fmt: skip
def test_it_says_what_is_there(
    changed: Callable[..., Path], damage: Callable[[Path], object], problem: str | None, step: str | None, then: str
) -> None:
    """Of a finished run, and what can be done with it."""
    run = changed(finished)
    before, last = sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))[-2:]
    damage(run)
    state = read_state(run)
    assert state.state == "finished"
    assert state.checkpoint_step == {"before": before, "last": last, None: None}[step]
    told = [*state.damaged_checkpoints, *state.problems]
    assert len(told) == (0 if problem is None else 3 if damage is truncate_all else 1), told
    shown = run_here("kraken_train.status", str(run)).stdout
    assert problem is None or problem.format(run=run) in shown
    assert next_step(state).startswith(then.format(run=run, before=before))
    if then in (EXPORT, AGAIN):
        command = next_step(state).rpartition("python -m ")[2].split()
        exported = run_here(command[0], *command[1:-1], f"output_dir={run.with_name('export')}")
        assert f"exported step {state.checkpoint_step}" in exported.stdout, exported.stderr


def test_the_command_that_is_told_continues_the_copy(changed: Callable[..., Path]) -> None:
    """Not the folder that it was copied from; also where its settings would refuse to."""
    run = changed(finished)
    shutil.rmtree(run / "checkpoints")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("resume: auto", "resume: must"))
    told = next_step(read_state(run)).partition("from the start: ")[2]
    assert told.endswith(f" run_dir={run} resume=auto")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(f"{told} max_steps=1", shell=True, env=environment, capture_output=True, check=False)
    assert ended.returncode == 0, ended.stderr
    state = read_state(run)
    assert (state.state, state.step, state.checkpoint_step) == ("finished", 1, 1)


def test_what_was_exported(changed: Callable[..., Path], data: Path) -> None:
    run = changed(finished)
    step = read_state(run).step
    record_export(run, run / "gone", step)
    shown = run_here("kraken_train.status", str(run)).stdout
    assert f"export      step {step} in {run}/gone, which is gone" in shown
    assert "next        python -m checkpoints.export" in shown
    export = run / "export"
    export.mkdir()
    for name in ("config.json", "model.safetensors"):
        (export / name).touch()
    record_export(run, export, step)
    shutil.rmtree(run / "checkpoints")
    assert next_step(read_state(run)) == f"python -m kraken_train.evaluate export_dir={export} data_dir={data}"
    (run / "exports.jsonl").write_text("{")
    assert "exports.jsonl is damaged" in " ".join(read_state(run).problems)


def test_what_the_command_needs(changed: Callable[..., Path], data: Path) -> None:
    run = changed(lambda events: events)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(data), "/gone/data"))
    assert "missing     data_dir=/gone/data" in run_here("kraken_train.status", str(run)).stdout
    assert next_step(read_state(run)).startswith("first bring back data_dir=/gone/data; the same command continues: ")
    (run / "run.json").unlink()
    shutil.rmtree(run / "checkpoints")
    assert next_step(read_state(run)).startswith(f"first restore {run}/run.json from a copy of the run; first bring")


def test_without_events_the_end_is_not_known(changed: Callable[..., Path]) -> None:
    run = changed(lambda events: events)
    (run / "events.jsonl").unlink()
    state = read_state(run)
    assert (state.state, state.starts[-1].outcome) == ("not known", "not known")
    shown = run_here("kraken_train.status", str(run)).stdout
    assert "1: there are no events of it" in shown
    assert f"problem     {run}/events.jsonl is missing" in shown


def test_folders_without_a_run(tmp_path: Path) -> None:
    assert "is empty" in user_error(run_here("kraken_train.status", str(tmp_path)))
    (tmp_path / "thesis.tex").touch()
    assert "holds no run (run.json is missing)" in user_error(run_here("kraken_train.status", str(tmp_path)))
    assert "is not a folder" in user_error(run_here("kraken_train.status", str(tmp_path / "nothing")))


def test_it_starts_without_torch() -> None:
    """Which takes seconds to import."""
    code = "import kraken_train.status, launch.node, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def test_logs_of_all_ranks(tmp_path: Path) -> None:
    logs = tmp_path / "starts" / "0001" / "logs"
    logs.mkdir(parents=True)
    stamp = "2026-01-31T23:59:0{}.000+00:00 "
    (logs / "rank-0000.log").write_text(f"{stamp.format(1)}one\n{stamp.format(4)}four\n  with more\n")
    (logs / "rank-0001.log").write_text(f"{stamp.format(2)}two\n{stamp.format(3)}three\n")
    lines = [line.partition(" ")[2] for line in merged(logs)]
    assert lines == ["rank 0 | one", "rank 1 | two", "rank 1 | three", "rank 0 | four", "rank 0 |   with more"]
    assert [line.partition(" ")[2] for line in merged(logs, last=2)] == lines[-2:]
    shown = run_here("kraken_train.status", str(tmp_path), "--log", "1").stdout
    assert shown == f"{stamp.format(4)}rank 0 |   with more\n"
    assert "--start 7: " in user_error(run_here("kraken_train.status", str(tmp_path), "--start", "7"))

    def goes_on() -> bool:
        """Once: a rank writes a line, and another one's is half written."""
        if not (logs / "rank-0002.log").exists():
            (logs / "rank-0002.log").write_text(f"{stamp.format(5)}five\n{stamp.format(6)}si")
            return True
        with (logs / "rank-0002.log").open("a") as file:
            file.write("x\n")
        return False

    assert [line.partition(" ")[2] for line in follow(logs, 1, goes_on)] == [lines[-1], "rank 2 | five", "rank 2 | six"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (61, "1 min"), (7300, "2 h 1 min"), (864_000 + 3600, "10 d 1 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
