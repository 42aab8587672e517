"""A stopped or hanging rank ends the job, a dead launcher ends it in good order; who is slow or done is left alone."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch.distributed as dist
from helpers import PATIENCE, REPOSITORY, wait_until

from kraken_train.health import heartbeat, watchdog
from kraken_train.health.heartbeat import DONE, FAILED, RUNNING, Heartbeat, HeartbeatStore, JobFailure
from kraken_train.health.shutdown import StopRequest, has_ended
from kraken_train.health.stack_dump import Place, where_is_main_thread
from kraken_train.health.watchdog import StallTimer, Watchdog
from kraken_train.parallel.ranks import Runtime, free_port

SCRIPT = Path(__file__).with_name("watched_rank.py")
CLEAR = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")

Start = Callable[..., subprocess.Popen[str]]


# --------------------------------------------------------------------------------------------------------------
# What it concludes, in this process
# --------------------------------------------------------------------------------------------------------------


class JobEndedError(Exception):
    """In place of the exit of the process."""


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that is ended raises JobEndedError at once."""

    def end(self: Watchdog, failure: JobFailure, is_reporter: bool = True) -> None:
        raise JobEndedError(failure.message if is_reporter else None)

    monkeypatch.setattr(Watchdog, "end_job", end)
    monkeypatch.setattr(watchdog, "write_stacks", lambda reason, log: None)


def build(rank: int = 0, world_size: int = 3) -> tuple[Watchdog, HeartbeatStore]:
    store = dist.HashStore()
    dog = Watchdog(Runtime(rank, rank, world_size, world_size), store, 10.0, StopRequest())
    assert dog.store is not None
    return dog, dog.store


def stand(dog: Watchdog, where: str, waits: bool) -> None:
    """Its main thread is there."""
    dog.own_place = lambda: Place(dog.rank, "process 17 on node3", where, waits)  # type: ignore[method-assign]


def make_heartbeat(rank: int, count: int = 1, state: str = RUNNING) -> Heartbeat:
    return Heartbeat(rank, pid=4242, host="node3", started=0.0, count=count, step=17, state=state)


def test_stall_timer() -> None:
    timer = StallTimer()
    assert timer.seconds(None, 3.0) == 3.0
    assert timer.seconds(1, 4.0) == 0.0
    assert timer.seconds(1, 9.0) == 5.0


def test_a_silent_neighbour(ends: None) -> None:
    dog, store = build()
    for count in range(1, 4):
        store.write_heartbeat(make_heartbeat(1, count))
        for _ in range(5):  # 10 s, as long as is allowed
            dog.exchange(store)
            dog.watch_ranks(awake=dog.exchanges * 2.0)
    dog.exchange(store)
    expected = r"rank 1 \(process 4242 on node3\) has not answered for 10 s \(its last completed step is 17\)"
    with pytest.raises(JobEndedError, match=expected):
        dog.watch_ranks(awake=dog.exchanges * 2.0 + 2.0)


def test_a_neighbour_that_has_not_begun_has_longer(ends: None) -> None:
    dog, store = build()
    while dog.exchanges * 2.0 < 10.0 + watchdog.STARTING_SECONDS:
        dog.exchange(store)
        dog.watch_ranks(awake=dog.exchanges * 2.0)
    dog.exchange(store)
    with pytest.raises(JobEndedError, match="rank 1 has not answered since the ranks joined"):
        dog.watch_ranks(awake=dog.exchanges * 2.0)


def test_who_is_done_is_watched_no_more(ends: None) -> None:
    dog, store = build()
    store.write_heartbeat(make_heartbeat(1, state=DONE))
    store.write_heartbeat(make_heartbeat(2, state=DONE))
    for awake in range(1000):
        dog.exchange(store)
        dog.watch_ranks(float(awake))
    assert dog.watched == 0, "nobody else is left"


def test_a_failed_neighbour(ends: None) -> None:
    dog, store = build()
    store.write_heartbeat(make_heartbeat(1, state=FAILED))
    dog.exchange(store)
    dog.watch_ranks(1.0)
    dog.exchange(store)
    dog.watch_ranks(2.0)
    dog.exchange(store)
    with pytest.raises(JobEndedError, match="has failed, see its message"):
        dog.watch_ranks(12.0)


def test_a_silent_store_is_its_holder_s_and_one_rank_says_so(ends: None) -> None:
    for rank, told in [(1, None), (2, r"rank 0 .* has not answered for 10 s")]:
        dog, store = build(rank)
        store.write_heartbeat(make_heartbeat(0))
        store.write_heartbeat(make_heartbeat(2))
        dog.exchange(store)
        for awake in (1.0, 5.0, 9.0):
            dog.watch_ranks(awake)
        with pytest.raises(JobEndedError, match=told or "None"):
            dog.watch_ranks(12.0)


def test_a_silent_launcher_s_store_ends_nothing(ends: None, capsys: pytest.CaptureFixture[str]) -> None:
    dog, store = build()
    dog.store_rank = None
    dog.exchange(store)
    for awake in range(1000):
        dog.watch_ranks(float(awake))
    assert capsys.readouterr().err.count("the launcher does not answer rank 0") == 1


def test_who_holds_the_others_up(ends: None) -> None:
    """Rank 2 is the first without a step for too long, rank 1 is not there yet, and rank 0 has left."""
    store = dist.HashStore()
    dogs = [Watchdog(Runtime(rank, rank, 3, 3), store, 0.0, StopRequest(), step_seconds=10.0) for rank in range(3)]
    _, busy, waiting = dogs
    for dog in dogs:
        dog.step = 4
        dog.watch_steps(0.0)
    stand(busy, "data.py:120 read", waits=False)
    stand(waiting, "ranks.py:99 sum", waits=True)
    assert waiting.store is not None
    waiting.store.write_heartbeat(make_heartbeat(0, state=DONE))
    waiting.watch_steps(11.0)
    waiting.exchange(waiting.store)
    waiting.watch_ranks(11.0)
    busy.exchange(waiting.store)
    waiting.exchange(waiting.store)
    expected = (
        r"no step for 10 s: rank 1 \(process 17 on node3\) is in data.py:120 read; the others wait for it in "
        "ranks.py:99 sum"
    )
    with pytest.raises(JobEndedError, match=expected):
        waiting.watch_ranks(12.0)
    waiting.failure = waiting.stall_failure
    waiting.exchange(waiting.store)
    busy.exchange(waiting.store)
    assert busy.failure_of_others == waiting.stall_failure
    assert busy.failure_of_others is not None
    assert busy.failure_of_others.ranks == (1,), "the others only follow"


def test_a_rank_that_does_not_say_where_it_is(ends: None) -> None:
    dog, store = build()
    stand(dog, "ranks.py:99 sum", waits=True)
    dog.step, dog.stalled = 4, 60.0
    for _ in range(watchdog.PLACE_HEARTBEATS):
        dog.exchange(store)
        dog.watch_ranks(0.0)
    dog.exchange(store)
    with pytest.raises(
        JobEndedError, match="rank 1 has not reported where it is, rank 2 has not reported where it is; the others"
    ):
        dog.watch_ranks(0.0)


def test_steps_and_other_signs_of_life(ends: None) -> None:
    dog = Watchdog(Runtime(0, 0, 1, 1), None, 45.0, StopRequest(), step_seconds=10.0)
    dog.watch_steps(29.0)
    dog.report_progress()  # has read a checkpoint; and then compiles
    dog.watch_steps(30.0)
    dog.watch_steps(60.0)
    dog.step = 1
    dog.watch_steps(61.0)
    dog.watch_steps(70.0)
    dog.report_progress()  # a validation
    dog.watch_steps(71.0)
    dog.watch_steps(81.0)
    stand(dog, "data.py:120 read", waits=False)
    with pytest.raises(JobEndedError, match=r"no step for 10 s: rank 0 \(process 17 on node3\) is in data.py:120 read"):
        dog.watch_steps(81.5)


@pytest.mark.parametrize(("pauses", "ends_it"), [([2.0, 1000.0, 2.0, 2.0], False), ([2.0] * 6, True)])
def test_time_in_which_it_was_stopped_itself_counts_for_nobody(
    ends: None, monkeypatch: pytest.MonkeyPatch, pauses: list[float], ends_it: bool
) -> None:
    """Seconds between its looks at a neighbour that answers no more; the limit is 10."""
    dog, store = build()
    store.write_heartbeat(make_heartbeat(1))
    dog.exchange(store)
    dog.watch_ranks(awake=0.0)
    now, left = 0.0, list(pauses)

    def wait(seconds: float) -> bool:
        """Whether it is to leave."""
        nonlocal now
        if not left:
            return True
        now += left.pop(0)
        dog.exchange(store)
        return False

    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(dog.leaving, "wait", wait)
    monkeypatch.setattr(dog, "watch_launchers", lambda awake: None)
    with pytest.raises(JobEndedError) if ends_it else nullcontext():
        dog.watch()


def test_what_the_main_thread_waits_for() -> None:
    """The thread that it has asked, and not one that only looks on."""
    places: list[tuple[str, bool]] = []

    def look_on() -> None:
        while not places:
            time.sleep(0.01)

    def read_slowly() -> None:
        while not places:
            time.sleep(0.01)

    def function_of(thread: threading.Thread) -> str | None:
        frame = sys._current_frames().get(thread.ident or 0)
        return frame and frame.f_code.co_name

    def ask() -> None:
        joining = ("join", "_wait_for_tstate_lock")
        while function_of(threading.main_thread()) not in joining or function_of(reader) != "read_slowly":
            time.sleep(0.001)
        places.append(where_is_main_thread())

    reader = threading.Thread(target=read_slowly, name="data")
    for thread in (
        threading.Thread(target=look_on, name="tracking"),
        threading.Thread(target=ask, name="watchdog-store"),
    ):
        thread.start()
    reader.start()
    reader.join()
    ((where, waits),) = places
    assert where.endswith(" read_slowly")
    assert not waits


def test_a_disk_that_hangs_does_not_keep_a_job_from_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    dog, disk, order = build()[0], threading.Event(), []
    dog.stacks_written, dog.interval = True, 0.01
    dog.on_end = lambda message, follows: order.append("noted") if disk.wait() else None
    monkeypatch.setattr(watchdog, "RECORD_SECONDS", 0.1)
    monkeypatch.setattr(watchdog.os, "_exit", lambda code: order.append(f"exit {code}"))
    dog.end_job(JobFailure("no step", None, (0,)), is_reporter=False)
    disk.set()
    assert order[0] == "exit 1"


def test_off() -> None:
    for dog in (
        Watchdog(Runtime(0, 0, 2, 2), dist.HashStore(), 0.0, StopRequest()),
        Watchdog(Runtime(0, 0, 1, 1), dist.HashStore(), 10.0, StopRequest()),
        Watchdog(Runtime(0, 0, 2, 2), None, 10.0, StopRequest()),
    ):
        with dog:
            assert not dog.store_thread.is_alive()


def test_only_the_process_itself_is_killed() -> None:
    echo = "while True: print(input(), flush=True)"
    child = subprocess.Popen([sys.executable, "-c", echo], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    process = psutil.Process(child.pid)
    here = replace(make_heartbeat(1), pid=child.pid, host=heartbeat.socket.gethostname(), started=process.create_time())
    replace(here, host="another").kill()
    replace(here, started=here.started - 100).kill()
    print("it lives", file=child.stdin, flush=True)  # which a signal would have come before
    assert child.stdout.readline() == "it lives\n"
    os.kill(child.pid, signal.SIGSTOP)
    here.kill()
    assert child.wait() == -signal.SIGKILL
    here.kill()
    child.communicate()


# --------------------------------------------------------------------------------------------------------------
# What it does to processes
# --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a command with tmp_path/NAME.err for its standard error; nothing of it is left after the test."""
    started: list[psutil.Process] = []

    def start(name: str, *command: str, **variables: object) -> subprocess.Popen[str]:
        environment = {key: value for key, value in os.environ.items() if key not in CLEAR}
        environment |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        environment |= {key: str(value) for key, value in variables.items()}
        with open(tmp_path / f"{name}.err", "w", encoding="utf-8") as errors:
            process = subprocess.Popen(command, env=environment, stderr=errors, stdout=errors, text=True)
        started.append(psutil.Process(process.pid))
        return process

    yield start
    for file in tmp_path.glob("*.pid"):
        if psutil.pid_exists(int(file.read_text())):
            os.kill(int(file.read_text()), signal.SIGKILL)
    for process in started:
        if process.is_running():
            process.kill()
            process.wait()


def start_pair(start: Start, folder: Path, timeout_seconds: float, mode: str) -> list[subprocess.Popen[str]]:
    """Two ranks as the deepspeed launcher or srun start them: rank 0 holds the store."""
    command = [sys.executable, str(SCRIPT), str(folder), str(timeout_seconds), mode]
    common = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [start(f"rank{rank}", *command, RANK=rank, LOCAL_RANK=rank, **common) for rank in range(2)]


def rank_pids(folder: Path) -> list[int]:
    """The processes of both ranks, as soon as each has done a step and heard of the other."""
    wait_until(lambda: all((folder / f"{rank}.watches").exists() for rank in range(2)), lambda: output(folder))
    return [int((folder / f"{rank}.pid").read_text()) for rank in range(2)]


def output(folder: Path) -> str:
    return "".join(file.read_text() for file in sorted(folder.glob("*.err")))


def gone(pid: int) -> bool:
    try:
        return has_ended(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])  # 1: also in integration/test_faults
def test_a_stopped_rank(start: Start, tmp_path: Path, victim: int) -> None:
    ranks = start_pair(start, tmp_path, 5.0, "together")
    pids = rank_pids(tmp_path)
    os.kill(pids[victim], signal.SIGSTOP)
    assert ranks[1 - victim].wait() == 1
    assert ranks[victim].wait() == -signal.SIGKILL
    errors = [line for line in output(tmp_path).splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output(tmp_path)
    assert f"rank {victim} (process {pids[victim]} on " in errors[0]
    assert "has not answered for 5 s (its last completed step is " in errors[0]


@pytest.mark.parametrize("culprit", [0, pytest.param(1, marks=pytest.mark.slow)])  # rank 0 holds the store
def test_a_hanging_rank(start: Start, tmp_path: Path, culprit: int) -> None:
    ranks = start_pair(start, tmp_path, 4.0, f"hanging={culprit}")
    pids = rank_pids(tmp_path)
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    os.kill(pids[culprit], signal.SIGUSR2)
    wait_until(lambda: "most recent call first" in logs[culprit].read_text(), lambda: output(tmp_path))
    assert ranks[culprit].poll() is None, "to look has ended it"
    (tmp_path / "hang").touch()
    assert [rank.wait() for rank in ranks] == [1, 1], output(tmp_path)
    errors = [line for line in output(tmp_path).splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output(tmp_path)
    message = errors[0].removeprefix("error: ").partition("; the job is ended")[0]
    stuck, waiting = re.escape(f"rank {culprit} (process {pids[culprit]} on "), r"ranks.py:\d+ sum"
    assert re.fullmatch(
        rf"no step for 4 s: {stuck}.*\) is in watched_rank.py:\d+ read_for_ever; the others wait for it in {waiting}",
        message,
    ), message
    for rank in range(2):
        assert (tmp_path / f"{rank}.end").read_text() == f"{rank != culprit} {message}"
        function = "read_for_ever" if rank == culprit else "all_reduce"
        for stacks in (logs[rank].read_text(), (tmp_path / f"rank{rank}.err").read_text()):
            assert f" in {function}\n" in stacks, stacks


@pytest.mark.slow
def test_a_stopped_rank_under_torchrun(start: Start, tmp_path: Path) -> None:
    """The launcher holds the store."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    launcher = start("launcher", *launch, str(SCRIPT), str(tmp_path), "5", "together")
    pids = rank_pids(tmp_path)
    os.kill(pids[0], signal.SIGSTOP)
    assert launcher.wait() == 1
    errors = [line for line in output(tmp_path).splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output(tmp_path)
    assert f"rank 0 (process {pids[0]} on " in errors[0]
    wait_until(lambda: all(gone(pid) for pid in pids), lambda: output(tmp_path))


@pytest.mark.slow
def test_all_stopped_for_a_while_and_leaving_one_by_one(start: Start, tmp_path: Path) -> None:
    ranks = start_pair(start, tmp_path, 40.0, "alone")
    pids = rank_pids(tmp_path)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(50)  # longer than is allowed
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    (tmp_path / "leave").touch()
    assert [rank.wait() for rank in ranks] == [0, 0], output(tmp_path)
    assert "Exception raised" not in output(tmp_path)
    assert "error" not in output(tmp_path)


def test_a_failure_that_the_others_do_not_see(start: Start, tmp_path: Path) -> None:
    ranks = start_pair(start, tmp_path, PATIENCE, "failing")
    assert ranks[0].wait() == 1, output(tmp_path)
    assert "rank 1 (process" in output(tmp_path)
    assert "has failed, see its message" in output(tmp_path)
    assert "this rank has failed" in output(tmp_path)


@pytest.mark.slow  # also in integration/test_faults
def test_the_deepspeed_command_is_ended(start: Start, tmp_path: Path) -> None:
    """It passes no signal on. The ranks save and end, and so does the local launcher between them."""
    options = ["--num_gpus=2", "--no_local_rank", f"--master_port={free_port()}"]
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    runner = start("runner", sys.executable, deepspeed, *options, str(SCRIPT), str(tmp_path), str(PATIENCE), "together")
    pids = rank_pids(tmp_path)
    local_launcher = psutil.Process(pids[0]).ppid()
    runner.terminate()
    assert runner.wait() == -signal.SIGTERM
    wait_until(lambda: all(gone(pid) for pid in [local_launcher, *pids]), lambda: output(tmp_path))
    assert "its launcher has ended" in [(tmp_path / f"{rank}.saved").read_text() for rank in range(2)]


# A stand-in for a launcher, with the one argument that makes it one.
STAND_IN = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', sys.argv[1]])\n"
DEAF = """
import os, time
from pathlib import Path
from kraken_train.health import heartbeat, watchdog
from kraken_train.health.heartbeat import DONE, FAILED, RUNNING, Heartbeat, HeartbeatStore, JobFailure
from kraken_train.health.shutdown import StopRequest
from kraken_train.parallel.ranks import Runtime
watchdog.HEARTBEAT_SECONDS, watchdog.LAUNCHER_SECONDS = 0.2, 1.0
with watchdog.Watchdog(Runtime(0, 0, 1, 1), None, 45.0, StopRequest()):
    Path("{folder}/0.tmp").write_text(str(os.getpid()))
    Path("{folder}/0.tmp").rename("{folder}/0.pid")
    time.sleep(3600)
"""


def test_a_rank_that_does_not_heed_its_launcher_s_end(start: Start, tmp_path: Path) -> None:
    script = tmp_path / "torchrun"
    script.write_text(STAND_IN)
    launcher = start("launcher", sys.executable, str(script), DEAF.format(folder=tmp_path))
    wait_until((tmp_path / "0.pid").exists, lambda: output(tmp_path))
    pid = int((tmp_path / "0.pid").read_text())
    launcher.kill()
    launcher.wait()
    wait_until(lambda: gone(pid), lambda: output(tmp_path))
    assert "error: rank 0 has not ended in the 1 s since its launcher has" in output(tmp_path)
