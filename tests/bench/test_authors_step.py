"""The authors' step against our model: the same losses, gradients and updates from the same weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import random_ids, shareable_configs

from kraken_train.bench.authors_step import AuthorsStep, LoopedKraken
from kraken_train.bench.plain_engine import PlainEngine
from kraken_train.common.cli import compose_command
from kraken_train.common.errors import ConfigError
from kraken_train.config import TrainConfig
from kraken_train.model.config import ModelConfig
from kraken_train.model.registry import build_model
from kraken_train.parallel.ranks import Runtime
from kraken_train.parallel.sharding import ModelRank
from kraken_train.parallel.step_timer import StepTimer

STEPS = 3
KRAKEN = shareable_configs()["kraken-4"]


@dataclass(frozen=True)
class OneProcess:
    data_size: int = 1
    model_rank: ModelRank = dataclasses.field(default_factory=lambda: ModelRank(0, 1))


def train(engine_class: Any, config: ModelConfig, precision: str) -> list[float]:
    settings = ["data_dir=none", "run_dir=none", "global_batch_size=4", "micro_batch_size=2", f"precision={precision}"]
    training = compose_command(settings, TrainConfig, "train")
    runtime = Runtime(0, 0, 1, 1, use_gpu=False)
    engine = engine_class(build_model(config), training, OneProcess(), runtime, StepTimer(torch.device("cpu")))
    ids = random_ids(config, STEPS * 4, config.context_length)
    for step in range(STEPS):
        for micro in range(2):
            batch = ids[4 * step + 2 * micro :][:2]
            engine.accumulate(batch, batch.roll(-1, dims=1))
        engine.step(1e-2)
    return engine.results()


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 1e-2)])
def test_same_losses(precision: str, tolerance: float) -> None:
    """Of steps that clip the gradients and decay the matrices; the learning rate is so large that these count."""
    ours, theirs = (train(engine, KRAKEN, precision) for engine in (PlainEngine, AuthorsStep))
    assert theirs == pytest.approx(ours, rel=tolerance)
    assert theirs[-1] < theirs[0]


def test_same_loss_and_gradient_in_double() -> None:
    model = build_model(KRAKEN).double()
    looped = LoopedKraken(model).double()
    looped.load_stacked(model.state_dict())
    ids = random_ids(KRAKEN, 2, KRAKEN.context_length)
    ours, theirs = model.loss(ids, ids.flip(1)), looped(ids, ids.flip(1))
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-12)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(looped.token_embedding.weight.grad, model.token_embedding.weight.grad)


@pytest.mark.parametrize("name", ["standard", "kraken-6", "kraken-modern"])
def test_models_that_their_code_does_not_have(name: str) -> None:
    with pytest.raises(ConfigError, match="their code"):
        LoopedKraken(build_model(shareable_configs()[name]))


@pytest.mark.parametrize("changes", [{"ffn_reads_stream": True}, {"embedding_size": 48}], ids=str)
def test_settings_that_their_code_does_not_have(changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(ConfigError, match=f"their code has {name}="):
        LoopedKraken(build_model(KRAKEN.replace(**changes)))
