"""Exports a run and evaluates the export: python -m launch.export_and_evaluate run_dir=RUN data_dir=DATA

The export is written to RUN/export, or to FOLDER with `export_dir=FOLDER`; all other arguments are those of
`kraken_train.evaluate`. If the folder already holds an export of the run's newest checkpoint, that one is evaluated.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from checkpoints.export import ExportConfig, export
from checkpoints.exports.folder import read_export
from checkpoints.training.store import find_good_checkpoint
from kraken_train.common.cli import CONF_DIR, compose_command, user_errors
from kraken_train.common.errors import CheckpointError, ConfigError
from kraken_train.common.help import answer_help
from kraken_train.evaluate import EvaluateConfig, evaluate_export

EXPORT_FOLDER = "export"


@dataclass(frozen=True)
class ExportAndEvaluate:
    export: ExportConfig
    evaluate: EvaluateConfig


def main() -> None:
    answer_help(sys.argv[1:], __doc__, EvaluateConfig, CONF_DIR / "evaluate.yaml")
    with user_errors(Path.cwd()):
        configs = parse(sys.argv[1:])
        if not is_exported(configs.export):
            export(configs.export)
        evaluate_export(configs.evaluate)


def parse(arguments: Sequence[str]) -> ExportAndEvaluate:
    """The configurations of both commands. Raises ConfigError."""
    run_dir, export_dir = value_of("run_dir", arguments), value_of("export_dir", arguments)
    if run_dir is None:
        raise ConfigError("run_dir is not set; give run_dir=FOLDER, the folder of a training run")
    export_dir = export_dir or str(Path(run_dir).expanduser() / EXPORT_FOLDER)
    others = [argument for argument in arguments if argument.partition("=")[0] not in ("run_dir", "export_dir")]
    paths = [f"run_dir={run_dir}", f"output_dir={export_dir}"]
    return ExportAndEvaluate(
        compose_command(paths, ExportConfig, "export"),
        compose_command([f"export_dir={export_dir}", *others], EvaluateConfig, "evaluate"),
    )


def value_of(key: str, arguments: Sequence[str]) -> str | None:
    """The value of `key=VALUE` among the arguments, of the last one if there are several; None if there is none."""
    return next((a.partition("=")[2] for a in reversed(arguments) if a.partition("=")[0].lstrip("+") == key), None)


def is_exported(config: ExportConfig) -> bool:
    """Whether the folder holds the export. Raises CheckpointError if it holds one of another checkpoint."""
    folder = Path(config.output_dir)
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    newest = find_good_checkpoint(Path(config.run_dir) / "checkpoints")[0].step
    exported = read_export(folder).training.get("step")
    if exported != newest:
        raise CheckpointError(
            f"{folder} holds an export of step {exported}, but the newest checkpoint of {config.run_dir} is of step "
            f"{newest}; give another export_dir, or remove that one"
        )
    return True


if __name__ == "__main__":
    main()
