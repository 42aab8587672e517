"""How far a run is, in steps and tokens, and the global batch size there: constant, or a ramp over the tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

from pydantic import BeforeValidator

from kraken_train.common.errors import ConfigError
from kraken_train.common.token_counts import format_tokens, parse_tokens
from kraken_train.common.validation import require_positive

AS_IN = "'global_batch_size={0: 128, 1B: 256}'"


def parse_batch_size(value: Any) -> int | dict[int, int]:
    """A number of samples, or `{tokens: samples}`, whose tokens may have units. Raises ValueError."""
    if isinstance(value, Mapping):
        ramp = {part(parse_tokens, tokens): part(parse_samples, samples) for tokens, samples in value.items()}
        if len(ramp) < len(value):
            raise ValueError("the same number of tokens twice; give one size for each")
        return ramp
    return parse_samples(value)


def part(parse: Callable[[Any], int], value: Any) -> int:
    """`parse(value)`, with an error that says which part of a ramp it is about."""
    try:
        return parse(value)
    except ValueError as error:
        raise ValueError(f"{value} is {error}") from None


def parse_samples(value: Any) -> int:
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            if float(value) == int(value):
                return int(value)
        except (ValueError, OverflowError):
            pass
    raise ValueError(f"no whole number of samples; give one such as 128, or a ramp as in {AS_IN}")


BatchSize = Annotated[int | dict[int, int], BeforeValidator(parse_batch_size)]  # the type of a setting


def validate_batch_size(size: int | dict[int, int]) -> None:
    """Raises ConfigError."""
    if isinstance(size, int):
        require_positive("global_batch_size", size)
        return
    for samples in size.values():
        require_positive("global_batch_size", samples)
    begins = list(size)
    if begins[:1] != [0] or any(first >= second for first, second in pairwise(begins)):
        raise ConfigError(
            f"global_batch_size={describe_batch_size(size)} must give the first size for 0 tokens and the others in "
            f"the order of their tokens, as in {AS_IN}"
        )


def describe_batch_size(size: int | Mapping[Any, int]) -> str:
    """As a user types it: `128` or `{0: 128, 1B: 256}`."""
    if isinstance(size, int):
        return str(size)
    return f"{{{', '.join(f'{format_tokens(int(tokens))}: {samples}' for tokens, samples in size.items())}}}"


@dataclass(frozen=True)
class Position:
    """How far a run is: what it has trained on, without the data that a rollback has skipped."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # tokens of these steps


START = Position()


@dataclass(frozen=True)
class Step:
    """An optimizer step."""

    before: Position
    after: Position
    samples: int

    @property
    def number(self) -> int:
        """The first step of a run is 1."""
        return self.after.step

    @property
    def tokens(self) -> int:
        return self.after.tokens - self.before.tokens


class BatchRamp:
    """The optimizer steps of a run, by their sizes.

    `size` maps a number of tokens to the samples, of `context_length` tokens each, of the steps that begin after so
    many tokens or more. So a step never has two sizes, and borders are in effect rounded up to whole steps.
    """

    def __init__(self, size: int | dict[int, int], context_length: int) -> None:
        self.sizes = {0: size} if isinstance(size, int) else size
        self.context_length = context_length

    def samples_at(self, tokens: int) -> int:
        """The size of the step that begins after so many tokens."""
        return next(samples for begin, samples in reversed(self.sizes.items()) if begin <= tokens)

    def step_at(self, position: Position) -> Step:
        samples = self.samples_at(position.tokens)
        after = Position(position.step + 1, position.tokens + samples * self.context_length)
        return Step(position, after, samples)

    def stretches(self, start: Position = START) -> Iterator[tuple[Position, int, int | None]]:
        """(position, samples, steps) of the steps of equal size from `start` on; the last of them have no end: None."""
        position = start
        for border in [begin for begin in self.sizes if begin > start.tokens]:
            samples = self.samples_at(position.tokens)
            tokens = samples * self.context_length
            steps = max(0, -(-(border - position.tokens) // tokens))
            if steps:
                yield position, samples, steps
            position = Position(position.step + steps, position.tokens + steps * tokens)
        yield position, self.samples_at(position.tokens), None

    def after_steps(self, steps: int, start: Position = START) -> Position:
        """Where a run, from `start` on, is after step number `steps`; at `start` if it has done that step."""
        for begin, samples, count in self.stretches(start):  # noqa: B007
            more = max(0, steps - begin.step)
            if count is None or more <= count:
                break
        return Position(begin.step + more, begin.tokens + more * samples * self.context_length)

    def reaching(self, tokens: int, start: Position = START) -> Position:
        """Where a run, from `start` on, has done so many tokens or, as steps are whole, a few more."""
        for begin, samples, count in self.stretches(start):
            size = samples * self.context_length
            steps = max(0, -(-(tokens - begin.tokens) // size))
            if count is None or steps <= count:
                break
        return Position(begin.step + steps, begin.tokens + steps * size)
