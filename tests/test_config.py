"""Models of `conf/model` against the paper, and settings from YAML to dataclasses."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import yaml
from conf_models import conf_model
from helpers import REPOSITORY
from hydra import compose, initialize_config_dir

from kraken_train.bench.throughput_config import ThroughputConfig
from kraken_train.common.cli import compose_choice, compose_command
from kraken_train.common.errors import ConfigError
from kraken_train.common.settings import from_dict, from_hydra, to_dict
from kraken_train.config import TrainConfig
from kraken_train.generate import GenerateConfig
from kraken_train.model.config import KrakenConfig, padded_vocab_size, parse_model
from kraken_train.model.registry import build_model
from kraken_train.parallel.sharding import ModelRank
from kraken_train.recipe.optimizers import AdamWConfig, MuonConfig
from kraken_train.settings.checkpoint import CheckpointConfig
from kraken_train.settings.engine import EngineConfig
from kraken_train.settings.parallel import ParallelConfig

MODEL_FILES = sorted((REPOSITORY / "conf" / "model").glob("*.yaml"), key=lambda path: path.stem)
EXPERIMENT_FILES = sorted((REPOSITORY / "conf" / "experiment").glob("*.yaml"))
PAPER = {
    "kraken-125m-2way": (2, 12, 6, 678, 124.0),
    "kraken-125m-4way": (4, 12, 3, 504, 124.5),
    "kraken-125m-6way": (6, 12, 2, 418, 123.2),
    "kraken-350m-2way": (2, 24, 8, 888, 350.0),
    "kraken-350m-4way": (4, 24, 4, 644, 353.4),
    "kraken-760m-4way": (4, 24, 4, 960, 760.9),
}


def parameters(name: str, vocab_size: int | None = None) -> int:
    return conf_model(name, vocab_size).num_parameters


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_models(name: str) -> None:
    config = conf_model(name)
    assert isinstance(config, KrakenConfig)
    dimensions = (config.num_sub_layers, config.num_layers, config.heads_per_sub_layer, config.hidden_size)
    assert dimensions == PAPER[name][:4]
    assert (config.vocab_size, config.context_length, config.ffn_multiplier) == (50304, 1024, 2)
    assert f"{config.num_parameters / 1e6:.1f}" == str(PAPER[name][4])


@pytest.mark.parametrize("path", MODEL_FILES, ids=lambda path: path.stem)
def test_parameters_are_counted_as_built(path: Path) -> None:
    settings = compose_choice("model", path.stem)
    config = parse_model(settings, 4000 if settings["vocab_size"] is None else None)
    with torch.device("meta"):
        built = build_model(config)
    assert sum(parameter.numel() for parameter in built.parameters()) == config.num_parameters
    matrices = sum(p.numel() for name, p in built.named_parameters() if "norm" not in name and "position" not in name)
    assert config.matrix_parameters == matrices


def test_matched_models() -> None:
    assert abs(parameters("gpt-10m", 16384) / parameters("kraken-10m-4way", 16384) - 1) < 0.015
    assert conf_model("gpt-10m", 16384).num_layers == conf_model("kraken-10m-4way", 16384).num_layers
    assert 8e6 < parameters("kraken-10m-4way", 16384) < 15e6
    for vocab_size in (2048, 4096):
        for name in ("kraken-tiny-2way", "gpt-tiny", "gpt-tiny-parallel"):
            assert abs(parameters(name, vocab_size) / parameters("kraken-tiny-4way", vocab_size) - 1) < 0.05
    for size in ("124m", "350m", "760m"):
        assert conf_model(f"gpt2-{size}-parallel").architecture == "parallel"
        assert abs(parameters(f"gpt2-{size}") / parameters(f"gpt2-{size}-parallel") - 1) < 0.001


def test_each_model_file_says_what_it_is() -> None:
    assert len(MODEL_FILES) >= 18
    for path in MODEL_FILES:
        assert path.read_text().startswith("# "), path.name


def test_vocabulary_of_the_data() -> None:
    assert [padded_vocab_size(size) for size in (1, 64, 65, 50257)] == [64, 64, 128, 50304]
    assert conf_model("kraken-tiny-4way", 4000).vocab_size == 4032
    assert conf_model("kraken-125m-4way", 50257).vocab_size == 50304
    with pytest.raises(ConfigError, match=r"model.vocab_size=50304 does not fit the data, whose tokenizer has 8000"):
        conf_model("kraken-125m-4way", 8000)
    with pytest.raises(ConfigError, match="vocab_size"):
        conf_model("kraken-tiny-4way")


@pytest.mark.parametrize("name", ["kraken-125m-6way", "gpt2-350m-parallel"])
def test_round_trip(name: str) -> None:
    config = conf_model(name)
    assert parse_model(to_dict(config)) == config
    with pytest.raises(AttributeError):
        config.num_layers = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "krakn"}, r"architecture=krakn is not known.*did you mean kraken"),
        ({"hiden_size": 8}, r"model.hiden_size is not a setting \(did you mean hidden_size\?\)"),
        ({"heads_per_sub_layer": 5}, "heads_per_sub_layer=5 does not divide model.hidden_size=64.*4.*would"),
        ({"num_layers": 0}, "model.num_layers=0 must be greater than 0"),
        ({"num_layers": "many"}, "model.num_layers=many"),
        ({"num_layers": None}, "model.num_layers=null"),
        ({"context_length": 1.5}, "model.context_length=1.5"),
    ],
)
def test_wrong_model_settings(changes: dict[str, object], message: str) -> None:
    settings = compose_choice("model", "kraken-tiny-4way")
    with pytest.raises(ConfigError, match=message):
        parse_model(settings | changes, 1000)


def test_missing_and_unknown_settings() -> None:
    with pytest.raises(ConfigError, match=r"checkpoint.keep is not set"):
        from_dict({"every": 1}, CheckpointConfig, prefix="checkpoint")
    with pytest.raises(ConfigError, match=r"checkpoint.kep is not a setting.*did you mean keep"):
        from_dict({"every": 1, "kep": 2}, CheckpointConfig, prefix="checkpoint")


def test_rules_name_setting_value_and_remedy() -> None:
    with pytest.raises(ConfigError, match=r"engine.zero_stage=3 is not supported.*use 1 or 2"):
        EngineConfig(zero_stage=3, activation_checkpointing=False, compile=False).validate()
    with pytest.raises(ConfigError, match=r"optim.betas=\[0.9, 1.0\]"):
        AdamWConfig(lr=1e-3, betas=(0.9, 1.0), eps=1e-8, weight_decay=0.1, max_grad_norm=1.0).validate()
    with pytest.raises(ConfigError, match=r"optim.lr=0 must be greater than 0"):
        AdamWConfig(lr=0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, max_grad_norm=1.0).validate()


@pytest.mark.parametrize(
    ("setting", "on_cpu", "on_gpu"), [(None, False, True), (True, True, True), (False, False, False)]
)
def test_compilation_is_the_default_on_a_gpu(setting: bool | None, on_cpu: bool, on_gpu: bool) -> None:
    engine = EngineConfig(zero_stage=1, activation_checkpointing=False, compile=setting)
    assert (engine.compiles("cpu"), engine.compiles("cuda")) == (on_cpu, on_gpu)


@pytest.mark.parametrize(
    ("setting", "size", "vocab_size", "shared"),
    [
        (None, 1, 320, False), (None, 2, 320, True), (None, 2, 321, True), (None, 4, 5, False), (False, 4, 320, False),
        (True, 4, 321, True), (True, 4, 5, None),
    ],
)  # fmt: skip
def test_the_vocabulary_is_shared_by_default(
    setting: bool | None, size: int, vocab_size: int, shared: bool | None
) -> None:
    model = KrakenConfig(4, 1, 16, 2, vocab_size=vocab_size, context_length=8)
    parallel = ParallelConfig(size, setting, reduce_dtype=None, verify_every=0)
    if shared is None:
        with pytest.raises(ConfigError, match=r"would leave one of parallel\.sub_layer_parallel_size=4 ranks without"):
            parallel.require_fits(model)
    else:
        parallel.require_fits(model)
        assert parallel.shares_vocabulary(vocab_size) == shared


def test_rows_of_the_vocabulary_are_those_of_dtensor() -> None:
    """`torch.chunk`, which DTensor follows, leaves some ranks without a row where the settings refuse to share."""
    for size, vocab_size in itertools.product(range(1, 9), range(1, 41)):
        chunks = [rows.tolist() for rows in torch.arange(vocab_size).chunk(size)]
        parallel = ParallelConfig(size, None, reduce_dtype=None, verify_every=0)
        assert parallel.can_share_vocabulary(vocab_size) == (len(chunks) == size)
        if len(chunks) < size:
            with pytest.raises(ValueError, match=f"{vocab_size} rows are too few to be shared by {size} ranks"):
                ModelRank(0, size).row_range(vocab_size)
        else:
            ranges = [ModelRank(rank, size).row_range(vocab_size) for rank in range(size)]
            assert [list(range(rows.first, rows.first + rows.count)) for rows in ranges] == chunks


@pytest.mark.parametrize(
    ("command", "schema", "given"),
    [("train", TrainConfig, ["data_dir=d", "run_dir=r"]), ("throughput", ThroughputConfig, [])],
)
def test_commands_leave_compilation_to_the_device(command: str, schema: type, given: list[str]) -> None:
    assert compose_command(given, schema, command).engine.compile is None


def test_settings_of_another_optimizer() -> None:
    given = ["data_dir=d", "run_dir=r"]
    config = compose_command(
        [*given, "optim=muon", "optim.momentum=0.9", "optim.betas=[0.8,0.9]"], TrainConfig, "train"
    )
    assert isinstance(config.optim, MuonConfig)
    assert (config.optim.momentum, config.optim.betas) == (0.9, (0.8, 0.9))
    with pytest.raises(ConfigError) as refused:
        compose_command([*given, "optim.momentum=0.9"], TrainConfig, "train")
    assert str(refused.value) == (
        "optim.momentum is not a setting of the chosen optim; it belongs to optim=muon; optim=adamw has optim.lr, "
        "optim.betas, optim.eps, optim.weight_decay, optim.max_grad_norm, optim.parametrization, "
        "optim.base_hidden_size, optim.base_num_layers, optim.base_num_sub_layers"
    )
    for arguments, message in (
        (["optim.name=muon"], r"optim\.name=muon needs optim\.momentum; choose it with optim=muon"),
        (["optim=muon", "optim.momentum=1"], r"optim\.momentum=1\.0 must be at least 0 and less than 1"),
        (["optim=muon", "optim.ns_steps=0"], r"optim\.ns_steps=0 must be between 1 and 99"),
        (["optim=muon", "+optim.nesterov=false"], r"optim\.nesterov is not a setting; known: optim\.lr"),
        (["optim=moun"], r"optim=moun is not known; use one of adamw, muon"),
        (
            ["run_dir=r", "checkpoint.stage_dir=q/../r/stage"],
            r"stage_dir=q/\.\./r/stage is in run_dir=r, to which",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            compose_command([*given, *arguments], TrainConfig, "train")


def test_free_text_is_not_an_interpolation() -> None:
    settings = yaml.safe_load((REPOSITORY / "conf" / "generate.yaml").read_text())
    settings = {key: value for key, value in settings.items() if key not in ("defaults", "hydra")}
    text = "costs ${HOME} and \\${x}"
    assert from_dict({**settings, "export_dir": "e", "prompt": text}, GenerateConfig).prompt == text


def test_plain_settings_have_no_name_of_a_group() -> None:
    """Hydra takes NAME=VALUE on the command line for the choice of a file where conf/NAME is a folder."""
    groups = {path.name for path in (REPOSITORY / "conf").iterdir() if path.is_dir()}
    for path in (REPOSITORY / "conf").glob("*.yaml"):
        settings = yaml.safe_load(path.read_text())
        assert not groups & set(settings), path


@pytest.mark.parametrize("size", ["125m", "350m"])
def test_models_that_are_compared_have_equal_sizes(size: str) -> None:
    """Each in the experiment of docs/quality.md: the same tokens and schedule, parameters within 1%."""
    sizes = []
    for model in (
        f"kraken-{size}-4way-wide",
        f"kraken-{size}-4way-stream",
        f"kraken-{size}-4way-modern",
        f"gpt-{size}-modern",
    ):
        given = [f"experiment=quality-{size}", f"model={model}", "data_dir=data", "run_dir=run"]
        config = compose_command(given, TrainConfig, "train")
        sizes.append(parse_model(config.model).num_parameters)
        assert config.optim.name == "muon"
        assert config.schedule.warmup_tokens == config.max_tokens * (0.05 if size == "125m" else 0.025)
    assert max(sizes) < 1.01 * min(sizes)


@pytest.mark.parametrize("path", [path for path in EXPERIMENT_FILES if path.stem.startswith("paper")], ids=str)
def test_experiments_are_the_papers(path: Path) -> None:
    """Each experiment composes into a valid run of its model with the paper's batch, schedule and learning rate."""
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        composed = compose("train", [f"experiment={path.stem}", "data_dir=data", "run_dir=run"])
    config = from_hydra(composed, TrainConfig)
    name = path.stem.removeprefix("paper-")
    assert parse_model(config.model) == conf_model(f"kraken-{name}", 50257)
    assert config.optim.lr == (2.5e-4 if name.startswith("125m") else 1.5e-4)
    assert (config.max_steps, config.schedule.name, config.schedule.warmup_steps) == (300_000, "cosine", 2000)
    assert 0.45e6 < config.global_batch_size * config.model["context_length"] < 0.55e6
    assert config.gradient_accumulation_steps(8) == 4


def test_a_schedule_by_its_name_alone() -> None:
    """As command lines had it when every schedule had all settings; a resumed run may still be started so."""
    given = ["data_dir=d", "run_dir=r"]
    config = compose_command([*given, "schedule.name=constant"], TrainConfig, "train")
    assert config.schedule == compose_command([*given, "schedule=constant"], TrainConfig, "train").schedule
    with pytest.raises(
        ConfigError, match=r"schedule\.name=wsd needs schedule\.decay_steps; choose it with schedule=wsd"
    ):
        compose_command([*given, "schedule.name=wsd"], TrainConfig, "train")
    with pytest.raises(ConfigError, match=r"schedule\.decay_steps is not a setting of the chosen schedule"):
        compose_command([*given, "schedule.decay_steps=5"], TrainConfig, "train")
