"""What a stage is: commands with a time limit, the figures that they leave, and what these are held against."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kraken_train.bench.stages.preset import CPU, Preset, RunRequest
from kraken_train.common.cli import CONF_DIR
from kraken_train.common.settings import to_dict

REPOSITORY = CONF_DIR.parent
# TRITON_INTERPRET runs fused kernels on a CPU.
ON_A_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}

Figures = dict[str, Any]  # title -> a number, whether something holds, or a text


@dataclass(frozen=True)
class Goal:
    """What a figure should be, and where that comes from."""

    source: str
    expected: float | None = None
    at_least: float | bool | None = None
    at_most: float | None = None
    on_cpu: bool = False  # whether it holds for the small models of a CPU too

    @property
    def limit(self) -> str:
        if self.at_least is True:
            return "yes"
        parts = [f"at least {self.at_least:g}"] if self.at_least is not None else []
        return ", ".join([*parts, f"at most {self.at_most:g}"] if self.at_most is not None else parts)

    def is_met(self, figure: float) -> bool:
        above = self.at_least is None or figure >= self.at_least
        return above and (self.at_most is None or figure <= self.at_most)


@dataclass(frozen=True)
class Command:
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)  # beside that of this process
    accepted: tuple[int, ...] = (0,)  # exit codes after which the stage goes on

    def __str__(self) -> str:
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return " ".join([*variables, *self.arguments]).replace(sys.executable, "python")


@dataclass(frozen=True)
class Workplace:
    """Where a stage works, and with which sizes."""

    preset: Preset
    folder: Path  # of this stage
    data: Path  # prepared data, of all stages

    @property
    def on_cpu(self) -> bool:
        return self.preset.device == CPU

    @property
    def environment(self) -> dict[str, str]:
        return ON_A_CPU if self.on_cpu else {}

    def module(self, name: str, *arguments: str, ranks: int = 1, **environment: str) -> Command:
        """`python -m name arguments`, on as many ranks."""
        launcher = ("torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m") if ranks > 1 else ()
        return Command((sys.executable, "-m", *launcher, name, *arguments), self.environment | environment)

    def program(self, name: str, settings: Any = None, *, ranks: int = 1, **environment: str) -> Command:
        """A program of this folder, which writes NAME.json; `settings` is a dataclass of the preset."""
        output = str(self.folder / f"{name}.json")
        given = json.dumps({} if settings is None else to_dict(settings))
        module = "kraken_train.bench.stages.program"
        return self.module(module, name, output, self.preset.device, given, ranks=ranks, **environment)

    def throughput(self, name: str, *settings: str, ranks: int = 1) -> Command:
        """The benchmark of training speed, which writes NAME/throughput.json."""
        output = (f"output_dir={self.folder / name}", f"device={self.preset.device}")
        return self.module("kraken_train.bench.throughput", *self.preset.throughput, *settings, *output, ranks=ranks)

    def ttft(self, name: str, *settings: str, ranks: int = 1) -> Command:
        """The benchmark of the time to the first token, which writes NAME/ttft.json."""
        output = (f"output_dir={self.folder / name}", f"device={self.preset.device}")
        return self.module("kraken_train.bench.ttft", *self.preset.ttft, *settings, *output, ranks=ranks)

    def training(self, name: str, *settings: str, ranks: int = 1) -> list[Command]:
        """A program of this folder that trains, after what prepares its data."""
        sizes = replace(self.preset.runs, settings=(*self.preset.runs.settings, *settings))
        request = RunRequest(sizes, ranks, str(self.data), str(self.folder))
        return [*self.prepared_data(), self.program(name, request)]

    def prepared_data(self) -> list[Command]:
        """What prepares the data, unless they are there."""
        if (self.data / "manifest.json").is_file():
            return []
        return [self.module("data_prep.prepare", *self.preset.prepare, f"output_dir={self.data}")]

    def read(self, name: str) -> Any:
        """A JSON file of this stage."""
        return json.loads((self.folder / name).read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Stage:
    name: str
    minutes: float  # that it should take; it is ended after `limit_factor` times as many
    what: str  # one line
    commands: Callable[[Workplace], Sequence[Command]]
    figures: Callable[[Workplace], Figures]  # once all commands have succeeded
    goals: Mapping[str, Goal] = field(default_factory=dict)  # by the titles of figures


def of_program(name: str) -> Callable[[Workplace], Figures]:
    """The figures that a program has written."""

    def read(workplace: Workplace) -> Figures:
        figures: Figures = workplace.read(f"{name}.json")["figures"]
        return figures

    return read
