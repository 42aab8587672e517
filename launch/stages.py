"""The stages on the command line of `launch.submit` and `launch.sweep`, each checked as its own command would check it.

    -- OVERRIDES...                                  a training
    -- prepare ... -- train ... -- evaluate ...      a chain, in which each stage runs after the one before

A training stage may contain Hydra sweeps (`optim.lr=1e-3,2e-3`). They make several runs, each with its own folder in
`run_dir`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from data_prep import prepare
from kraken_train.common.cli import compose_command
from kraken_train.common.errors import ConfigError
from kraken_train.common.free_text import quote_arguments
from kraken_train.common.settings import describe_composition_error
from kraken_train.config import TrainConfig
from kraken_train.model.config import ModelConfig
from launch import export_and_evaluate
from launch.export_and_evaluate import value_of
from launch.preflight import check_training, train_config

PREPARE, TRAIN, EVALUATE = STAGES = "prepare", "train", "evaluate"  # in this order


@dataclass(frozen=True)
class Stage:
    """One job, or a job array if there are several `runs`."""

    name: str
    runs: tuple[tuple[str, ...], ...]  # the arguments of each run

    @property
    def is_array(self) -> bool:
        return len(self.runs) > 1


@dataclass(frozen=True)
class Training:
    config: TrainConfig
    model: ModelConfig


def split_stages(arguments: Sequence[str]) -> list[tuple[str, list[str]]]:
    """The name and the arguments of each stage; `--` separates stages. Raises ConfigError."""
    groups: list[list[str]] = []
    for argument in arguments:
        if argument == "--":
            groups.append([])
        elif not groups:
            raise ConfigError(f"{argument} is before the first --; write the settings of the jobs' commands after it")
        else:
            groups[-1].append(argument)
    stages = [(group[0], group[1:]) if group and group[0] in STAGES else (TRAIN, group) for group in groups]
    names = [name for name, _ in stages]
    if not names:
        raise ConfigError("there is nothing to run; give -- and the settings of a training, as in -- "
                          "experiment=NAME data_dir=DATA run_dir=RUN")  # fmt: skip
    if names != [name for name in STAGES if name in names]:
        raise ConfigError(f"the stages are {', '.join(names)}; use each once at most, in the order {', '.join(STAGES)}")
    for _, group in stages:
        for argument in group:
            if "=" not in argument and not argument.startswith("~"):
                raise ConfigError(f"{argument} is neither a stage ({', '.join(STAGES)}) nor a setting key=value")
            if "\n" in argument:
                raise ConfigError(f"{argument!r} has a line break; a setting of a job must be one line")
    return stages


def check_stages(stage_arguments: Sequence[tuple[str, list[str]]], ranks: int) -> tuple[list[Stage], list[Training]]:
    """The stages with paths of earlier stages filled in, and the trainings that they run on `ranks` ranks.

    Raises the errors that the stages' commands would raise, as far as they can be known before the commands run.
    """
    stages: list[Stage] = []
    future_data: list[Path] = []
    trainings: list[Training] = []
    data: str | None = None
    run_dirs: list[str] = []
    for name, arguments in stage_arguments:
        runs = [tuple(arguments)]
        if name == PREPARE:
            prepared = compose_command(arguments, prepare.PrepareConfig, "prepare")
            data = prepared.output_dir
            future_data.append(Path(data))
        elif name == TRAIN:
            uses_prepared = data is not None and value_of("data_dir", arguments) is None
            runs = expand_sweeps([*arguments, f"data_dir={data}"] if uses_prepared else arguments)
            for run in runs:
                config = train_config(run)
                trainings.append(Training(config, check_training(config, ranks, future_data)))
                run_dirs.append(config.run_dir)
                data = config.data_dir if isinstance(config.data_dir, str) else None
        else:
            evaluated: Sequence[str | None] = run_dirs or [None]
            runs = [complete_evaluation(arguments, run_dir, data) for run_dir in evaluated]
            for run in runs:
                export_and_evaluate.parse(run)
        stages.append(Stage(name, tuple(runs)))
    return stages, trainings


def complete_evaluation(arguments: Sequence[str], run_dir: str | None, data: str | None) -> tuple[str, ...]:
    """The arguments of evaluate with the run and the data of the stages before it, unless they are given."""
    completed = list(arguments)
    if run_dir is not None and value_of("run_dir", arguments) is not None:
        raise ConfigError("run_dir is set for evaluate, which takes that of the training before it; remove it")
    if run_dir is not None:
        completed.insert(0, f"run_dir={run_dir}")
    if data is not None and value_of("data_dir", arguments) is None and value_of("suite", arguments) is None:
        completed.append(f"data_dir={data}")
    return tuple(completed)


def expand_sweeps(arguments: Sequence[str]) -> list[tuple[str, ...]]:
    """The arguments of each run: of one run without sweeps, or else of every combination of their values.

    With sweeps, each run gets a folder in `run_dir` that is named after its swept settings. Raises ConfigError.
    """
    try:
        overrides = OverridesParser.create().parse_overrides(quote_arguments(arguments, TrainConfig))
    except HydraException as error:
        raise ConfigError(describe_composition_error(error)) from error
    choices: list[list[str]] = []
    swept: list[bool] = []
    for argument, override in zip(arguments, overrides, strict=True):
        swept.append(override.is_sweep_override())
        if swept[-1]:
            key = override.get_key_element()
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([argument])
    if not any(swept):
        return [tuple(arguments)]
    parent = value_of("run_dir", arguments)
    if parent is None:
        raise ConfigError("run_dir is not set; give run_dir=FOLDER, in which each run of the sweep gets its own")
    runs = []
    for combination in itertools.product(*choices):
        name = ",".join(choice for choice, is_swept in zip(combination, swept, strict=True) if is_swept)
        others = [choice for choice in combination if choice.partition("=")[0] != "run_dir"]
        runs.append((*others, f"run_dir={Path(parent) / name.replace('/', '_')}"))
    return runs
