"""A collective that is only simulated takes the time that is set, and does not change the data."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import random_ids
from pretend_clock import pretend
from torch.utils._python_dispatch import TorchDispatchMode

from kraken_train.bench import link
from kraken_train.bench.grid import SIZES, model_config
from kraken_train.bench.link import ThreadLink, Wait
from kraken_train.bench.simulated_communicator import SimulatedCommunicator
from kraken_train.bench.timing import Conditions, TimedModel
from kraken_train.bench.ttft import FREE
from kraken_train.bench.ttft import simulated_communicator as make_communicator
from kraken_train.bench.variants import BLOCKING, OVERLAPPED, SILENT
from kraken_train.model.registry import build_model
from kraken_train.parallel.sharding import ModelRank
from kraken_train.planning.interconnect import Interconnect

SLOW = Interconnect("slow", latency_us=30_000.0, bus_bandwidth=1.0, source="")
CONDITIONS = Conditions(
    device=torch.device("cpu"),
    dtype=torch.float32,
    compile=False,
    cuda_graphs=False,
    batch_size=1,
    context=8,
    output_tokens=2,
    repeats=1,
)


class NoLink:
    def begin(self, collective: str, seconds: float, moved: float) -> Wait:
        raise AssertionError(f"{collective} of {seconds} seconds was issued")

    transfer = begin


def seconds_of(work) -> float:  # type: ignore[no-untyped-def]
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def smallest_difference(tried: TimedModel, variant: str, other: str, within: float, of: float) -> float:
    """Seconds that one variant takes longer than the other, by the shortest of as many runs as it takes, up to 100.

    Whatever else the machine does only adds to a time, so the shortest are nearest to the truth.
    """
    shortest = {variant: math.inf, other: math.inf}
    for _ in range(100):
        for name in (variant, other):
            shortest[name] = min(shortest[name], seconds_of(lambda name=name: tried.prefill(name)))
        difference = shortest[variant] - shortest[other]
        if abs(difference - of) < within:
            break
    return difference


def timed_model(architecture: str, interconnect: Interconnect, link: ThreadLink | NoLink) -> TimedModel:
    config = model_config(architecture, SIZES["tiny"], 4, vocab_size=64, context_length=10)
    return TimedModel(config, make_communicator(interconnect, 4, link), CONDITIONS)


EXPOSED = pytest.mark.parametrize(("architecture", "variant"), [("kraken", BLOCKING), ("standard", OVERLAPPED)])


def model_that_waits(architecture: str, each: float) -> tuple[TimedModel, float]:
    """And the seconds that it asks of its interconnect, on which `each` collective takes so many and a little more."""
    tried = timed_model(architecture, replace(SLOW, latency_us=each * 1e6), ThreadLink())
    width = tried.model.config.hidden_size
    number = {"kraken": 2, "standard": 4}[architecture]  # of two layers: L - 1 and the conjunction, and 2 L
    asked = (
        number * (each + 1.5 * 4 * 8 * width / 1e9) + each + 0.75 * (4 * 2 * 4) / 1e9
    )  # the last: two numbers of each rank
    assert tried.traffic.all_reduces == number
    assert tried.traffic.all_gathers == 1
    assert tried.traffic.num_bytes == number * 4 * 8 * width + 4 * 2 * 4
    assert tried.traffic.seconds == pytest.approx(asked, rel=1e-12)
    return tried, asked


@EXPOSED
def test_exposed_without_overlap(monkeypatch: pytest.MonkeyPatch, architecture: str, variant: str) -> None:
    """What collectives add to the time is what the interconnect asks for."""
    clock = pretend(monkeypatch)
    tried, asked = model_that_waits(architecture, each=0.08)
    for of, seconds in ((variant, asked), (SILENT, 0.0)):
        begin = clock.seconds
        tried.prefill(of)
        assert clock.seconds - begin == pytest.approx(seconds, rel=1e-9), of


@pytest.mark.slow
@EXPOSED
def test_exposed_without_overlap_in_real_time(architecture: str, variant: str) -> None:
    """Within 5%, which is much longer than a machine that has other work leaves a thread asleep."""
    tried, asked = model_that_waits(architecture, each=0.5)
    assert smallest_difference(tried, variant, SILENT, within=0.05 * asked, of=asked) == pytest.approx(asked, rel=0.05)


@pytest.mark.parametrize("architecture", ["kraken", "parallel"])
def test_free_is_computation_alone(architecture: str) -> None:
    """Where communication costs nothing the work is that of the computation, and nothing is issued."""
    tried = timed_model(architecture, FREE, NoLink())
    assert tried.prefill(OVERLAPPED).equal(tried.prefill(SILENT))
    assert tried.traffic.all_reduces == 2
    assert tried.traffic.seconds == 0
    done: dict[str, list[str]] = {OVERLAPPED: [], SILENT: []}
    for variant, operators in done.items():
        with Recorded(operators):
            tried.prefill(variant)
    assert done[OVERLAPPED] == done[SILENT]
    assert len(done[SILENT]) > 20
    with pytest.raises(AssertionError, match=r"all_reduce of 0.03"):
        timed_model(architecture, SLOW, NoLink()).prefill(OVERLAPPED)


class Recorded(TorchDispatchMode):
    """The operators that run meanwhile."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = pretend(monkeypatch)
    streams = torch.randn(2, 1, 3, 5)
    communicator = SimulatedCommunicator(replace(SLOW, latency_us=100_000.0), ModelRank(0, 4), ThreadLink())
    first, second = communicator.start_all_reduce(streams), communicator.start_all_reduce(streams[:1])
    assert clock.seconds == 0
    clock.seconds = computed = 0.13
    communicator.wait(first)
    assert clock.seconds == computed, "it has been under way meanwhile"
    assert communicator.wait(second).equal(streams[0])
    assert communicator.wait(first).equal(streams.sum(dim=0))
    assert clock.seconds == pytest.approx(0.2, rel=1e-6), "one after the other, as on one link"


def test_memory_that_transfers_move() -> None:
    """What a rank sends, and receives, of each sum and gathering: 2 (P - 1) / P of the bytes, and (P - 1) / P."""
    asked: list[tuple[str, float]] = []

    class NotingLink:
        def begin(self, collective: str, seconds: float, moved: float) -> Wait:
            asked.append((collective, moved))
            return lambda: None

        def transfer(self, collective: str, seconds: float, moved: float) -> None:
            asked.append((collective, moved))

    communicator = SimulatedCommunicator(SLOW, ModelRank(0, 4), NotingLink())
    streams = torch.zeros(3, 1, 10, 8, dtype=torch.bfloat16)
    communicator.wait(communicator.start_all_reduce(streams))
    communicator.all_reduce(streams[0])
    communicator.gather(streams[0])
    assert asked == [("all_reduce", 1.5 * 160), ("all_reduce", 1.5 * 160), ("all_gather", 0.75 * 640)]


def test_a_transfer_does_not_hold_the_computation_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It begins in a thread of its own, and whoever waits for it waits."""
    sleeping, over, events = threading.Event(), threading.Event(), []

    def sleep(seconds: float) -> None:
        sleeping.set()
        over.wait()
        events.append(f"slept {seconds:.1f}")

    monkeypatch.setattr(link, "time", SimpleNamespace(perf_counter=lambda: 0.0, sleep=sleep))
    wait = ThreadLink().begin("all_reduce", 0.3, moved=0)
    sleeping.wait()
    events.append("computed")
    over.set()
    wait()
    events.append("waited")
    assert events == ["computed", "slept 0.3", "waited"]


def test_values() -> None:
    """With all units here the model computes what it computes in one process, in every variant."""
    for architecture in ("kraken", "standard", "parallel"):
        config = model_config(architecture, SIZES["tiny"], 2, vocab_size=64, context_length=16)
        ids = random_ids(config, 2, 9)
        with torch.inference_mode():
            expected = build_model(config)(ids)
            switch = make_communicator(replace(SLOW, latency_us=1.0), 1, ThreadLink())
            model = build_model(config, communicator=switch)
            for variant in switch.variants:
                switch.use(variant)
                assert model(ids).equal(expected)
    part = torch.arange(6.0).view(2, 3)
    assert SimulatedCommunicator(FREE, ModelRank(0, 2), None).gather(part).tolist() == [[0, 1, 2] * 2, [3, 4, 5] * 2]
