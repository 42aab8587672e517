"""The questions of the study and their runs.

A question is a file of `questions/`: the question, the prediction, the arms that answer it with their seeds, and the
decision. An arm is a line of text: a model of `settings.yaml`, then settings that differ, as in
`kraken-3m own_start=1 optim.lr=4e-3`. Names without a dot are settings of the model, those with one are of
`kraken_train.train`. The first arm is what the others are compared with. `distill.teacher=ARM` names a model of
`settings.yaml`: the teacher is the export of its run of the same seed.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from kraken_train.common.errors import ConfigError
from kraken_train.model.kraken_config import KrakenConfig
from studies.quality.variant_config import VariantConfig
from studies.study import Run, Study

FOLDER = Path(__file__).resolve().parent
ADDED = {field.name for field in dataclasses.fields(VariantConfig)} - {
    field.name for field in dataclasses.fields(KrakenConfig)
}
TEACHER = "distill.teacher="
PLAIN = ("optim", "schedule", "max_steps", "max_tokens", "global_batch_size", "micro_batch_size", "precision")


@dataclass(frozen=True)
class Question:
    name: str
    question: str
    prediction: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    decision: str | None  # None: not answered yet

    @property
    def runs(self) -> list[Run]:
        return [Run(arm, seed) for arm in self.arms for seed in self.seeds]


def teacher_of(run: Run) -> Run | None:
    """The run whose export is the teacher; None: there is no teacher."""
    names = [change.removeprefix(TEACHER) for change in run.arm.split() if change.startswith(TEACHER)]
    return Run(names[0], run.seed) if names else None


def overrides(run: Run) -> list[str]:
    """Arguments of `studies.quality.train`, without folders. Raises ConfigError for an unknown model."""
    settings = read_settings()
    model, *changes = run.arm.split()
    if model not in settings["models"]:
        raise ConfigError(f"{run.arm}: there is no model {model}; use one of {', '.join(settings['models'])}")
    base = dict(settings["models"][model])
    chosen = {"model": base.pop("model"), **dict(settings["training"])}
    chosen |= {f"model.{name}": value for name, value in base.items()}
    added = {}
    for change in changes:
        name, _, value = change.partition("=")
        if name in ADDED:
            added[f"+model.{name}"] = value
            chosen["model.architecture"] = "kraken-variant"
        else:
            chosen[name if "." in name or name in PLAIN else f"model.{name}"] = value
    return [f"{name}={value}" for name, value in {**chosen, **added, "seed": run.seed}.items()]


STUDY = Study(overrides, "studies.quality.train", FOLDER / "results.jsonl", "studies/quality/README.md")


def read_questions() -> list[Question]:
    """All of them, in the order of their names. Raises ConfigError."""
    questions = []
    for path in sorted((FOLDER / "questions").glob("*.yaml")):
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
        try:
            questions.append(
                Question(
                    path.stem,
                    entries["question"].strip(),
                    entries["prediction"].strip(),
                    tuple(entries["arms"]),
                    tuple(entries["seeds"]),
                    entries.get("decision"),
                )
            )
        except KeyError as error:
            raise ConfigError(f"{path} has no {error}; give question, prediction, arms and seeds") from error
    return questions


@cache
def read_settings() -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load((FOLDER / "settings.yaml").read_text(encoding="utf-8"))
    return settings
