"""Writes the study's ledger, studies/quality/ledger.md, and its figure: python -m studies.quality.ledger RUNS

Finished runs in RUNS are first added to `results.jsonl`, so that RUNS can be removed.

Losses are those of the validation after the last step, in nats per token, with standard errors over seeds.
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
from studies.quality.figure import draw, percent
from studies.quality.variant_config import register
from studies.results import Result, Results, differences
from studies.spread import standard_error
from studies.study import Run

FIGURE = FOLDER.parents[1] / "docs" / "quality-3m.png"
HEADER = ("arm", "parameters", "tokens", "seeds", "validation loss", "perplexity", "against the first arm")


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
        draw([arm for question in questions for arm in question.arms], results, FIGURE)
        print(f"wrote {output} and {FIGURE}")


def section(question: Question, results: Mapping[Run, Result]) -> str:
    # All seeds that are recorded, also those that only another question asks for.
    found = [[result for run, result in results.items() if run.arm == arm] for arm in question.arms]
    rows = []
    for arm, of_arm in zip(question.arms, found, strict=True):
        if not of_arm:
            rows.append((f"`{arm}`", "-", "-", "-", "not run", "-", "-"))
            continue
        losses = [result.validation_loss for result in of_arm]
        size, mean = of_arm[0], statistics.mean(losses)
        shared = differences(results, arm, question.arms[0])
        difference = "" if of_arm is found[0] or not shared else as_percent(shared)
        seeds = ", ".join(str(result.seed) for result in of_arm)
        rows.append((f"`{arm}`", f"{size.parameters:,}", f"{size.tokens / 1e6:.2f}M", seeds,
                     f"{mean:.4f}{error(losses)}", f"{math.exp(mean):.2f}", difference))  # fmt: skip
    return "\n\n".join(
        [
            f"## {question.name}\n\n**{question.question}**",
            f"Prediction: {question.prediction}",
            markdown_table(HEADER, rows),
            f"Decision: {question.decision.strip() if question.decision else 'open'}",
        ]
    )


def as_percent(values: Sequence[float]) -> str:
    """A difference of losses as one of perplexities: +0.01 nats are 1.0% more."""
    return f"{percent(statistics.mean(values)):+.1f}%{error(values, 100, '%')}"


def error(values: Sequence[float], scale: float = 1, unit: str = "") -> str:
    """The standard error of the mean; nothing for one value."""
    found = standard_error(values)
    if found is None:
        return ""
    return f" ± {scale * found:.1f}{unit}" if unit else f" ± {scale * found:.4f}"


if __name__ == "__main__":
    main()
