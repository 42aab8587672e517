"""Training speed: the figures' relations to each other, a model made slow on purpose, both engines, and mistakes."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import throughput_ranks
import torch
from conf_models import conf_model
from helpers import launch_ranks, run_here, run_module, user_error
from throughput_ranks import SLOWED_BY, configure

from kraken_train.bench import throughput_run
from kraken_train.bench.throughput_results import engine_costs, make_results
from kraken_train.bench.throughput_run import Measured, ModelInTraining, Round, fit_together
from kraken_train.derive import derive
from kraken_train.model.config import KrakenConfig
from kraken_train.parallel import step_timer
from kraken_train.parallel.ranks import Runtime
from kraken_train.parallel.step_timer import StepTimer

MODELS = ("kraken-tiny-4way", "gpt-tiny")
ACCUMULATION, TOKENS = 2, 2 * 2 * 32  # of throughput_ranks.TINY, of one copy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Takes about 25 seconds."""
    folder = tmp_path_factory.mktemp("throughput")
    launch_ranks(2, str(throughput_ranks.__file__), str(folder))
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    record = json.loads((folder / "throughput.json").read_text())
    assert record["ranks"] == 2
    assert record["data_parallel_size"] == 1
    assert record["device"].startswith("CPU")
    assert record["settings"]["parallel"]["sub_layer_parallel_size"] == 2
    assert set(record["deepspeed_over_torch"]) == set(MODELS)
    for result in record["results"]:
        result["peak"] = record["peak_tflops"] * 1e12
    return {(result["model"], result["engine"]): result for result in record["results"]}


@pytest.mark.slow
def test_figures_agree(results: dict[tuple[str, str], dict[str, Any]], folder: Path) -> None:
    assert list(results) == [(name, engine) for name in MODELS for engine in ("deepspeed", "torch")]
    for (name, _), result in results.items():
        seconds = result["step_seconds"]["median"]
        assert result["step_seconds"]["low"] <= seconds <= result["step_seconds"]["high"]
        assert sorted(part["seconds"] for part in result["rounds"])[1] == seconds
        assert 0 < sum(result["phase_seconds"].values()) <= seconds * (1 + 1e-9)
        assert all(result["phase_seconds"][phase] > 0 for phase in ("data", "forward", "backward", "optimizer"))
        assert result["phase_seconds"]["exchange"] > 0, "two ranks share the model"
        assert result["tokens_per_step"] == TOKENS
        assert result["tokens_per_second"] * seconds == pytest.approx(TOKENS)
        assert result["tokens_per_second_per_device"] == result["tokens_per_second"] / 2
        for part in ("matrix", "attention"):
            flops = result["flops_per_token"][part] * result["tokens_per_second"]
            assert result["mfu"][part] * result["peak"] == pytest.approx(flops)
        assert result["mfu"]["total"] == pytest.approx(result["mfu"]["matrix"] + result["mfu"]["attention"])
        # bf16 weights, fp32 masters, sums and moments; half of a baseline is less than half of its parameters.
        assert result["peak_memory"]["bytes"] > 18 * conf_model(name, 512).num_parameters / 2
    assert (folder / "throughput.png").stat().st_size > 10_000


def test_command(tmp_path: Path) -> None:
    """One process, one round."""
    settings = ["models=[gpt-tiny,kraken-tiny-4way]", "vocab_size=512", "context_length=32", "micro_batch_size=2"]
    settings += ["steps=1", "rounds=1", "engine.compile=false", "device=cpu", f"output_dir={tmp_path}"]
    ran = run_module("kraken_train.bench.throughput", *settings)
    assert ran.returncode == 0, ran.stderr
    for result in json.loads((tmp_path / "throughput.json").read_text())["results"]:
        assert result["tokens_per_step"] == 2 * 32
        assert result["mfu"]["total"] > 0
        assert 0 < sum(result["phase_seconds"].values()) <= result["step_seconds"]["median"] * (1 + 1e-9)
        assert result["model"] in ran.stdout


def test_phases_add_up_to_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that goes on by 1 whenever it is read: no reading is lost between the step_timer."""
    ticks = itertools.count()
    for module in (step_timer, throughput_run):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    model = ModelInTraining.__new__(ModelInTraining)
    model.runtime, model.timer = Runtime(0, 0, 1, 1), StepTimer(torch.device("cpu"))
    model.batches, model.lr, model.tracker = itertools.repeat((1, 2)), 1e-3, None
    model.engine = SimpleNamespace(
        accumulation_steps=2, accumulate=lambda *batch: None, step=lambda lr: None, results=lambda: []
    )
    measured = model.measure(steps=3)
    # One reading before the outermost phase begins, and one after it has ended.
    assert sum(measured.phases.values()) == pytest.approx(measured.seconds - 2 / 3)
    assert measured.phases == {"data": 2.0, "other": pytest.approx(7 / 3)}


@pytest.mark.slow
def test_a_slowed_model_shows(results: dict[tuple[str, str], dict[str, Any]]) -> None:
    for engine in ("deepspeed", "torch"):
        slow, other = results["gpt-tiny", engine], results["kraken-tiny-4way", engine]
        assert slow["phase_seconds"]["forward"] >= ACCUMULATION * SLOWED_BY
        assert slow["to_reference"]["median"] < 1 < 1.01 + slow["to_reference"]["low"]
        assert slow["tokens_per_second"] < other["tokens_per_second"]
    assert results["kraken-tiny-4way", "deepspeed"]["to_reference"]["median"] == 1.0


@pytest.mark.slow
def test_models_that_do_not_fit_together(folder: Path) -> None:
    (apart,) = json.loads((folder / "checks.json").read_text())["apart"]
    assert len(apart["rounds"]) == 2
    assert apart["tokens_per_step"] == 2 * TOKENS, "two copies"


@pytest.mark.slow
def test_both_engines_train_alike(folder: Path) -> None:
    for case, losses in json.loads((folder / "checks.json").read_text())["losses"].items():
        tolerance = 1e-5 if "fp32" in case else 5e-3
        assert losses["deepspeed"] == pytest.approx(losses["torch"], rel=tolerance), case
        assert losses["torch"][-1] < losses["torch"][0]


def test_ratios_are_those_of_rounds(tmp_path: Path) -> None:
    """A machine that is slow in one round is so for all: the ratio does not change."""
    config = configure(tmp_path, f"models=[{','.join(MODELS)}]", "engines=[deepspeed,torch]", "reference=gpt-tiny")
    entries = config.entries()
    assert [entry.name for entry in entries] == ["gpt-tiny", "gpt-tiny", "kraken-tiny-4way", "kraken-tiny-4way"]
    pace = [1.0, 7.0, 2.0, 1.0]
    own = dict(zip(entries, (1.0, 0.8, 2.0, 1.0), strict=True))
    measured = {entry: Measured([Round(of * slow, {}) for slow in pace], None, "none") for entry, of in own.items()}
    results = make_results(measured, dict.fromkeys(entries, 100), ranks=1, peak_flops=None)
    assert [result.to_reference.median for result in results] == pytest.approx([1.0, 1.25, 0.5, 1.0])
    assert results[2].to_reference.low == results[2].to_reference.high == pytest.approx(0.5)
    assert [result.seconds for result in results] == [1.0, 0.8, 2.0, 1.0]
    assert {name: cost.median for name, cost in engine_costs(results).items()} == pytest.approx(
        {"gpt-tiny": 1.25, "kraken-tiny-4way": 2.0}
    )
    assert results[0].mfu is None


def test_what_fits_together(tmp_path: Path) -> None:
    config = configure(
        tmp_path, "models=[kraken-125m-4way,gpt2-124m]", "context_length=null", "micro_batch_size=20", "precision=bf16"
    )
    assert fit_together(config.entries(), config, 80 * 10**9)
    assert not fit_together(config.entries(), config, 8 * 10**9)


@pytest.mark.parametrize("num_sub_layers", [2, 4, 6])
def test_derived_models(num_sub_layers: int) -> None:
    """The width is one that `derive` finds, and attention kernels take the heads as they are."""
    base, derived = conf_model("gpt2-124m"), conf_model(f"kraken-125m-{num_sub_layers}way-hw")
    assert isinstance(derived, KrakenConfig)
    assert derived.num_sub_layers == num_sub_layers
    assert abs(derived.num_parameters / base.num_parameters - 1) <= 0.03
    assert derived.hidden_size in {found.config.hidden_size for found in derive(base, num_sub_layers, 0.03)}
    assert derived.head_size % 8 == 0
    assert derived.head_size <= 128


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("models=[gpt-tny]", "models=gpt-tny is not known; use .*did you mean gpt-tiny"),
        ("models=[gpt-tiny,gpt-tiny]", "must name at least one, and none twice"),
        ("models=[gpt-tiny] rounds=0", "rounds=0 must be greater than 0"),
        ("models=[gpt-tiny] steps=-1", "steps=-1 must be greater than 0"),
        ("models=[gpt-tiny] engines=[megatron]", "engines=megatron is not known; use deepspeed or torch"),
        ("models=[gpt-tiny] engines=[torch] optim=muon", "torch trains with optim=adamw only, not optim=muon"),
        ("models=[gpt-tiny] authors=[gpt-tiny]", "authors: gpt-tiny: their code trains Krakens only"),
        (
            "models=[gpt-tiny] authors=[kraken-tiny-4way]",
            r"authors=kraken-tiny-4way is not among the models .* give models=\[kraken-tiny-4way\] too",
        ),
        ("models=[gpt-tiny] authors=[kraken-tiny]", "authors=kraken-tiny is not known; use .*kraken-tiny-4way"),
        ("models=[kraken-tiny-4way] authors=[kraken-tiny-4way] optim=muon", "authors: .* with optim=adamw only"),
        ("models=[gpt-tiny] reference=gpt-10m", "reference=gpt-10m is not known; use gpt-tiny"),
        ("models=[gpt-tiny] parallel.sub_layer_parallel_size=3", "gpt-tiny: .*does not divide model.num_heads=4"),
        ("models=[gpt-tiny] parallel.sub_layer_parallel_size=2", "does not divide the 1 rank of this run"),
        ("models=[gpt-tiny] engine.zero_stage=0", "engine.zero_stage=0 is not supported"),
        ("models=[gpt-tiny] data_dir=/nowhere", "/nowhere"),
    ],
)
def test_mistakes(settings: str, message: str, tmp_path: Path) -> None:
    ran = run_here("kraken_train.bench.throughput", *settings.split(), "device=cpu", f"output_dir={tmp_path}/new")
    error = user_error(ran)
    assert re.search(message, error), error
    assert not (tmp_path / "new").exists()
