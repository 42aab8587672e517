"""Predicted collectives against those that a micro-batch really does."""

from __future__ import annotations

import pytest
from helpers import random_ids, shareable_configs
from thread_ranks import ThreadSum, on_two_threads, part_of

from kraken_train.model.registry import build_model
from kraken_train.planning.fake_trace import fake_head
from kraken_train.planning.layout import TrainingLayout
from kraken_train.planning.teacher import teacher_traffic
from kraken_train.planning.traffic import within_copy

SAMPLES, WIDTH = 2, 2  # of a micro-batch; bytes of a value in bf16


@pytest.mark.parametrize("name", shareable_configs())
def test_sums_of_a_micro_batch(name: str) -> None:
    """Their number and their bytes, among two ranks, of training and of a teacher's forward pass."""
    config = shareable_configs()[name]
    whole, ids = build_model(config, seed=3).double(), random_ids(config, SAMPLES, config.context_length)
    forward, both = ThreadSum(), ThreadSum()

    def run(rank: int) -> None:
        part_of(whole, rank, forward).last_hidden(ids)
        part_of(whole, rank, both).loss(ids, ids).backward()

    on_two_threads(run, both.barrier)
    layout = TrainingLayout(2, 1, SAMPLES, accumulation_steps=1)
    for total, predicted in ((both, within_copy(config, layout)), (forward, teacher_traffic(config, layout))):
        sums = [collective for collective in predicted if collective.kind == "all-reduce"]
        assert sum(collective.count for collective in sums) == total.calls[0]
        assert sum(collective.bytes for collective in sums) == WIDTH * total.values[0]


def test_a_shared_vocabulary_sums_the_embedding() -> None:
    """Of the model forward, and of its head backward; of a teacher forward only."""
    config = shareable_configs()["kraken-modern"]
    size = SAMPLES * config.context_length * 36 * WIDTH
    layout = TrainingLayout(2, 1, SAMPLES, accumulation_steps=1, vocab_parallel=True)
    for predicted, count in ((within_copy(config, layout), 2), (teacher_traffic(config, layout), 1)):
        sizes = {
            collective.purpose: (collective.size, collective.count)
            for collective in predicted
            if collective.purpose.startswith("embedding")
        }
        assert list(sizes.values()) == [(size, count)]


def test_the_head_of_a_teacher() -> None:
    config = shareable_configs()["kraken-modern"]
    head = fake_head(TrainingLayout(2, 1, SAMPLES, accumulation_steps=1, vocab_parallel=True, teacher=config))
    assert head is not None
    assert head.shape == (66, 36)
