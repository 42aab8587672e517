"""What finished runs of a study have given, in its record: it stays in the repository when the runs do not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data_prep.manifest import load_manifest
from kraken_train.common.errors import ConfigError
from kraken_train.common.files import replace_synced
from kraken_train.model.config import parse_model
from kraken_train.run.events import FINISHED
from kraken_train.run.folder import read_identity
from kraken_train.run.metrics import read_run
from kraken_train.run.state import read_state
from studies.study import Run, Study


@dataclass(frozen=True)
class Result:
    """Of one run: `validation_loss` is that after the last step, in nats per token."""

    arm: str
    seed: int
    validation_loss: float
    parameters: int
    tokens: int
    data_fingerprint: str
    settings: tuple[str, ...]

    @property
    def run(self) -> Run:
        return Run(self.arm, self.seed)


def differences(results: Mapping[Run, Result], arm: str, base: str) -> list[float]:
    """Validation loss of `arm` minus that of `base`, for each seed that both have, in the order of the seeds.

    Runs of one seed have the same samples in the same order, so that their difference says more than their means'.
    """
    seeds = sorted(run.seed for run in results if run.arm == arm and Run(base, run.seed) in results)
    return [results[Run(arm, seed)].validation_loss - results[Run(base, seed)].validation_loss for seed in seeds]


@dataclass(frozen=True)
class Results:
    """Those that are recorded, and the folder of runs that are not."""

    study: Study
    runs_dir: Path

    @property
    def record(self) -> Path:
        return self.study.record

    @cached_property
    def recorded(self) -> dict[Run, Result]:
        """By run. Raises ConfigError for a damaged line."""
        if not self.record.is_file():
            return {}
        results = {}
        for number, line in enumerate(self.record.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                entries = json.loads(line)
                result = Result(**{**entries, "settings": tuple(entries["settings"])})
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{self.record}:{number} is no result of a run; restore the file") from error
            results[result.run] = result
        return results

    def is_known(self, run: Run) -> bool:
        """Whether it is finished. Raises ConfigError where it has, or was started with, other settings than now."""
        found = self.recorded.get(run)
        if found is not None:
            self.require_same_settings(run, found.settings, self.record)
            return True
        folder = self.runs_dir / run.name
        if not folder.is_dir():
            return False
        file = self.settings_file(run)
        if file.is_file():
            self.require_same_settings(run, tuple(file.read_text(encoding="utf-8").splitlines()), folder)
        return self.is_finished(run)

    def is_finished(self, run: Run) -> bool:
        """Whether its folder is here and has all of it."""
        folder = self.runs_dir / run.name
        return folder.is_dir() and read_state(folder).state == FINISHED

    def export_of(self, run: Run) -> Path:
        """The folder of its export, for runs that it teaches."""
        return self.runs_dir / "exports" / run.name

    def settings_file(self, run: Run) -> Path:
        """Of a run that has been started: its settings, a line each, without folders."""
        return self.runs_dir / f"{run.name}.settings"

    def add(self, runs: list[Run]) -> dict[Run, Result]:
        """Record those of `runs` that are finished; all recorded ones."""
        results = dict(self.recorded)
        for run in runs:
            if run not in results and self.is_known(run):
                results[run] = self.read(run)
        if len({result.data_fingerprint for result in results.values()}) > 1:
            raise self.other_data(f"runs in {self.runs_dir} were trained on other data")
        if len(results) > len(self.recorded):
            ordered = sorted(results.values(), key=lambda result: (result.arm, result.seed))
            replace_synced(self.record, "".join(json.dumps(dataclasses.asdict(result)) + "\n" for result in ordered))
        return results

    def read(self, run: Run) -> Result:
        folder = self.runs_dir / run.name
        metrics, identity = read_run(folder), read_identity(folder)
        if identity is None:
            raise ConfigError(f"{folder} has no run.json with its parameters; remove it to train it anew")
        return Result(
            run.arm,
            run.seed,
            metrics.series("validation_loss")[1][-1],
            parse_model(identity["model"]).num_parameters,
            int(metrics.series("tokens")[1][-1]),
            identity["data_fingerprint"],
            tuple(self.study.overrides(run)),
        )

    def require_same_settings(self, run: Run, settings: tuple[str, ...], where: Path) -> None:
        """Raises ConfigError where the study or the arm has changed since: only equal settings can be compared."""
        before, now = set(settings), set(self.study.overrides(run))
        if before != now:
            raise ConfigError(
                f"{where}: the run {run.name} has {', '.join(sorted(before - now)) or 'no further settings'}, but "
                f"the study now asks for {', '.join(sorted(now - before)) or 'none of them'}; undo the change "
                "of settings, or remove this run, which is then trained anew"
            )

    def require_same_data(self, data_dir: Path) -> None:
        """Raises KrakenError unless it is prepared data, the same as that of all recorded runs."""
        fingerprint = load_manifest(data_dir).fingerprint
        if any(result.data_fingerprint != fingerprint for result in self.recorded.values()):
            raise self.other_data(f"{data_dir} holds other data")

    def other_data(self, problem: str) -> ConfigError:
        return ConfigError(
            f"{problem} than those in {self.record}, so that their losses cannot be compared; prepare the data as "
            f"{self.study.readme} says, from the same text"
        )
