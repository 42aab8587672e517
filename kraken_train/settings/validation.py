"""What is measured on other data than that of the training, and when."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from kraken_train.common.errors import ConfigError
from kraken_train.common.free_text import FilePath
from kraken_train.common.token_counts import Tokens
from kraken_train.common.validation import require_positive
from kraken_train.recipe.lengths import Length

SET_NAME = re.compile(r"[\w.-]+")  # part of the name of a metric


@dataclass(frozen=True)
class ValidationConfig:
    every: int  # optimizer steps; the last step is validated as well; 0: never
    samples: int  # samples, from the start of the validation split
    # tokens, as in 100M, in place of every: the step that reaches a multiple is validated; 0: never; null: every counts
    every_tokens: Tokens | None = None
    # further prepared folders, by a name for each: {books: DIR, code: DIR}; measured on their validation splits, with
    # so many samples each; null: none
    sets: dict[str, FilePath] | None = None
    # suites of tasks, files of conf/suite, or single tasks of them, that lm-evaluation-harness measures on the weights
    # as they are: [lambada, blimp, superglue/boolq]; null: none
    suites: list[str] | None = None
    suites_every: int = 1000  # optimizer steps; the last step as well
    # tokens, as in 1B, in place of suites_every: the step that reaches a multiple; null: suites_every counts
    suites_every_tokens: Tokens | None = None
    suite_data: FilePath | None = None  # folder of JSONL files for them, as in conf/evaluate.yaml; null: the Hub
    suite_limit: int | None = None  # documents of each task, the first ones; null: all

    @property
    def folders(self) -> dict[str, Path]:
        """Of the further sets."""
        return {name: Path(folder).expanduser() for name, folder in (self.sets or {}).items()}

    @property
    def interval(self) -> Length:
        return Length("validation.every", self.every, "validation.every_tokens", self.every_tokens)

    @property
    def suites_interval(self) -> Length:
        names = "validation.suites_every", "validation.suites_every_tokens"
        return Length(names[0], self.suites_every, names[1], self.suites_every_tokens)

    @property
    def enabled(self) -> bool:
        return (self.every if self.every_tokens is None else self.every_tokens) > 0

    def validate(self) -> None:
        self.interval.validate(minimum=0)
        require_positive("validation.samples", self.samples)
        self.suites_interval.validate(minimum=1)
        if self.suite_limit is not None:
            require_positive("validation.suite_limit", self.suite_limit)
        if self.suites is not None and len(set(self.suites)) < max(1, len(self.suites)):
            raise ConfigError(f"validation.suites={self.suites} must be names of suites, each once, or null for none")
        for name in ("suite_data", "suite_limit"):
            if self.suites is None and getattr(self, name) is not None:
                raise ConfigError(f"validation.{name}={getattr(self, name)} needs validation.suites=[NAME, ...]")
        for name, folder in (self.sets or {}).items():
            if not SET_NAME.fullmatch(name) or not folder:
                raise ConfigError(
                    f"validation.sets: {name or 'an empty name'}={folder} must be a name of letters, digits, '.', '_' "
                    "and '-' with the folder of prepared data, as in 'validation.sets={books: data/books}'"
                )
