"""A further architecture, which only this test registers, through all that asks a model about itself."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ffn_first import NAME, FFNFirstConfig, transformers_layer
from forked import REPOSITORY
from helpers import MODERN, random_ids, rough_model, write_small_export
from thread_ranks import compare_two_ranks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from checkpoints.exports.folder import read_export
from kraken_train.bench import kv_memory
from kraken_train.bench.grid import SIZES, architectures, model_config
from kraken_train.bench.timing import variants_of
from kraken_train.bench.variants import OVERLAPPED, SILENT
from kraken_train.common.cli import compose_command
from kraken_train.common.errors import ConfigError
from kraken_train.common.settings import to_dict
from kraken_train.derive import derive
from kraken_train.inference.engine import InferenceEngine
from kraken_train.inference.loading import load_part, share_model
from kraken_train.model.config import parse_model
from kraken_train.model.flops import attention_flops_per_token, matrix_flops_per_token
from kraken_train.model.head_dims import head_size_note
from kraken_train.model.registry import ARCHITECTURES, build_model
from kraken_train.parallel.communicator import LocalCommunicator
from kraken_train.parallel.sharding import sharded_dims
from kraken_train.plan import PlanConfig
from kraken_train.planning.layout import TrainingLayout
from kraken_train.planning.prediction import predict
from kraken_train.planning.search import search
from kraken_train.planning.traffic import predict_traffic
from kraken_train.reporting.comparison import describe_model
from kraken_train.reporting.model_card import CARD_FILE, write_card
from kraken_train.run.recorded_settings import recorded_model
from kraken_train.training.optim import parameter_groups

CONFIG = FFNFirstConfig(num_layers=3, hidden_size=32, query_heads=4, vocab_size=96, context_length=24)
GROUPED = dataclasses.replace(CONFIG, shared_heads=2)
MODERN_CONFIG = dataclasses.replace(GROUPED, head_dim=6, **MODERN)
REDUCED = "FFN and attention, and their gradients"


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, NAME, FFNFirstConfig)


def test_settings() -> None:
    assert parse_model(to_dict(CONFIG)) == CONFIG
    with pytest.raises(ConfigError, match=r"model.num_heads is not a setting .did you mean query_heads"):
        parse_model({**to_dict(CONFIG), "num_heads": 2})
    with pytest.raises(ConfigError, match=r"model.color is not a setting"):
        parse_model({**to_dict(CONFIG), "color": "red"})
    with pytest.raises(ConfigError, match=r"model.query_heads=5 does not divide model.hidden_size=32"):
        dataclasses.replace(CONFIG, query_heads=5)
    with pytest.raises(ConfigError, match=r"model.shared_heads=3 does not divide model.query_heads=4"):
        dataclasses.replace(CONFIG, shared_heads=3)
    assert recorded_model({"architecture": NAME, "num_layers": 2})["ffn_multiplier"] == 3
    assert "model.hidden_size=32 with model.query_heads=8" in str(
        head_size_note(dataclasses.replace(CONFIG, query_heads=8))
    )


@pytest.mark.parametrize("config", [CONFIG, GROUPED, MODERN_CONFIG])
def test_sizes(config: FFNFirstConfig) -> None:
    model = build_model(config)
    assert config.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert sum(len(group["params"]) for group in parameter_groups(model, 0.1)) == len(list(model.parameters()))
    ids = random_ids(config, 2, config.context_length)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.loss(ids, ids).backward()
    per_token = matrix_flops_per_token(config) + 2 * attention_flops_per_token(config)
    assert counter.get_total_flops() == per_token * ids.numel()


@pytest.mark.parametrize("config", [CONFIG, GROUPED, MODERN_CONFIG])
@pytest.mark.parametrize("recompute", [False, True])
def test_two_ranks_are_the_whole_model(config: FFNFirstConfig, recompute: bool) -> None:
    error, calls = compare_two_ranks(config, recompute)
    assert error < 1e-12
    declared = sum(all_reduces.count for all_reduces in config.all_reduces)
    # As the model has two parts a layer, forward and backward; recomputation adds none.
    assert declared == 4 * config.num_layers
    assert calls == declared + (1 if config.qk_norm else 0)


def test_plan() -> None:
    cluster = compose_cluster()
    two = TrainingLayout(2, 1, 4, 2)
    assert {one.purpose: one.count for one in predict_traffic(CONFIG, two)}[REDUCED] == 2 * 4 * CONFIG.num_layers
    alone, shared = predict(CONFIG, TrainingLayout(1, 1, 4, 2), cluster), predict(CONFIG, two, cluster)
    assert alone.time.exchange == alone.time.hidden == shared.time.hidden == 0 < shared.time.exchange
    assert shared.memory.weights < alone.memory.weights
    assert shared.memory.activations < alone.memory.activations
    again = predict(CONFIG, dataclasses.replace(two, activation_checkpointing=True), cluster)
    assert again.memory.activations < shared.memory.activations
    assert again.time.recomputation > 0
    # The standard form with as wide an FFN computes and moves as much, in another order.
    standard = ARCHITECTURES["standard"](
        num_layers=3, hidden_size=32, num_heads=4, vocab_size=96, context_length=24, ffn_multiplier=3
    )  # type: ignore[call-arg]
    twin = predict(standard, two, cluster)
    assert shared.time.total == pytest.approx(twin.time.total, rel=1e-9)
    assert shared.memory.weights == twin.memory.weights
    best = search(CONFIG, cluster, 1, 16).best
    assert best.layout.devices == cluster.devices_per_node


def compose_cluster() -> Any:
    overrides = ["model=gpt-tiny", "cluster=dgx_h100", "vocab_size=96", "global_batch_size=16"]
    return compose_command(overrides, PlanConfig, "plan").cluster


def test_benchmarks(tmp_path: Path) -> None:
    assert architectures() == ("kraken", "standard", "parallel", "ladder", "fal", "track", NAME)
    model = model_config(NAME, SIZES["tiny"], 2, 96, 64)
    assert isinstance(model, FFNFirstConfig)
    assert (model.hidden_size, model.heads) == (448, 8)
    assert variants_of(model) == (OVERLAPPED, SILENT)
    with pytest.raises(ConfigError, match=r"degrees=3 does not divide the 8 heads of sizes=tiny"):
        model_config(NAME, SIZES["tiny"], 3, 96, 64)
    settings = kv_memory.KVMemoryConfig(
        architectures=(NAME,), sizes=("tiny",), attention=("mha", "gqa"), degrees=(2,), contexts=(64,),
        batch_sizes=(1,), heads_per_kv_head=4, vocab_size=96, dtype="float32", device="cpu",
        output_dir=str(tmp_path / "kv"),
    )  # fmt: skip
    settings.validate()
    rows = kv_memory.compute(settings)
    # Keys and values of 2 layers and 64 tokens, in fp32: half of 8 heads of 56, and of 2.
    assert [row.cache for row in rows] == [2 * 2 * 64 * 4 * 56 * heads for heads in (4, 1)]
    with pytest.raises(ConfigError, match=r"model.query_heads=1 cannot be shared by 2 devices"):  # it makes no copies
        kv_memory.compute(dataclasses.replace(settings, attention=("mqa",)))


def test_derive() -> None:
    candidate = derive(dataclasses.replace(CONFIG, hidden_size=256), 2, 0.2)[0]
    assert candidate.config.num_sub_layers == 2
    assert abs(candidate.difference) <= 0.2


@pytest.mark.parametrize("config", [CONFIG, GROUPED])
def test_inference(config: FFNFirstConfig, tmp_path: Path) -> None:
    whole, ids = write_small_export(tmp_path / "e", config, None), random_ids(config, 2, 20)
    engine = InferenceEngine(whole, 2, 24)
    with torch.no_grad():
        expected = whole(ids)
    found = [engine.prefill(ids[:, :6], torch.tensor([6, 6]))]
    found += [engine.decode(ids[:, token]) for token in range(6, 20)]
    for token, logits in enumerate(found, start=5):
        assert torch.allclose(logits, expected[:, token], atol=1e-4, rtol=1e-4)
    export = read_export(tmp_path / "e")
    assert export.config == config
    shares = share_model(config, [1.0, 1.0])
    parts = [load_part(export, units, LocalCommunicator(), torch.float32, torch.device("cpu")) for units in shares]
    assert [part.cache_shape[1] for part in parts] == [config.kv_heads // 2] * 2
    for name, dim in sharded_dims(parts[0]).items():
        if dim is not None:
            weights = [part.get_parameter(name) for part in parts]
            assert torch.equal(torch.cat(weights, dim=dim.axis), whole.get_parameter(name))
    with pytest.raises(ConfigError, match=rf"model.query_heads={config.kv_heads} cannot be shared by 5 devices"):
        share_model(config, [1.0] * 5)


def test_reports(tmp_path: Path) -> None:
    write_small_export(tmp_path / "e", CONFIG, None)
    write_card(tmp_path / "e")
    card = (tmp_path / "e" / CARD_FILE).read_text(encoding="utf-8")
    assert "A language model whose FFN comes first. Trained with kraken-train." in card
    assert f"- {NAME}\n" in card
    assert describe_model(CONFIG) == "FFN-first GPT, 3 layers of 32"


def test_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    from checkpoints.exports import modeling_kraken as modeling  # noqa: PLC0415 (transformers takes seconds)

    monkeypatch.setitem(modeling.LAYERS, NAME, transformers_layer(modeling))
    ours = rough_model(GROUPED, torch.float32).double()
    theirs = modeling.KrakenForCausalLM(modeling.KrakenConfig(**to_dict(GROUPED))).double().eval()
    theirs.load_state_dict({**ours.state_dict(), "lm_head.weight": ours.token_embedding.weight})
    ids = random_ids(GROUPED, 2, 20)
    with torch.no_grad():
        assert (theirs(ids).logits - ours(ids)).abs().max() < 1e-11
    with pytest.raises(ValueError, match=r"architecture=other is not known; this file has kraken, standard, parallel"):
        modeling.KrakenConfig(architecture="other")


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.architecture=other is not known; use kraken or standard"):
        parse_model({"architecture": "other"})
    with pytest.raises(ConfigError, match=r"model.architecture=other is not known; use standard or parallel"):
        ARCHITECTURES["standard"](architecture="other", num_layers=1, hidden_size=8, num_heads=1, vocab_size=8,
                                  context_length=8)  # type: ignore[call-arg]  # fmt: skip
    with pytest.raises(ValueError, match=r"architecture=other is not known; use one of kraken, standard"):
        model_config("other", SIZES["tiny"], 2, 64, 64)


# ---------------------------------------------------------------------------------------------------------------
# Nobody else asks which architecture a model has
# ---------------------------------------------------------------------------------------------------------------

CLASSES = {"KrakenConfig", "GPTConfig", "KrakenModel", "GPTModel"}
# Files of the library that name architectures, beside model/ and the file for transformers, and why.
ALLOWED = {
    "checkpoints/export.py": ({"kraken"}, "a format of exports"),
    "checkpoints/exports/folder.py": ({"kraken"}, "the model_type of all exports"),
    "checkpoints/exports/native.py": ({"GPTConfig", "standard"}, "Llama and Qwen3 are standard Transformers"),
    "checkpoints/import_reference.py": ({"KrakenConfig"}, "the authors' weights are a Kraken's"),
    "kraken_train/bench/authors_step.py": ({"KrakenConfig"}, "the authors trained a Kraken"),
    "kraken_train/bench/grid.py": ({"standard"}, "what the benchmarks compare with"),
    "kraken_train/bench/stages/parity.py": ({"GPTConfig", "KrakenConfig", "standard"}, "a model of each kind of layer"),
    "kraken_train/bench/stages/ttft_figures.py": ({"kraken"}, "the architecture that is compared with all others"),
    "kraken_train/bench/stages/vllm_tokens.py": ({"KrakenConfig"}, "what vLLM is checked with: sums beside attention"),
    "kraken_train/bench/transfer_figure.py": ({"standard"}, "the standard parametrization"),
    "kraken_train/parallel/mesh.py": ({"kraken"}, "the name of a dimension of the mesh"),
    "kraken_train/recipe/optimizers.py": ({"standard"}, "the name of a parametrization"),
    "kraken_train/reporting/model_card.py": ({"kraken"}, "the tag of this program's models on the Hub"),
    "kraken_train/training/recorded_choices.py": ({"parallel"}, "the name of a group of settings"),
}


def named(path: Path) -> set[str]:
    """The architectures' names and classes that a file has in its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and node.value in {"kraken", "standard", "parallel"}:
            found.add(node.value)
        elif isinstance(node, ast.Name | ast.alias):
            found |= {node.id if isinstance(node, ast.Name) else node.name} & CLASSES
        elif isinstance(node, ast.Attribute) and node.attr in CLASSES:
            found.add(node.attr)
    return found


def library_files() -> Iterator[Path]:
    for folder in ("kraken_train", "data_prep", "checkpoints", "launch"):
        yield from sorted((REPOSITORY / folder).rglob("*.py"))


def test_only_declarations_name_architectures() -> None:
    own = (REPOSITORY / "kraken_train" / "model", REPOSITORY / "checkpoints" / "exports" / "modeling_kraken.py")
    found = {
        str(path.relative_to(REPOSITORY)): names
        for path in library_files()
        if not any(path.is_relative_to(place) for place in own)
        for names in [named(path)]
        if names
    }
    assert found == {path: names for path, (names, _) in ALLOWED.items()}
