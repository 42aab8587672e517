"""What a run that is continued keeps of the settings that are left to the program."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from helpers import REPOSITORY

from kraken_train.common.cli import compose_command
from kraken_train.common.errors import CheckpointError
from kraken_train.config import TrainConfig
from kraken_train.run.layout import CONFIG_FILE
from kraken_train.training.recorded_choices import RecordedChoices, leaves_choices, recorded_choices

OF_AN_OLD_RUN = RecordedChoices("fp32", compile=False, vocab_parallel=False)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(REPOSITORY / "tests" / "artefacts" / "written_by_9a2225f" / "run", tmp_path / "run"))


def settings(*more: str) -> TrainConfig:
    config: TrainConfig = compose_command(["data_dir=data", "run_dir=run", *more], TrainConfig, "train")
    return config


def filled(config: TrainConfig, choices: RecordedChoices) -> tuple[bool | None, bool | None]:
    config = choices.fill(config)
    return config.engine.compile, config.parallel.vocab_parallel


def test_an_old_run_keeps_what_it_recorded(run: Path) -> None:
    assert recorded_choices(run) == OF_AN_OLD_RUN
    assert filled(settings(), recorded_choices(run)) == (False, False)
    (run / CONFIG_FILE).unlink()  # the checkpoint knows it too
    assert recorded_choices(run) == OF_AN_OLD_RUN


def test_what_the_user_gives_counts(run: Path) -> None:
    given = settings("engine.compile=true", "parallel.vocab_parallel=true")
    assert filled(given, recorded_choices(run)) == (True, True)


def test_what_was_left_to_the_program_is_left_to_it_again(run: Path, tmp_path: Path) -> None:
    for folder in (run, tmp_path / "no run"):
        if folder == run:
            recorded = yaml.safe_load((run / CONFIG_FILE).read_text(encoding="utf-8"))
            recorded["engine"]["compile"] = None
            del recorded["parallel"]["vocab_parallel"]
            (run / CONFIG_FILE).write_text(yaml.safe_dump(recorded), encoding="utf-8")
        assert filled(settings(), recorded_choices(folder)) == (None, None)


def test_a_damaged_record_is_needed_only_for_what_is_left_open(run: Path) -> None:
    (run / CONFIG_FILE).write_text("precision", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config.yaml is damaged; restore the file, or give precision=bf16"):
        recorded_choices(run)
    given = ["precision=fp32", "engine.compile=false", "parallel.vocab_parallel=false"]
    assert not leaves_choices(settings(*given))
    assert all(leaves_choices(settings(*(other for other in given if other != one))) for one in given)
