"""When a run is saved, where, and for how long."""

from __future__ import annotations

from dataclasses import dataclass

from checkpoints.training.retention import Retention
from kraken_train.common.free_text import FilePath, Text
from kraken_train.common.token_counts import Tokens
from kraken_train.common.validation import require_at_least, require_positive
from kraken_train.recipe.lengths import Length


@dataclass(frozen=True)
class CheckpointConfig:
    every: int  # optimizer steps; the last step is saved as well
    keep: int  # checkpoints that stay on disk, the newest ones
    asynchronous: bool  # write in the background while training continues
    # tokens, as in 100M, in place of every: the step that reaches a multiple is saved; null: every counts
    every_tokens: Tokens | None = None
    # steps; the first checkpoint at or after each multiple of it also stays; null: none
    keep_every: int | None = None
    keep_hours: float = 0  # checkpoints that are younger than so many hours also stay
    # folder on a local disk of each node: a save is written there first, and copied to run_dir while training
    # continues; null: none
    stage_dir: FilePath | None = None
    # URL of object storage, such as s3://bucket/run or gs://bucket/run, to which finished checkpoints are copied too,
    # with the same ones kept; an empty run_dir continues from the newest there; null: none
    remote_dir: Text | None = None

    @property
    def retention(self) -> Retention:
        return Retention(self.keep, self.keep_every, 3600 * self.keep_hours)

    @property
    def interval(self) -> Length:
        return Length("checkpoint.every", self.every, "checkpoint.every_tokens", self.every_tokens)

    def validate(self) -> None:
        require_positive("checkpoint.every", self.every)
        if self.every_tokens is not None:
            require_positive("checkpoint.every_tokens", self.every_tokens)
        require_positive("checkpoint.keep", self.keep)
        if self.keep_every is not None:
            require_positive("checkpoint.keep_every", self.keep_every)
        require_at_least("checkpoint.keep_hours", self.keep_hours, 0)
