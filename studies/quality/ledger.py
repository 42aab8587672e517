"""Writes the study's ledger, studies/quality/ledger.md: python -m studies.quality.ledger RUNS

Finished runs in RUNS are first added to `results.jsonl`, so that RUNS can be removed.

Losses are those of the validation after the last step, in nats per token, with standard errors over seeds. Differences
are taken seed by seed, since runs of one seed have the same samples in the same order.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from kraken_train.common.cli import user_errors
from kraken_train.common.help import make_parser
from kraken_train.evaluation.results import markdown_table
from studies.quality.arms import FOLDER, STUDY, Question, read_questions
from studies.quality.variant_config import register
from studies.results import Result, Results
from studies.spread import standard_error
from studies.study import Run

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
        questions = read_questions()
        results = Results(STUDY, options.runs_dir).add([run for question in questions for run in question.runs])
        parts += [section(question, results) for question in questions]
        output.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        print(f"wrote {output}")


def section(question: Question, results: Mapping[Run, Result]) -> str:
    found = [{run.seed: results[run] for run in question.runs if run.arm == arm and run in results}
             for arm in question.arms]  # fmt: skip
    first = {seed: result.validation_loss for seed, result in found[0].items()}
    rows = []
    for arm, of_arm in zip(question.arms, found, strict=True):
        if not of_arm:
            rows.append((f"`{arm}`", "-", "-", "not run", "-", "-"))
            continue
        losses = {seed: result.validation_loss for seed, result in of_arm.items()}
        size = next(iter(of_arm.values()))
        mean = statistics.mean(losses.values())
        shared = [loss - first[seed] for seed, loss in losses.items() if seed in first]
        difference = "" if of_arm is found[0] or not shared else as_percent(shared)
        rows.append((f"`{arm}`", f"{size.parameters:,}", f"{size.tokens / 1e6:.2f}M",
                     f"{mean:.4f}{error(list(losses.values()))}", f"{math.exp(mean):.2f}", difference))  # fmt: skip
    return "\n\n".join(
        [
            f"## {question.name}\n\n**{question.question}**",
            f"Prediction: {question.prediction}",
            markdown_table(HEADER, rows),
            f"Decision: {question.decision.strip() if question.decision else 'open'}",
        ]
    )


def as_percent(differences: Sequence[float]) -> str:
    """A difference of losses as one of perplexities: +0.01 nats are 1.0% more."""
    return f"{100 * math.expm1(statistics.mean(differences)):+.1f}%{error(differences, 100, '%')}"


def error(values: Sequence[float], scale: float = 1, unit: str = "") -> str:
    """The standard error of the mean; nothing for one value."""
    found = standard_error(values)
    if found is None:
        return ""
    return f" ± {scale * found:.1f}{unit}" if unit else f" ± {scale * found:.4f}"


if __name__ == "__main__":
    main()
