"""Writes the verdict of the study of architectures: python -m studies.architectures.verdict PLAN RUNS

Finished runs in RUNS are first added to the results beside PLAN, so that RUNS can be removed. The verdict, PLAN.md, and
its figure, PLAN.png, are written beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from kraken_train.bench.grid import REFERENCE
from kraken_train.common.cli import user_errors
from kraken_train.common.help import make_parser
from studies.architectures.comparison import Comparison, Trained, at_equal_time, at_equal_tokens, trained, verdict
from studies.architectures.equal_time import step_seconds
from studies.architectures.figure import draw
from studies.architectures.plan import Plan, read_plan
from studies.architectures.tables import conditions, curve_section, edges, rate_table, size_table
from studies.results import Result
from studies.study import Run


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("plan", type=Path, metavar="PLAN", help="what was trained: studies/architectures/cpu.yaml, ...")
    parser.add_argument("runs_dir", type=Path, metavar="RUNS", help="folder with the runs of studies.architectures.run")
    options = parser.parse_args(arguments)
    output, figure = options.plan.with_suffix(".md"), options.plan.with_suffix(".png")
    with user_errors(output):
        plan = read_plan(options.plan)
        results = plan.results(options.runs_dir)
        found = {size: trained(plan, size, results) for size in plan.sizes}
        comparable = {size: of_size for size, of_size in found.items() if REFERENCE in of_size}
        timed = equal_times(plan, comparable)
        if comparable:
            draw(comparable, timed, figure)
        output.write_text(report(plan, results, comparable, timed, figure.name), encoding="utf-8")
        print(f"wrote {output}")


def equal_times(plan: Plan, found: Mapping[str, Mapping[str, Trained]]) -> dict[str, list[Comparison]]:
    """Of each size, with the step times of its models and with those of models of practical size."""
    large = step_seconds(plan, plan.alike(plan.time.large_model), plan.time.large)
    return {
        size: [
            at_equal_time(size, of_size, step_seconds(plan, plan.models[size], plan.time.own), "own size"),
            at_equal_time(size, of_size, large, f"as at {plan.time.large_name}"),
        ]
        for size, of_size in found.items()
    }


def report(
    plan: Plan,
    results: Mapping[Run, Result],
    found: Mapping[str, Mapping[str, Trained]],
    timed: Mapping[str, list[Comparison]],
    figure: str,
) -> str:
    """`found` and `timed` have the sizes at which the standard Transformer is finished."""
    parts = [
        f"# Verdict of {plan.path.name}",
        "Made by `python -m studies.architectures.verdict`; see [README](README.md).",
    ]
    missing = plan.missing(plan.sizes, results)
    if missing:
        parts.append(f"Not finished: {len(missing)} or more runs are missing, such as {missing[0].name}.")
    for size, of_size in found.items():
        unfinished = [name for name in plan.architectures if name not in of_size]
        if unfinished:
            parts.append(f"At {size} these are not finished and not compared: {', '.join(unfinished)}.")
    if not found:
        return "\n\n".join([*parts, f"The {REFERENCE} Transformer is not finished at any size."]) + "\n"
    comparisons = [one for size in found for one in (at_equal_tokens(size, found[size]), *timed[size])]
    parts.append("\n".join(f"- {verdict(one, plan.krakens)}" for one in comparisons))
    parts += [f"![Loss over tokens and over predicted time]({figure})", conditions(plan)]
    for size, of_size in found.items():
        parts += [f"## {size}", size_table(of_size, timed[size])]
    parts += ["## Learning rates", rate_table(plan, results), *edges(plan, found)]
    parts += ["## Curves", *curve_section(plan, found)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
