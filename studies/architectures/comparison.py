"""Who is better: losses of the architectures at one size, after equal tokens or in equal time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kraken_train.bench.grid import REFERENCE
from kraken_train.common.token_counts import format_tokens
from kraken_train.model.config import ModelConfig
from studies.architectures.equal_time import loss_after
from studies.architectures.plan import Plan
from studies.results import Result
from studies.study import Run

ERRORS = 2.0  # standard errors of a difference that make it more than noise


@dataclass(frozen=True)
class Trained:
    """An architecture at a size, all of whose runs are finished."""

    model: ModelConfig
    learning_rate: float
    losses: dict[int, dict[int, float]]  # by seed, then by tokens as trained, rounded up to whole steps

    @property
    def by_tokens(self) -> dict[int, list[float]]:
        """The losses of all seeds."""
        seeds = list(self.losses.values())
        return {tokens: [of_seed[tokens] for of_seed in seeds] for tokens in seeds[0]}


def trained(plan: Plan, size: str, results: Mapping[Run, Result]) -> dict[str, Trained]:
    """By architecture, in the order of the plan; those of which a run is missing are left out."""
    found = {}
    for name in plan.architectures:
        rate = plan.best_rate(size, name, results)
        runs = {} if rate is None else plan.compared(size, name, rate)
        if rate is None or any(run not in results for run in runs.values()):
            continue
        losses: dict[int, dict[int, float]] = {}
        for (_, seed), run in runs.items():
            losses.setdefault(seed, {})[results[run].tokens] = results[run].validation_loss
        found[name] = Trained(plan.models[size][name], rate, losses)
    return found


@dataclass(frozen=True)
class Comparison:
    size: str
    rule: str  # what is equal
    place: str  # whose step times count; empty where tokens are equal
    losses: dict[str, list[float]]  # by architecture, in the order of seeds
    unknown: tuple[str, ...] = ()  # architectures whose tokens in this time are more or fewer than were trained
    relative_seconds: dict[str, float] | None = None  # of a training step; None: tokens are equal

    @property
    def ordered(self) -> list[str]:
        """The architectures, the best first."""
        return sorted(self.losses, key=lambda name: statistics.mean(self.losses[name]))

    def differences(self, name: str, other: str) -> list[float]:
        """Seed by seed, since runs of one seed have the same samples in the same order."""
        return [a - b for a, b in zip(self.losses[name], self.losses[other], strict=True)]

    def noise(self, subject: str) -> float:
        """The standard error of a difference from the subject, of all architectures together: seeds are few."""
        others = [name for name in self.losses if name != subject]
        variance = statistics.mean(statistics.variance(self.differences(name, subject)) for name in others)
        return math.sqrt(variance / len(self.losses[subject]))


def at_equal_tokens(size: str, found: Mapping[str, Trained]) -> Comparison:
    """After the most tokens."""
    tokens = max(found[REFERENCE].by_tokens)
    return Comparison(
        size, f"{rounded(tokens)} tokens", "", {name: one.by_tokens[tokens] for name, one in found.items()}
    )


def at_equal_time(size: str, found: Mapping[str, Trained], seconds: Mapping[str, float], place: str) -> Comparison:
    """In the time in which the standard Transformer sees the second most tokens, so that faster ones see more."""
    tokens = sorted(found[REFERENCE].by_tokens)[-2]
    losses: dict[str, list[float]] = {}
    for name, one in found.items():
        own = tokens * seconds[REFERENCE] / seconds[name]
        known = [loss for of_seed in one.losses.values() if (loss := loss_after(own, of_seed)) is not None]
        if known:
            losses[name] = known
    return Comparison(
        size,
        f"the predicted time of {rounded(tokens)} tokens of {REFERENCE}, {place}",
        place,
        losses,
        tuple(name for name in found if name not in losses),
        {name: seconds[name] / seconds[REFERENCE] for name in found},
    )


def rounded(tokens: int) -> str:
    """With one digit after the point: `4.0M` for 4,001,792."""
    digits = 10 ** max(0, len(str(tokens)) - 2)
    return format_tokens(round(tokens / digits) * digits)


def verdict(comparison: Comparison, subjects: Sequence[str]) -> str:
    """Sentences: who is best, and what each of the subjects wins and loses against."""
    known = [name for name in subjects if name in comparison.losses]
    beginning = f"**{comparison.size}, {comparison.rule}:**"
    if not known or len(comparison.losses) < 2:
        return f"{beginning} there is nothing to compare yet."
    sentences = [f"{beginning} {comparison.ordered[0]} has the lowest loss."]
    sentences += [outcome(comparison, name) for name in known]
    if comparison.unknown:
        sentences.append(
            f"Not known, since it would see more or fewer tokens than were trained: {listed(comparison.unknown)}."
        )
    return " ".join(sentences)


def outcome(comparison: Comparison, subject: str) -> str:
    """Sentences on one architecture."""
    order = comparison.ordered
    kinds: dict[str, list[str]] = {"wins against": [], "loses to": [], "is within noise of": []}
    for name in order:
        if name == subject:
            continue
        difference = statistics.mean(comparison.differences(subject, name))
        certain = abs(difference) > ERRORS * comparison.noise(subject)
        kind = ("wins against" if difference < 0 else "loses to") if certain else "is within noise of"
        kinds[kind].append(name)
    found = listed([f"{kind} {listed(names)}" for kind, names in kinds.items() if names])
    text = f"{subject} is number {order.index(subject) + 1} of {len(order)}: it {found}."
    if REFERENCE in comparison.losses:
        percent = 100 * math.expm1(statistics.mean(comparison.differences(subject, REFERENCE)))
        text += f" Its perplexity is {abs(percent):.1f}% {'above' if percent > 0 else 'below'} {REFERENCE}'s."
    return text


def listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
