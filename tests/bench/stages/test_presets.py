"""Every command of every preset is one that its program accepts, so that a wrong setting is found without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.prepare import PrepareConfig
from kraken_train.bench.acceptance import STAGES
from kraken_train.bench.stages.preset import Preset, RunRequest, load_preset
from kraken_train.bench.stages.program import PROGRAMS
from kraken_train.bench.stages.stage import Command, Workplace
from kraken_train.bench.stages.training_runs import WITHOUT_END, new_run
from kraken_train.bench.throughput_config import ThroughputConfig
from kraken_train.bench.ttft import TTFTConfig
from kraken_train.common.cli import compose_command
from kraken_train.common.settings import from_dict
from kraken_train.config import TrainConfig

PROGRAM = "kraken_train.bench.stages.program"
SCHEMAS = {
    "kraken_train.bench.throughput": (ThroughputConfig, "throughput"),
    "kraken_train.bench.ttft": (TTFTConfig, "ttft"),
    "data_prep.prepare": (PrepareConfig, "prepare"),
}


def check(command: Command, preset: Preset) -> str:
    """The module, or the program, whose settings were accepted."""
    arguments = command.arguments
    module = next((name for name in (*SCHEMAS, PROGRAM) if name in arguments), "pytest")
    if module in SCHEMAS:
        settings = compose_command(arguments[arguments.index(module) + 1 :], *SCHEMAS[module])
        if isinstance(settings, ThroughputConfig):
            settings.entries()
            settings.parallel.data_parallel_size(preset.ranks)
    if module == PROGRAM:
        name, _, device, given = arguments[arguments.index(module) + 1 :]
        assert device == preset.device
        sizes = from_dict(json.loads(given), PROGRAMS[name])
        if isinstance(sizes, RunRequest):
            training = new_run(sizes, name).command(WITHOUT_END, "resume=must")
            config = compose_command(training[training.index("kraken_train.train") + 1 :], TrainConfig, "train")
            config.gradient_accumulation_steps(config.parallel.data_parallel_size(sizes.ranks))
        elif PROGRAMS[name].__name__ == "StepSizes":
            assert len(compose_command(sizes.settings, ThroughputConfig, "throughput").entries()) == 1
        return name
    return module


@pytest.mark.parametrize("name", ["cpu", "one_gpu", "eight_gpus"])
def test_commands(name: str, tmp_path: Path) -> None:
    preset = load_preset(name)
    checked = set()
    for stage in (stage for of in preset.sets for stage in STAGES[of]):
        place = Workplace(preset, tmp_path / stage.name, tmp_path / "data")
        checked |= {check(command, preset) for command in stage.commands(place)}
    assert len(checked) >= 6
