"""Writes the study's ledger, studies/quality/ledger.md, from its runs: python -m studies.quality.ledger RUNS

Losses are those of the validation after the last step, in nats per token, with standard errors over seeds. Differences
are taken seed by seed, since runs of one seed have the same samples in the same order.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from kraken_train.common.cli import user_errors
from kraken_train.common.help import make_parser
from kraken_train.evaluation.results import markdown_table
from kraken_train.model.config import parse_model
from kraken_train.run.folder import read_identity
from kraken_train.run.metrics import read_run
from studies.quality.arms import FOLDER, Question, Run, read_questions
from studies.quality.run import is_finished
from studies.quality.variant_config import register

HEADER = ("arm", "parameters", "tokens", "validation loss", "perplexity", "against the first arm")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("runs_dir", type=Path, metavar="RUNS", help="folder with the runs of studies.quality.run")
    options = parser.parse_args(arguments)
    output = FOLDER / "ledger.md"
    register()
    with user_errors(output):
        parts = [
            "# Ledger of the quality study",
            "Made by `python -m studies.quality.ledger`; see [README](README.md).",
        ]
        parts += [section(question, options.runs_dir) for question in read_questions()]
        output.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        print(f"wrote {output}")


def section(question: Question, runs_dir: Path) -> str:
    losses = [losses_of(arm, question.seeds, runs_dir) for arm in question.arms]
    rows = []
    for arm, of_arm in zip(question.arms, losses, strict=True):
        if not of_arm:
            rows.append((f"`{arm}`", "-", "-", "not run", "-", "-"))
            continue
        last = Run(arm, next(iter(of_arm)))
        parameters, tokens = size_of(runs_dir / last.name)
        mean = statistics.mean(of_arm.values())
        shared = [of_arm[seed] - losses[0][seed] for seed in of_arm if seed in losses[0]]
        difference = "" if of_arm is losses[0] or not shared else as_percent(shared)
        rows.append((f"`{arm}`", parameters, tokens, f"{mean:.4f}{error(list(of_arm.values()))}",
                     f"{math.exp(mean):.2f}", difference))  # fmt: skip
    return "\n\n".join(
        [
            f"## {question.name}\n\n**{question.question}**",
            f"Prediction: {question.prediction}",
            markdown_table(HEADER, rows),
            f"Decision: {question.decision.strip() if question.decision else 'open'}",
        ]
    )


def losses_of(arm: str, seeds: Sequence[int], runs_dir: Path) -> dict[int, float]:
    """The last validation loss of each seed whose run is finished."""
    losses = {}
    for seed in seeds:
        folder = runs_dir / Run(arm, seed).name
        if is_finished(folder):
            losses[seed] = read_run(folder).series("validation_loss")[1][-1]
    return losses


def size_of(folder: Path) -> tuple[str, str]:
    """Parameters and training tokens."""
    run = read_run(folder)
    identity = read_identity(folder)
    parameters = "-" if identity is None else f"{parse_model(identity['model']).num_parameters:,}"
    return parameters, f"{run.series('tokens')[1][-1] / 1e6:.2f}M"


def as_percent(differences: Sequence[float]) -> str:
    """A difference of losses as one of perplexities: +0.01 nats are 1.0% more."""
    return f"{100 * math.expm1(statistics.mean(differences)):+.1f}%{error(differences, 100, '%')}"


def error(values: Sequence[float], scale: float = 1, unit: str = "") -> str:
    """The standard error of the mean; nothing for one value."""
    if len(values) < 2:
        return ""
    deviation = scale * statistics.stdev(values) / math.sqrt(len(values))
    return f" ± {deviation:.1f}{unit}" if unit else f" ± {deviation:.4f}"


if __name__ == "__main__":
    main()
