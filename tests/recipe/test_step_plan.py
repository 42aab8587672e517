"""Steps, their sizes and learning rates by tokens, against counting step by step."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kraken_train.common.cli import compose_command
from kraken_train.common.errors import ConfigError
from kraken_train.common.settings import from_dict, to_dict
from kraken_train.config import TrainConfig
from kraken_train.recipe.batch_ramp import BatchRamp, Position, Step
from kraken_train.recipe.lengths import Length
from kraken_train.recipe.schedules import ConstantSchedule, CosineSchedule, Schedule, WSDSchedule
from kraken_train.recipe.step_plan import StepPlan, recorded_plan

CONTEXT = 16
RAMP = {0: 2, 100: 4, 1000: 8}  # 32, 64 and 128 tokens; 128 = 4 x 32 tokens, 1024 = 128 + 14 x 64


def make_plan(schedule: Schedule, size: int | dict[int, int] = RAMP, **length: int) -> StepPlan:
    length_of_run = Length("max_steps", length.get("max_steps", 1), "max_tokens", length.get("max_tokens"))
    return StepPlan(length_of_run, schedule, BatchRamp(size, CONTEXT))


def counted(ramp: dict[int, int], steps: int, start: Position = Position()) -> list[Step]:  # noqa: B008
    """The same, one step after the other."""
    found, position = [], start
    for _ in range(steps):
        (*_, samples) = [samples for begin, samples in ramp.items() if begin <= position.tokens]
        after = Position(position.step + 1, position.tokens + samples * CONTEXT)
        found.append(Step(position, after, samples))
        position = after
    return found


def test_a_ramp() -> None:
    ramp = BatchRamp(RAMP, CONTEXT)
    steps = counted(RAMP, 20)
    assert [step.samples for step in steps] == [2] * 4 + [4] * 14 + [8] * 2
    assert [ramp.step_at(step.before) for step in steps] == steps
    assert list(ramp.stretches()) == [
        (Position(), 2, 4),
        (Position(4, 128), 4, 14),
        (Position(18, 1024), 8, None),
    ]


ramps = st.dictionaries(st.integers(1, 2000), st.integers(1, 9), max_size=4).map(
    lambda more: {0: 3, **dict(sorted(more.items()))}
)


@given(ramps, st.integers(0, 60), st.integers(0, 4000), st.integers(0, 30), st.integers(0, 5))
def test_steps_and_tokens_are_those_of_counting(
    sizes: dict[int, int], steps: int, tokens: int, done: int, odd: int
) -> None:
    """From the start of a run, and from positions that a run with other sizes has come to."""
    ramp, start = BatchRamp(sizes, CONTEXT), Position(done, done * 40 + odd)
    path = [start, *(step.after for step in counted(sizes, 2000, start))]
    assert ramp.after_steps(done + steps, start) == path[steps]
    assert ramp.reaching(tokens, start) == next(position for position in path if position.tokens >= tokens)


SCHEDULES = [
    (CosineSchedule(warmup_steps=10, min_ratio=0.1), {"warmup_tokens": 10 * 4 * CONTEXT}),
    (WSDSchedule(warmup_steps=7, min_ratio=0.3, decay_steps=11), {"decay_tokens": 11 * 4 * CONTEXT}),
    (WSDSchedule(warmup_steps=0, min_ratio=0.0, decay_steps=47), {"warmup_tokens": 0}),
    (ConstantSchedule(warmup_steps=9), {}),
]


@pytest.mark.parametrize(("schedule", "tokens"), SCHEDULES)
@pytest.mark.parametrize("of_run", [{"max_steps": 47}, {"max_tokens": 47 * 4 * CONTEXT}])
def test_equal_lengths_in_tokens_give_the_same_rates(
    schedule: Schedule, tokens: dict[str, int], of_run: dict[str, int]
) -> None:
    """To the bit, also where only some lengths are in tokens."""
    settings = to_dict(schedule) | tokens
    by_tokens = make_plan(type(schedule)(**settings), 4, **of_run)
    assert by_tokens.end(Position()) == Position(47, 47 * 4 * CONTEXT)
    for step in range(47):
        expected = schedule.learning_rate(3e-4, step, 47)
        assert by_tokens.learning_rate(3e-4, Position(step, step * 4 * CONTEXT)) == expected, step


def test_rates_by_tokens_in_a_ramp() -> None:
    """Equal tokens change the rate equally, whatever the size of the steps. 160 tokens end within step 5."""
    cosine = CosineSchedule(warmup_steps=50, warmup_tokens=160, min_ratio=0.1)
    plan = make_plan(cosine, max_tokens=2000)
    for step in counted(RAMP, 26):
        rate, done = plan.learning_rate(1.0, step.before), step.before.tokens
        if step.after.tokens <= 160:
            assert rate == pytest.approx(step.after.tokens / 160)
        else:
            progress = min(1, max(0, done - 160) / (2000 - 160))
            assert rate == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
    assert plan.learning_rate(1.0, Position(4, 128)) == 1.0

    wsd = make_plan(WSDSchedule(warmup_steps=0, min_ratio=0.0, decay_steps=1, decay_tokens=500), max_tokens=2000)
    rates = {step.before.tokens: wsd.learning_rate(1.0, step.before) for step in counted(RAMP, 26)}
    assert rates == pytest.approx({done: min(1, max(0, 2000 - done) / 500) for done in rates})


def test_lengths_in_steps_of_a_ramp_go_by_steps() -> None:
    schedule = CosineSchedule(warmup_steps=6, min_ratio=0.1)
    plan = make_plan(schedule, max_steps=20)
    rates = [plan.learning_rate(1.0, step.before) for step in counted(RAMP, 20)]
    assert rates == [schedule.learning_rate(1.0, step, 20) for step in range(20)]
    assert plan.end(Position()) == Position(20, 1024 + 2 * 128)


def test_lengths_in_steps_beside_tokens_are_converted() -> None:
    """The last 3 of 20 steps are 64 + 2 x 128 tokens, the first 6 are 4 x 32 + 2 x 64."""
    wsd = WSDSchedule(warmup_steps=6, min_ratio=0.0, decay_steps=3)
    plan = make_plan(wsd, max_tokens=1280)
    assert plan.end(Position()).step == 20
    assert plan.learning_rate(1.0, Position(4, 128)) == pytest.approx((128 + 64) / 256)
    assert plan.learning_rate(1.0, Position(17, 960)) == 1.0
    assert plan.learning_rate(1.0, Position(19, 1152)) == pytest.approx(128 / 320)


def test_the_end_of_a_run_that_had_another_batch_size() -> None:
    plan = make_plan(ConstantSchedule(warmup_steps=0), 4, max_tokens=1000)
    assert plan.end(Position(10, 320)) == Position(21, 320 + 11 * 64)
    assert not plan.is_beyond(Position(16, 1024))
    assert plan.is_beyond(Position(17, 1088))


def test_no_run_ends_beyond_its_end() -> None:
    """Also where the last step begins before a border, after which steps are smaller."""
    for tokens in range(1, 2000):
        plan = make_plan(ConstantSchedule(warmup_steps=0), {0: 8, 910: 4}, max_tokens=tokens)
        assert not plan.is_beyond(plan.end(Position()))


def test_intervals_in_tokens() -> None:
    """Those steps that reach a multiple, once each."""
    every = Length("checkpoint.every", 1, "checkpoint.every_tokens", 200)
    reached = [step.after.tokens for step in counted(RAMP, 22) if every.is_reached_by(step)]
    assert reached == [256, 448, 640, 832, 1024, 1280, 1408]  # 1536 is below 1600
    steps = [Length("validation.every", n, "validation.every_tokens", None) for n in (3, 0)]
    assert [step.number for step in counted(RAMP, 9) if steps[0].is_reached_by(step)] == [3, 6, 9]
    assert not any(steps[1].is_reached_by(step) for step in counted(RAMP, 9))


def compose(*arguments: str) -> TrainConfig:
    return compose_command(["data_dir=d", "run_dir=r", *arguments], TrainConfig, "train")


def test_settings_as_they_are_typed_and_recorded() -> None:
    config = compose(
        "max_tokens=2B", "global_batch_size={0: 128, 1B: 256, 1.5B: 512}", "schedule=wsd",
        "schedule.warmup_tokens=300M", "schedule.decay_tokens=0.5B", "validation.every_tokens=50M",
        "checkpoint.every_tokens=100_000_000",
    )  # fmt: skip
    assert config.global_batch_size == {0: 128, 10**9: 256, 15 * 10**8: 512}
    assert (config.max_tokens, config.schedule.warmup_tokens) == (2 * 10**9, 3 * 10**8)
    assert isinstance(config.schedule, WSDSchedule)
    assert config.schedule.decay_tokens == 5 * 10**8
    assert (config.validation.every_tokens, config.checkpoint.every_tokens) == (5 * 10**7, 10**8)
    recorded = to_dict(config)
    assert from_dict(recorded, TrainConfig) == config
    end = config.step_plan(1024).end(Position())
    assert recorded_plan(recorded, 1024).end(Position()) == end == Position(end.step, end.tokens)
    assert 0 <= end.tokens - 2 * 10**9 < 512 * 1024


def test_max_tokens_alone() -> None:
    plan = compose("max_tokens=2B").step_plan(128)
    assert plan.end(Position()).step == math.ceil(2e9 / (32 * 128))


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["max_tokens=2X"], "max_tokens=2X: no whole number of tokens; give one such as 2B"),
        (["max_tokens=true"], "max_tokens=true must be a number"),
        (["max_tokens=0"], "max_tokens=0 must be greater than 0"),
        (["schedule.warmup_tokens=0.5"], "schedule.warmup_tokens=0.5: no whole number of tokens"),
        (["checkpoint.every_tokens=0"], "checkpoint.every_tokens=0 must be greater than 0"),
        (["schedule.decay_tokens=3M"], "schedule.decay_tokens is not a setting of the chosen schedule"),
        (["global_batch_size={1B: 256}"], "global_batch_size={1B: 256} must give the first size for 0 tokens"),
        (["global_batch_size={0: 8, 2B: 64, 1B: 32}"], "and the others in the order of their tokens, as in"),
        (["global_batch_size={0: 8, 1X: 32}"], "1X is no whole number of tokens; give one such as 2B"),
        (["global_batch_size={0: 8, 1k: 16, 1000: 32}"], "the same number of tokens twice"),
        (["global_batch_size={0: 8, 1B: 0}"], "global_batch_size=0 must be greater than 0"),
        (["global_batch_size={0: 8, 1B: 1.5}"], "1.5 is no whole number of samples"),
        (["global_batch_size={}"], "must give the first size for 0 tokens"),
        (
            ["global_batch_size=many"],
            "global_batch_size=many: no whole number of samples; give one such as 128, or a ramp",
        ),
        (["global_batch_size=true"], "no whole number of samples"),
        (
            ["schedule=wsd", "max_tokens=1M", "schedule.warmup_tokens=0.5M", "schedule.decay_tokens=600k"],
            "schedule.warmup_tokens=500k and schedule.decay_tokens=600k together are more than max_tokens=1M; lower",
        ),
        (
            ["schedule=wsd", "max_tokens=1M"],  # 245 steps of 32 x 128 tokens
            "schedule.warmup_steps=50 and schedule.decay_steps=200 together are more than max_tokens=1M; lower them",
        ),
    ],
)
def test_one_message(typed: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as told:
        compose(*typed)
    assert words in str(told.value)


def test_each_size_is_divided() -> None:
    config = compose("global_batch_size={0: 16, 1M: 24, 2M: 64}")
    assert config.gradient_accumulation_steps(1) == 8
    with pytest.raises(ConfigError) as told:
        config.gradient_accumulation_steps(2)
    assert str(told.value) == (
        "global_batch_size={0: 16, 1M: 24, 2M: 64}: 24 is not a multiple of micro_batch_size=8 times 2 data-parallel "
        "ranks; use 16 or 32, or another micro_batch_size"
    )


def test_kinds_of_values() -> None:
    given: list[tuple[Any, Any]] = [(32, 32), ("32", 32), (32.0, 32)]
    for value, expected in given:
        assert from_dict(to_dict(compose()) | {"global_batch_size": value}, TrainConfig).global_batch_size == expected
