"""Phases of a run by tokens: which phase a step is of, and its learning rate, against counting and other schedules."""

from __future__ import annotations

import math

import pytest

from kraken_train.common.cli import compose_command
from kraken_train.common.errors import ConfigError
from kraken_train.common.settings import from_dict, to_dict
from kraken_train.config import TrainConfig
from kraken_train.recipe.batch_ramp import START, Step
from kraken_train.recipe.phases import describe_phases
from kraken_train.recipe.step_plan import StepPlan, recorded_plan

CONTEXT = 16
RAMP = "global_batch_size={0: 2, 100: 4, 1000: 8}"  # 32, 64 and 128 tokens


def compose(*arguments: str) -> TrainConfig:
    return compose_command(
        ["data_dir=d", "run_dir=r", "micro_batch_size=2", "model.context_length=16", *arguments], TrainConfig, "train"
    )


def steps_of(plan: StepPlan) -> list[Step]:
    steps = [plan.step_at(START)]
    while steps[-1].number < plan.end(START).step:
        steps.append(plan.step_at(steps[-1].after))
    return steps


def rates_of(plan: StepPlan) -> list[float]:
    return [plan.learning_rate(3e-4, step.before) for step in steps_of(plan)]


def test_a_phase_begins_with_the_step_after_the_one_that_reaches_the_tokens() -> None:
    plan = compose("phases=[{until: 300}, {until: 1k}, {until: 1.5k}]", "schedule=constant", RAMP).step_plan(CONTEXT)
    steps = steps_of(plan)
    phase, expected = 0, []
    for step in steps:
        expected.append(phase)
        if step.after.tokens >= (300, 1000, 1500)[phase]:
            phase += 1
    assert [plan.phase_at(step.before) for step in steps] == expected
    assert phase == 3
    assert expected.count(0) == 7  # to 4 x 32 + 3 x 64 = 320 tokens
    assert plan.phase_at(steps[-1].after) == 2  # read ahead of the end


@pytest.mark.parametrize("size", ["global_batch_size=4", RAMP])
def test_a_constant_rate_and_a_decay_are_wsd(size: str) -> None:
    """To the bit, and also where the data change within the decay."""
    common = ["schedule.warmup_tokens=200", size]
    wsd = compose("schedule=wsd", "max_tokens=1.6k", "schedule.decay_tokens=900", *common)
    for phases in (
        "[{until: 700}, {until: 1.6k, schedule: decay}]",
        "[{until: 300}, {until: 700}, {until: 0.9k, schedule: decay}, {until: 1.6k, data_dir: b, schedule: decay}]",
    ):
        plan = compose("schedule=constant", f"phases={phases}", *common).step_plan(CONTEXT)
        assert rates_of(plan) == rates_of(wsd.step_plan(CONTEXT))


def test_the_schedule_is_over_where_the_decay_begins() -> None:
    """So a phase that decays can be added to a run with any schedule and changes no rate before it."""
    common = ["schedule=cosine", "schedule.warmup_steps=3", RAMP]
    before = rates_of(compose("max_tokens=700", *common).step_plan(CONTEXT))
    plan = compose("phases=[{until: 700}, {until: 1.6k, schedule: decay}]", *common).step_plan(CONTEXT)
    rates = rates_of(plan)
    assert rates[: len(before)] == before
    floor = 0.1 * 3e-4  # to which the cosine has come
    for step, rate in zip(steps_of(plan)[len(before) :], rates[len(before) :], strict=True):
        assert rate == pytest.approx(floor * (1600 - step.before.tokens) / 900)
    assert len(rates) - len(before) > 5


def test_without_a_decay_the_phases_only_give_the_length() -> None:
    common = ["schedule=wsd", "schedule.decay_tokens=400", "schedule.warmup_tokens=200", RAMP]
    one = compose("max_tokens=1.5k", *common).step_plan(CONTEXT)
    other = compose("phases=[{until: 1k}, {until: 1.5k}]", *common).step_plan(CONTEXT)
    assert rates_of(one) == rates_of(other)
    assert one.end(START) == other.end(START)


def test_settings_as_they_are_typed_and_recorded() -> None:
    typed = "[{until: 8B}, {until: 10B, data_dir: {web: 0.3, books: 0.7}, schedule: decay}]"
    config = compose(f"phases={typed}", "schedule=constant", "max_steps=3")
    assert describe_phases(config.phases or ()) == typed
    recorded = to_dict(config)
    assert from_dict(recorded, TrainConfig) == config
    plan, again = config.step_plan(128), recorded_plan(recorded, 128)
    assert plan.end(START) == again.end(START)
    assert again.end(START).step == math.ceil(1e10 / (32 * 128))
    assert again.decay == plan.decay
    assert {begin: [str(folder) for folder in shares] for begin, shares in config.data_phases.items()} == {
        0: ["d"],
        8 * 10**9: ["web", "books"],
    }


DECAYING = "phases=[{until: 8B}, {until: 10B, schedule: decay}]"


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["phases=[]"], "phases=[] has no phase; give some, as in 'phases=[{until: 8B}, "),
        (["phases=8B"], "phases=8B must be a list of groups of settings, as in [{until: ..., data_dir: ..., sch"),
        (["phases=[8B]"], "phases[0]=8B must be a group of settings, as in {until: ..., data_dir: ..., sch"),
        (["phases=[{until: 8B}, {untill: 9B}]"], "phases[1].untill is not a setting (did you mean until?)"),
        (["phases=[{data_dir: x}]"], "phases[0].until is not set"),
        (["phases=[{until: 1Q}]"], "phases[0].until=1Q: no whole number of tokens; give one such as 2B"),
        (["phases=[{until: 0}]"], "phases[0].until=0 must be greater than 0"),
        (["phases=[{until: 8B}, {until: 2B}]"], "phases[1].until=2B must be more than the 8B of the phase before"),
        (["phases=[{until: 8B, schedule: decy}]"], "phases[0].schedule=decy is not known; use continue or decay"),
        (["phases=[{until: 8B, schedule: decay}]"], "phases[0].schedule=decay has nothing to decay from"),
        (
            ["phases=[{until: 1B}, {until: 2B, schedule: decay}, {until: 3B}]"],
            "phases[2].schedule=continue follows a phase that decays to the end of the run; use decay for it too",
        ),
        (["phases=[{until: 1B}, {until: 2B, data_dir: {a: 0}}]"], "phases[1].data_dir: the weight 0 of a must be a"),
        (["phases=[{until: 1B}, {until: 2B, data_dir: ''}]"], "phases[1].data_dir is empty; leave it out"),
        (["phases=[{until: 1B, data_dir: e}]"], "phases[0].data_dir=e is not data_dir=d, with which a run begins"),
        ([DECAYING, "max_tokens=8B"], "max_tokens=8B is not the end of the last of the phases, 10B; leave max_tok"),
        ([DECAYING, "schedule.warmup_tokens=9B"], "schedule.warmup_tokens=9B is more than the 8B before the decay"),
        ([DECAYING, "schedule.min_ratio=0"], "from a learning rate of 0, to which the schedule has come after 8B to"),
        ([DECAYING, "schedule=wsd"], "use schedule=constant, or a schedule.min_ratio above 0"),
    ],
)
def test_one_message(typed: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as told:
        compose(*typed)
    assert words in str(told.value)


def test_what_agrees_is_no_mistake() -> None:
    config = compose("phases=[{until: 1B, data_dir: d}, {until: 2B}]", "max_tokens=2B", "data_dir={d: 1}")
    assert (str(config.length), len(config.data_phases)) == ("phases[1].until=2B", 2)
