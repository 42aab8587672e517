"""The tables of the verdict, in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from kraken_train.bench.grid import REFERENCE
from kraken_train.common.token_counts import format_tokens
from kraken_train.evaluation.results import markdown_table
from studies.architectures.comparison import Comparison, Trained, rounded
from studies.architectures.loss_curves import Curve, Point, fit
from studies.architectures.plan import FEWEST, Plan
from studies.results import Result
from studies.spread import standard_error
from studies.study import Run


def conditions(plan: Plan) -> str:
    """What is compared, and how: for readers of the tables."""
    tokens = ", ".join(format_tokens(count) for count in plan.tokens)
    rates = ", ".join(f"{rate:g}" for rate in plan.learning_rates)
    return (
        f"Models of a size have equal parameters, embeddings included, within {plan.tolerance:.0%}. Each is trained on "
        f"{tokens} tokens, each time with a learning-rate schedule of that length, at its best of the learning rates "
        f"{rates} after {format_tokens(plan.tokens[0])} tokens. Losses are those of the validation after the last "
        f"step, in nats per token, means of {len(plan.seeds)} seeds with standard errors. Equal time is that in which "
        f"the {REFERENCE} Transformer sees {format_tokens(plan.tokens[-2])} tokens; what others have learned then is "
        f"interpolated. Step times are predicted by the roofline of kraken_train.planning, not measured, for "
        f"{plan.devices} devices of {plan.time.cluster} that share a copy over {plan.time.interconnect}: for the "
        f"models that were trained, and for models of {plan.time.large_name}, whose size is one of practice."
    )


def size_table(found: Mapping[str, Trained], timed: Sequence[Comparison]) -> str:
    """A line for each architecture; the least loss of a column is bold."""
    columns = [
        (f"{rounded(tokens)} tokens", {name: one.by_tokens[tokens] for name, one in found.items()})
        for tokens in sorted(next(iter(found.values())).by_tokens)
    ]
    columns += [(f"equal time, {comparison.place}", comparison.losses) for comparison in timed]
    header = ["architecture", "parameters", "learning rate", *(title for title, _ in columns)]
    header += [f"step time, {comparison.place}" for comparison in timed]
    rows = []
    for name, one in found.items():
        row = [name, f"{one.model.num_parameters:,}", f"{one.learning_rate:g}"]
        for _, losses in columns:
            least = min(losses, key=lambda other: statistics.mean(losses[other]))
            cell = with_error(losses[name]) if name in losses else "not known"
            row.append(f"**{cell}**" if name == least else cell)
        row += [f"{(comparison.relative_seconds or {})[name]:.2f}" for comparison in timed]
        rows.append(row)
    return markdown_table(header, rows)


def rate_table(plan: Plan, results: Mapping[Run, Result]) -> str:
    """Losses after the fewest tokens by learning rate, the least one bold; those without any are left out."""
    rows = []
    for size in plan.sizes:
        for name in plan.architectures:
            losses = plan.screened(size, name, results)
            if not losses:
                continue
            best = plan.best_rate(size, name, results)
            cells = {rate: f"{losses[rate]:.4f}" if rate in losses else "not run" for rate in plan.learning_rates}
            rows.append([size, name, *(f"**{cell}**" if rate == best else cell for rate, cell in cells.items())])
    return markdown_table(["size", "architecture", *(f"{rate:g}" for rate in plan.learning_rates)], rows)


def edges(plan: Plan, found: Mapping[str, Mapping[str, Trained]]) -> list[str]:
    """A warning where the best learning rate is the least or the highest that was tried."""
    at_edge = [
        f"{name} of {size}"
        for size, of_size in found.items() for name, one in of_size.items()
        if one.learning_rate in (plan.learning_rates[0], plan.learning_rates[-1])
    ]  # fmt: skip
    if not at_edge:
        return []
    return [f"The best rate is the least or the highest that was tried, so a better one may lie beyond it: "
            f"{', '.join(at_edge)}."]  # fmt: skip


def curve_section(plan: Plan, found: Mapping[str, Mapping[str, Trained]]) -> list[str]:
    """Fits of L(N, D), those of each seed on its own, so that their errors are known."""
    complete = [size for size, of_size in found.items() if len(of_size) == len(plan.architectures)]
    if len(complete) < FEWEST:
        return [f"They are fitted once {FEWEST} sizes are finished. Finished so far: {', '.join(complete) or 'none'}."]
    fits = [
        fit({
            name: [
                Point(found[size][name].model.num_parameters, tokens, loss)
                for size in complete for tokens, loss in found[size][name].losses[seed].items()
            ]
            for name in plan.architectures
        })
        for seed in plan.seeds
    ]  # fmt: skip
    rows = [[name, *curve_cells([of_seed[name] for of_seed in fits])] for name in plan.architectures]
    explained = (
        "L(N, D) = E + A / N^alpha + B / D^beta with N parameters and D tokens, fitted to the losses of "
        f"{len(complete)} sizes and {len(plan.tokens)} numbers of tokens for each seed on its own; E, the entropy of "
        "the text, is the same for all architectures. The error is the root of the mean squared relative error of the "
        "losses. The sizes and tokens are few and close, so the curves describe these runs and predict no others."
    )
    return [explained, markdown_table(["architecture", "E", "A", "alpha", "B", "beta", "error"], rows)]


def curve_cells(curves: Sequence[Curve]) -> list[str]:
    """Means over seeds with standard errors."""
    return [
        with_error([curve.entropy for curve in curves], 3),
        f"{statistics.geometric_mean([curve.a for curve in curves]):.3g}",
        with_error([curve.alpha for curve in curves], 3),
        f"{statistics.geometric_mean([curve.b for curve in curves]):.3g}",
        with_error([curve.beta for curve in curves], 3),
        f"{statistics.mean([curve.error for curve in curves]):.2%}",
    ]


def with_error(values: Sequence[float], digits: int = 4) -> str:
    error = standard_error(values)
    return f"{statistics.mean(values):.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
