"""What the steps of a run in phases read: on each rank, across borders, and after a rollback into the phase before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from data.prepared_set import write_set
from torch import Tensor

from kraken_train.data.loader import BatchLoader
from kraken_train.data.phases import RunData
from kraken_train.health.loss_monitor import Trouble
from kraken_train.recipe.batch_ramp import START, BatchRamp, Position
from kraken_train.recipe.lengths import Length
from kraken_train.recipe.phases import Phase, run_length
from kraken_train.recipe.schedules import ConstantSchedule
from kraken_train.recipe.step_plan import StepPlan
from kraken_train.training import trainer as trainer_module
from kraken_train.training.trainer import Trainer

CPU = torch.device("cpu")
PHASES = (Phase(until=100), Phase(until=300))  # steps of 32 tokens: the first 4 are of the first phase
BACK = Position(2, 64)  # to which a rollback leads


class ReadingTrainer(Trainer):
    """With what decides about its data alone."""

    def __init__(self, data: RunData, rank: int = 0, ranks: int = 1) -> None:
        self.config = SimpleNamespace(micro_batch_size=2)  # type: ignore[assignment]
        self.mesh = SimpleNamespace(data_rank=rank, data_size=ranks)  # type: ignore[assignment]
        self.run = self.loss_monitor = SimpleNamespace(checkpoints=None)  # type: ignore[assignment]
        self.runtime = SimpleNamespace(on_first=lambda work: work(), is_first=False)  # type: ignore[assignment]
        self.engine = SimpleNamespace(verify_replicas=lambda: None)  # type: ignore[assignment]
        self.checkpoints = SimpleNamespace(finish=lambda: None, discard_newer=lambda checkpoint: None)  # type: ignore[assignment]
        self.watchdog = SimpleNamespace(report_progress=lambda: None)  # type: ignore[assignment]
        self.metrics = None
        length: Length = run_length(1, None, PHASES)
        self.plan = StepPlan(length, ConstantSchedule(warmup_steps=0), BatchRamp(4, 8), PHASES)
        self.samples = data.samples(8, seed=5)
        self.position, self.consumed_samples = START, 0

    def load_checkpoint(self, checkpoint: object) -> None:
        self.position, self.consumed_samples = BACK, 8

    def read(self, batches: Iterator[tuple[Tensor, Tensor]], steps: int) -> list[Tensor]:
        """The inputs of so many steps, (4 / ranks, 8) each, which then count as done."""
        found = []
        for _ in range(steps):
            parts = [next(batches)[0] for _ in range(2 // self.mesh.data_size)]
            found.append(torch.cat(parts))
            self.position, self.consumed_samples = self.plan.step_at(self.position).after, self.consumed_samples + 4
        return found


@pytest.fixture
def data(tmp_path: Path) -> RunData:
    web = write_set(tmp_path / "web", {"train": 1601}, size=700)
    books = write_set(tmp_path / "books", {"train": 801}, first=200, size=700)
    return RunData({0: {web: 1}, 100: {web: 1, books: 1}})


def expected(data: RunData, phase: int, first: int) -> Tensor:
    """The inputs of a step that begins with sample `first` of the run; the second phase has begun with sample 13."""
    numbers = range(first - (0, 13)[phase], first - (0, 13)[phase] + 4)
    return torch.from_numpy(data.samples(8, seed=5)[phase].samples.batch(numbers))[:, :-1]


def test_ranks_divide_the_samples_of_all_phases(data: RunData) -> None:
    parts = []
    for rank in (0, 1):
        trainer = ReadingTrainer(data, rank, 2)
        with BatchLoader(trainer.reads_of_rank(), CPU) as batches:
            parts.append(trainer.read(batches, 10))  # and on beyond the end
    for step, halves in enumerate(zip(*parts, strict=True)):
        assert torch.equal(torch.cat(halves), expected(data, 0 if step < 4 else 1, 4 * step))


def test_a_rollback_into_the_phase_before(data: RunData, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read ahead is of the second phase; the steps that are done again are of the first."""
    for name in ("require_rollback", "find_checkpoint_before"):
        monkeypatch.setattr(trainer_module, name, lambda *arguments: SimpleNamespace(path="the checkpoint"))
    trainer = ReadingTrainer(data)
    with BatchLoader(trainer.reads_of_rank(), CPU) as trainer.batches:
        trainer.read(trainer.batches, 6)
        trainer.roll_back(Trouble(first=5, last=6, spike=True, reason="a spike"))
        assert (trainer.position, trainer.consumed_samples) == (BACK, 24)
        for step, tokens in enumerate(trainer.read(trainer.batches, 4)):
            assert torch.equal(tokens, expected(data, 0 if step < 2 else 1, 24 + 4 * step))
