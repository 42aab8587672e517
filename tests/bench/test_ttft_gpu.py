"""The simulated link of a GPU, and the command there."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import run_here

from kraken_train.bench.breakdown import EXPOSED, GEMM, HIDDEN, break_down, record
from kraken_train.bench.link import ALL_REDUCE
from kraken_train.bench.simulated_communicator import SimulatedCommunicator, make_link
from kraken_train.parallel.sharding import ModelRank
from kraken_train.planning.interconnect import Interconnect

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = torch.device("cuda")
COUNT = 40


def captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def seconds_of(work: Callable[[], object]) -> float:
    """The median of some runs, after others."""
    taken = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        work()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(taken[2:])


@pytest.mark.parametrize("asked", [12e-6, 100e-6])
def test_exposed_without_overlap(asked: float) -> None:
    """In a CUDA graph, what transfers add to the time of a computation is what was asked for, within 5%."""
    link = make_link(DEVICE, blocks=16)
    x = torch.randn(2048, 2048, device=DEVICE, dtype=torch.bfloat16)

    def work(transfers: bool) -> None:
        for _ in range(COUNT):
            torch.mm(x, x)
            if transfers:
                link.transfer(ALL_REDUCE, asked, moved=2**19)

    with_transfers, without = (captured(lambda flag=flag: work(flag)) for flag in (True, False))
    added = seconds_of(with_transfers.replay) - seconds_of(without.replay)
    assert added / COUNT == pytest.approx(asked, rel=0.05)


def test_overlap_in_a_graph() -> None:
    """A transfer beside products of about its length costs far less than its time, and the profile sees both."""
    seconds = 200e-6
    communicator = SimulatedCommunicator(
        Interconnect("slow", seconds * 1e6, None, ""), ModelRank(0, 4), make_link(DEVICE, 4)
    )
    x = torch.randn(1, 1024, 2048, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(2048, 2048, device=DEVICE, dtype=torch.bfloat16)

    def work(transfers: bool) -> None:
        for _ in range(COUNT):
            pending = communicator.start_all_reduce(x) if transfers else None
            for _ in range(40):
                product = x @ weight
            if pending is not None:
                product + communicator.wait(pending)

    with_transfers, without = (captured(lambda flag=flag: work(flag)) for flag in (True, False))
    assert seconds_of(with_transfers.replay) - seconds_of(without.replay) < 0.3 * COUNT * seconds
    record(with_transfers.replay, DEVICE)
    intervals = record(with_transfers.replay, DEVICE, before=lambda: torch.sort(x))
    assert not any("sort" in interval.name.lower() or "spin_kernel" in interval.name for interval in intervals)
    parts = break_down(intervals)
    assert parts[GEMM] > 0
    assert parts[HIDDEN] > 0.7 * COUNT * seconds
    assert parts[HIDDEN] + parts[EXPOSED] == pytest.approx(COUNT * seconds, rel=0.05)


def test_nothing_large_runs_beside_it() -> None:
    """A product of matrices waits where transfers have all multiprocessors; what they move is in memory afterwards."""
    from kraken_train.bench import spin_link  # noqa: PLC0415 (needs Triton)

    seconds, blocks = 300e-6, torch.cuda.get_device_properties(DEVICE).multi_processor_count
    link = make_link(DEVICE, blocks)
    assert isinstance(link, spin_link.SpinLink)
    link.memory[0].fill_(7)
    x = torch.randn(2048, 2048, device=DEVICE, dtype=torch.bfloat16)

    def work(moved: int) -> None:
        wait = link.begin(ALL_REDUCE, seconds, moved)
        torch.mm(x, x)
        wait()

    alone = seconds_of(captured(lambda: torch.mm(x, x)).replay)
    link.memory[1].zero_()
    beside = captured(lambda: work(2**20))
    assert seconds_of(beside.replay) > seconds + 0.5 * alone
    assert link.memory[1][: 2**18].eq(7).all()
    assert link.memory[1][2**18 :].eq(0).all()


def test_command(tmp_path: Path) -> None:
    settings = ["sizes=[1.3b]", "contexts=[128]", "degrees=[8]", "repeats=5", f"output_dir={tmp_path}"]
    ran = run_here("kraken_train.bench.ttft", *settings)
    assert ran.returncode == 0, ran.stderr
    found = json.loads((tmp_path / "ttft.json").read_text())
    assert found["conditions"]["cuda_graphs"]
    assert found["conditions"]["compile"]
    assert found["device"] == torch.cuda.get_device_name(DEVICE)
    results = {result["architecture"]: result for result in found["results"]}
    asked = results["standard"]["asked_of_interconnect"]
    assert asked["all_reduces"] == 48
    assert results["standard"]["exposed_communication"]["seconds"] == pytest.approx(asked["seconds"], rel=0.1)
    kraken = results["kraken"]
    hidden = kraken["hidden_communication"]["seconds"] + kraken["exposed_communication"]["seconds"]
    assert hidden == pytest.approx(kraken["asked_of_interconnect"]["seconds"], rel=0.1)
    for result in results.values():
        parts = {part: figure["seconds"] for part, figure in result["breakdown"].items()}
        assert all(parts[part] > 0 for part in ("gemm", "attention", "norm", "head"))
        assert result["attention_kernels"]
        parts.pop("hidden_all_reduce")
        assert sum(parts.values()) == pytest.approx(result["ttft"]["seconds"], rel=0.25)
