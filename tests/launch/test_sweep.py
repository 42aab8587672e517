"""Sweeps on one machine: what runs when, where, and what a second call leaves alone."""

from __future__ import annotations

import os
import platform
import shlex
import signal
import sys
import textwrap
from pathlib import Path

import pytest
from helpers import run_here, run_module, user_error

from kraken_train.common.errors import ConfigError
from kraken_train.run.metrics import read_run
from launch.local_queue import KEEP_FREED_MEMORY, Job, Place, environment, interrupt_on_sigterm, places, run_jobs

ANYWHERE = [Place(()), Place(())]


def job(folder: Path, name: str, *programs: str) -> Job:
    commands = tuple((sys.executable, "-c", program) for program in programs)
    return Job(name, commands, folder / "logs" / f"{name}.log")


def test_places() -> None:
    assert places(None, [0, 1, 2, 3], []) == [Place((0, 1, 2, 3))]
    assert places(2, [3, 5, 6], []) == [Place((3,)), Place((5,))]
    assert places(None, [0, 1, 2, 3], ["2", "GPU-5"]) == [Place((0, 1), "2"), Place((2, 3), "GPU-5")]
    assert places(3, [], []) == [Place(()), Place(()), Place(())]
    for workers, cores, gpus, message in (
        (3, [0, 1], [], "workers=3, but there are 2 cores here"),
        (2, [0, 1], ["0"], "workers=2, but there are 1 GPUs here"),
        (0, [0], [], "workers=0"),
    ):
        with pytest.raises(ConfigError, match=message):
            places(workers, cores, gpus)


def test_as_many_at_a_time_as_there_are_places(tmp_path: Path) -> None:
    """The first two wait for each other. The third would see that one of them runs if it began before they ended."""
    a, b = tmp_path / "a", tmp_path / "b"
    meet = "import pathlib, time\npathlib.Path({!r}).touch()\nwhile not pathlib.Path({!r}).exists(): time.sleep(0.01)"
    jobs = [job(tmp_path, "1", meet.format(str(a), str(b))), job(tmp_path, "2", meet.format(str(b), str(a)))]
    assert run_jobs(jobs, ANYWHERE, lambda line: None) == []

    running = tmp_path / "running"
    alone = f"import pathlib\np = pathlib.Path({str(running)!r})\np.touch(exist_ok=False)\np.unlink()"
    assert run_jobs([job(tmp_path, str(i), alone) for i in range(4)], ANYWHERE[:1], lambda line: None) == []


def test_a_failure_stops_its_own_commands_only(tmp_path: Path) -> None:
    lines: list[str] = []
    after = tmp_path / "after"
    jobs = [
        job(tmp_path, "bad", "print('why'); raise SystemExit(3)", f"open({str(after)!r}, 'w')"),
        job(tmp_path, "good", "print('one')", "print('two')"),
    ]
    assert run_jobs(jobs, ANYWHERE[:1], lines.append) == jobs[:1]
    assert not after.exists()
    assert jobs[1].log.read_text() == "one\ntwo\n"
    assert [line.split(" after")[0] for line in lines] == [
        "started bad (1 of 2)", "FAILED bad", "started good (2 of 2)", "finished good"
    ]  # fmt: skip
    assert "exit code 3: why (see " in lines[1]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot bind a process to cores")
def test_cores_and_gpu_of_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = os.sched_getaffinity(0)
    core = max(before)
    told = job(
        tmp_path,
        "where",
        "import os; print(os.sched_getaffinity(0), os.environ['OMP_NUM_THREADS'], os.environ['CUDA_VISIBLE_DEVICES'])",
    )
    assert run_jobs([told], [Place((core,), "GPU-7")], lambda line: None) == []
    assert told.log.read_text() == f"{{{core}}} 1 GPU-7\n"
    assert os.sched_getaffinity(0) == before


def test_a_place_on_a_cpu_keeps_freed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KEEP_FREED_MEMORY:
        monkeypatch.delenv(name, raising=False)
    assert environment(Place((0,))).items() >= KEEP_FREED_MEMORY.items()
    assert not environment(Place((0,), "GPU-7")).keys() & KEEP_FREED_MEMORY
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "7")
    assert environment(Place((0,)))["MALLOC_MMAP_MAX_"] == "7"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are of glibc")
def test_glibc_keeps_freed_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Further faults of pages when 64 MB are allocated, filled and freed ten times, after the first time."""
    script = textwrap.dedent("""
        import ctypes, resource
        libc = ctypes.CDLL(None)
        libc.malloc.restype = ctypes.c_void_p
        libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
        faults = []
        for _ in range(11):
            memory = libc.malloc(2**26)
            ctypes.memset(memory, 1, 2**26)
            libc.free(memory)
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        print(faults[-1] - faults[0])
    """)
    for name in KEEP_FREED_MEMORY:
        monkeypatch.delenv(name, raising=False)
    found = {}
    for name, place in (("kept", Place(())), ("returned", Place((), "none"))):
        asked = job(tmp_path, name, script)
        assert run_jobs([asked], [place], lambda line: None) == []
        found[name] = int(asked.log.read_text())
    assert found["kept"] < 100
    assert found["returned"] > 10 * 2**26 / 2**21  # at least one for each huge page


def test_an_interrupt_ends_the_running_and_starts_no_further(tmp_path: Path) -> None:
    lines: list[str] = []
    waits = "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit()))\n"
    asks = f"{waits}import os\nos.kill({os.getpid()}, signal.SIGTERM)\nsignal.pause()"
    jobs = [job(tmp_path, "first", asks), job(tmp_path, "second", "print('ran')")]
    before = signal.getsignal(signal.SIGTERM)
    try:
        interrupt_on_sigterm()
        with pytest.raises(KeyboardInterrupt):
            run_jobs(jobs, ANYWHERE[:1], lines.append)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert jobs[0].log.read_text() == "saved\n"
    assert not jobs[1].log.exists()
    assert lines == ["started first (1 of 2)"]


def test_a_sweep_of_trainings(data: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    settings = [
        "model=gpt-tiny-modern", f"data_dir={data}", f"run_dir={runs}", "model.num_layers=1", "model.hidden_size=16",
        "model.num_heads=1", "model.context_length=16", "micro_batch_size=2", "global_batch_size=2", "max_steps=2",
        "schedule.warmup_steps=0", "optim.lr=1e-3,2e-3", "validation.every=0",
    ]  # fmt: skip
    result = run_module("launch.sweep", "workers=1", "--", *settings)
    assert result.returncode == 0, result.stderr
    folders = [runs / "optim.lr=0.001", runs / "optim.lr=0.002"]
    assert result.stdout.endswith(f"kraken_train.report {shlex.join(map(str, folders))}\n")
    learning_rates = [read_run(folder).series("lr")[1] for folder in folders]
    assert learning_rates[1] == pytest.approx([2 * rate for rate in learning_rates[0]])

    before = [folder.with_name(f"{folder.name}.log").read_text() for folder in folders]
    again = run_module("launch.sweep", "workers=1", "--", *settings)
    assert again.stdout.startswith("optim.lr=0.001 is finished\noptim.lr=0.002 is finished\n")
    assert before == [folder.with_name(f"{folder.name}.log").read_text() for folder in folders]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is nothing to run"),
        (["--", "evaluate", "run_dir=x"], "there is no training; give -- and its settings"),
        (["--", "prepare", "source=embedded", "output_dir=d", "--", "run_dir=x"], "prepare cannot be a stage"),
        (["workers=0", "--", "data_dir=x", "run_dir=y"], "workers=0"),
    ],
)
def test_refused(arguments: list[str], message: str) -> None:
    assert message in user_error(run_here("launch.sweep", *arguments))
