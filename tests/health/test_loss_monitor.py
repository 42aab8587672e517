"""What is a spike, what is a straggler, and when going back is no help any more."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from kraken_train.common.errors import ConfigError
from kraken_train.health.loss_monitor import LossMonitor, Trouble
from kraken_train.health.stack_dump import Place, describe_stall
from kraken_train.health.stragglers import LEAST_SECONDS, WINDOW, Change, Stragglers, describe_ranks
from kraken_train.settings.health import HealthConfig

HEALTH = HealthConfig(
    step_seconds=0,
    straggler_factor=1.5,
    nonfinite="stop",
    loss_spike="rollback",
    spike_factor=10,
    spike_window=5,
    spike_steps=3,
    max_rollbacks=2,
)
USUAL = [3.0, 3.1, 2.9, 3.05, 2.95]  # median 3, median absolute deviation 0.05: suspicious above 3.5


def watch(*losses: float, health: HealthConfig = HEALTH) -> tuple[LossMonitor, list[Trouble | None]]:
    """What is found in these steps after USUAL; NaN is a skipped step."""
    watch = LossMonitor(health, max_nonfinite_steps=2)
    watch.continue_from(USUAL)
    return watch, [watch.observe(6 + i, loss, applied=not math.isnan(loss)) for i, loss in enumerate(losses)]


def test_a_spike_is_several_high_losses_in_a_row() -> None:
    assert not any(watch(3.49, 3.49, 3.49)[1])
    assert not any(watch(9.0, 9.0, 3.0, 9.0, 9.0)[1])
    spiking, (*before, trouble) = watch(3.0, 3.51, 3.51, 3.51)
    assert before == [None] * 3
    assert trouble is not None
    assert spiking.wants_rollback(trouble)
    assert (trouble.first, trouble.last, trouble.spike) == (7, 9, True)
    assert "the loss was 3.5100 in step 9, after a median of 3.0000, high from step 7 on" in trouble.reason


def test_what_is_suspicious_does_not_become_usual() -> None:
    seen, _ = watch(9.0, 9.0, 3.2)
    assert list(seen.recent) == [*USUAL[1:], 3.2]


def test_a_phase_with_higher_losses_is_no_spike() -> None:
    """Once it has losses of its own, its spikes are found; a run that continues in it goes on with those it had."""
    seen, _ = watch(9.0)
    seen.enter(1)
    higher = [loss + 5 for loss in USUAL]
    for step, loss in enumerate(higher, 7):
        seen.enter(1)
        assert seen.observe(step, loss, applied=True) is None
    assert list(seen.recent) == higher
    continued = LossMonitor(HEALTH, max_nonfinite_steps=2)
    continued.continue_from(seen.recent, phase=1)
    for monitor in (seen, continued):
        monitor.enter(1)
        found = [monitor.observe(step, 20.0, applied=True) for step in (12, 13, 14)]
        assert [trouble is not None for trouble in found] == [False, False, True]


def test_steps_that_are_not_finite_are_counted_across_phases() -> None:
    seen, _ = watch(math.nan)
    seen.enter(1)
    assert seen.observe(7, math.nan, applied=False) is not None


def test_nothing_is_saved_while_a_loss_is_suspicious() -> None:
    calm = []
    for losses in ((3.0,), (9.0,), (9.0, 9.0), (9.0, 3.0), (math.nan,), (math.nan, 3.0), (9.0, math.nan, 9.0)):
        calm.append(watch(*losses)[0].calm)
    assert calm == [True, False, False, True, False, True, False]


def test_a_loss_that_hardly_moves_may_move_a_little() -> None:
    for loss, found in ((3.29, False), (3.31, True)):  # 10 times 1% of 3 above it
        flat = LossMonitor(HEALTH, 2)
        flat.continue_from([3.0] * 5)
        assert flat.is_suspicious(loss) == found


def test_too_few_losses_to_judge_and_not_asked_to() -> None:
    young = LossMonitor(HEALTH, 2)
    young.continue_from(USUAL[1:])
    assert not any(young.observe(step, 99.0, applied=True) for step in (5,))
    assert not any(watch(9.0, 9.0, 9.0, 9.0, health=replace(HEALTH, loss_spike="ignore"))[1])


def test_steps_that_are_not_finite() -> None:
    seen, troubles = watch(math.nan, 3.0, math.nan, math.nan)
    trouble = troubles.pop()
    assert not any(troubles)
    assert trouble is not None
    assert not trouble.spike
    assert not seen.wants_rollback(trouble)
    assert (trouble.first, trouble.last) == (8, 9)
    assert trouble.reason == "the loss or a gradient was not finite in steps 8 to 9"


def test_a_spike_that_ends_in_nan_began_as_a_spike() -> None:
    _, troubles = watch(3.0, 9.0, math.nan, math.nan)
    assert troubles[-1] is not None
    assert (troubles[-1].first, troubles[-1].spike) == (7, False)
    assert "steps 8 to 9" in troubles[-1].reason


def test_after_the_last_step_there_is_no_other_to_wait_for() -> None:
    for loss, applied in ((9.0, True), (math.nan, False)):
        trouble = watch()[0].observe(6, loss, applied, last=True)
        assert trouble is not None
        assert trouble.first == 6
    assert watch()[0].observe(6, 3.0, applied=True, last=True) is None


def test_rollbacks_are_counted_up_to_the_step_of_the_trouble() -> None:
    seen, troubles = watch(9.0, 9.0, 9.0)
    assert troubles[-1] is not None
    assert seen.furthest == 8
    assert seen.may_roll_back()
    seen.continue_from(USUAL)
    for step in (4, 5, 6, 7, 8):
        assert seen.observe(step, 3.0, applied=True) is None
    assert (seen.rollbacks, seen.may_roll_back(), seen.may_roll_back()) == (1, True, False)
    seen.observe(9, 3.0, applied=True)
    assert seen.rollbacks == 0


def test_settings() -> None:
    for change, message in (
        ({"loss_spike": "rolback"}, "did you mean rollback"),
        ({"nonfinite": "ignore"}, "health.nonfinite=ignore is not known; use stop or rollback"),
        ({"straggler_factor": 0.5}, "must be above 1, or 0"),
        ({"spike_window": 1}, "health.spike_window=1 must be at least 2"),
        ({"step_seconds": -1}, "health.step_seconds=-1 must be at least 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(HEALTH, **change).validate()  # type: ignore[arg-type]
    HEALTH.validate()


def test_a_straggler_is_told_once_and_again_when_it_is_over() -> None:
    stragglers, noise = Stragglers(1.5), random.Random(0)
    told: list[tuple[int, Change]] = []
    for step in range(60):
        seconds = [noise.uniform(0.9, 1.1) for _ in range(4)]
        seconds[noise.randrange(4)] *= 10 if step % 5 == 0 else 1  # now and then one of them takes long
        if 20 <= step < 40:
            seconds[2] *= 2
        told += [(step, change) for change in stragglers.observe(seconds)]
    (begin, slow), (end, over) = told
    assert (slow.rank, slow.slow, over.rank, over.slow) == (2, True, 2, False)
    assert 20 < begin <= 20 + WINDOW
    assert 40 < end <= 40 + WINDOW
    assert 1.5 < slow.factor < 3


def test_one_of_two_ranks_can_be_the_slower_one() -> None:
    stragglers = Stragglers(1.5)
    (change,) = [change for _ in range(WINDOW) for change in stragglers.observe([0.1, 0.2])]
    assert (change.rank, round(change.factor, 3)) == (1, 2.0)


def test_what_is_shorter_than_noise_and_what_nobody_wants_to_know() -> None:
    short, off = Stragglers(1.5), Stragglers(0)
    for _ in range(2 * WINDOW):
        assert not short.observe([0.001, 0.9 * LEAST_SECONDS])
        assert not off.observe([1.0, 9.0])


def test_what_a_record_says_of_the_ranks() -> None:
    assert describe_ranks([0.3, 0.1, 0.5, 0.2, 0.4]) == {
        "rank_seconds_max": 0.5,
        "rank_seconds_median": 0.3,
        "slowest_rank": 2,
    }


def test_who_holds_the_others_up() -> None:
    waiting = [Place(rank, f"process {rank} on a", "runtime.py:9 sum", waits=True) for rank in range(6)]
    busy = [Place(rank, f"process {rank} on b", "data.py:7 read", waits=False) for rank in (6, 7)]
    assert describe_stall(60, [waiting[0], busy[0], waiting[1]]) == (
        "no step for 60 s: rank 6 (process 6 on b) is in data.py:7 read; the others wait for it in runtime.py:9 sum"
    )
    assert describe_stall(60, [waiting[0], *busy]).endswith("read; the others wait for them in runtime.py:9 sum")
    assert describe_stall(60, busy[:1]) == "no step for 60 s: rank 6 (process 6 on b) is in data.py:7 read"
    assert describe_stall(60, waiting).endswith("rank 3 (process 3 on a) in runtime.py:9 sum and 2 more")
