"""The quality study: what its variants compute and communicate, and whether its comparisons are fair."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from finished_runs import write_finished
from helpers import MODERN, random_ids
from thread_ranks import compare_two_ranks

from kraken_train.common.cli import compose_command
from kraken_train.common.errors import ConfigError
from kraken_train.config import TrainConfig
from kraken_train.model.config import parse_model
from kraken_train.model.kraken_config import KrakenConfig
from kraken_train.model.registry import ARCHITECTURES, build_model
from studies.quality import ledger
from studies.quality.arms import STUDY, overrides, read_questions
from studies.quality.figure import draw
from studies.quality.run import main as run_main
from studies.quality.run import missing, stages
from studies.quality.variant_config import VariantConfig
from studies.results import Result, Results, differences
from studies.study import Run
from studies.training import job_of

SIZES = {"num_sub_layers": 4, "num_layers": 3, "hidden_size": 16, "heads_per_sub_layer": 2, "vocab_size": 48,
         "context_length": 20}  # fmt: skip
CHANGES = [
    {"sum_start": 0.5, "own_start": 1.0, "late_start": 0.3, "residual_start": 0.1},
    {"sum_start": 0.25, "learned_gains": False},
    {"separate_norms": True, "own_start": 1.0},
    {"concatenated": True, "late_start": 0.0},
    {"outer_size": 24, "own_start": 1.0},
    {"stream_maps": True, "tie_embeddings": False},
    {"shared_attention_layers": 1},
]


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by `register`, since other tests go through all architectures."""
    monkeypatch.setitem(ARCHITECTURES, "kraken-variant", VariantConfig)


def test_without_changes_it_is_a_kraken() -> None:
    config = VariantConfig(**SIZES, **MODERN)
    plain = build_model(KrakenConfig(**SIZES, **MODERN), seed=2).double()
    variant = build_model(config, seed=2).double()
    ids = random_ids(config, 2, 20)
    assert torch.equal(plain(ids), variant(ids))


def test_a_fixed_gain_of_one_is_the_setting_of_the_library() -> None:
    """`ffn_reads_stream` came from question 20; the variant computes it too, for arms that change more."""
    settings = {**SIZES, **MODERN}
    library = build_model(KrakenConfig(**settings, ffn_reads_stream=True), seed=2).double()
    ids = random_ids(library.config, 2, 20)
    for changes in ({"own_start": 1.0, "learned_gains": False}, {"ffn_reads_stream": True}):
        variant = build_model(VariantConfig(**settings, **changes), seed=2).double()  # type: ignore[arg-type]
        torch.testing.assert_close(variant(ids), library(ids), rtol=0, atol=1e-12)


def test_a_wider_embedding_is_a_setting_of_the_library() -> None:
    """`embedding_size` came from question 12, where it is called `outer_size`."""
    settings = {**SIZES, **MODERN}
    library = build_model(KrakenConfig(**settings, embedding_size=24), seed=2).double()
    variant = build_model(VariantConfig(**settings, outer_size=24), seed=2).double()
    maps = library.embedding_maps.weight.std().item()
    assert maps == pytest.approx(24**-0.5, rel=0.05)
    assert variant.stream_maps.weight.std().item() == pytest.approx(maps, rel=0.05)
    weights = {name.replace("stream_maps", "embedding_maps"): weight for name, weight in variant.state_dict().items()}
    library.load_state_dict(weights)
    ids = random_ids(library.config, 2, 20)
    assert torch.equal(variant(ids), library(ids))
    with pytest.raises(ConfigError, match=r"is called model.outer_size"):
        VariantConfig(**settings, embedding_size=24)


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_ranks_and_parameters(changes: dict[str, object]) -> None:
    """Two ranks compute what one does, with a Kraken's collectives: no change but two adds one."""
    config = VariantConfig(**SIZES, **MODERN, **changes)  # type: ignore[arg-type]
    assert config.num_parameters == sum(weight.numel() for weight in build_model(config).parameters())
    error, calls = compare_two_ranks(config)
    assert error < 1e-12
    expected = sum(reduces.count for reduces in config.all_reduces)
    # Streams that differ from the start are summed in the first layer, too, behind its attention.
    assert calls == expected + 2 * ("shared_attention_layers" in changes) + 2 * config.has_maps


def test_formula() -> None:
    """The gains, by hand: LN1_i(x_i + g s') and x_i + a_i + FFN_i(LN2_i(a_i + g s + g x_i)) + g s."""
    starts = {"sum_start": 0.5, "own_start": 2.0, "late_start": 0.3, "residual_start": 0.1}
    model = build_model(VariantConfig(**SIZES, **MODERN, **starts)).double()  # type: ignore[arg-type]
    layer = model.layers[1]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 2, 5, 16, generator=generator, dtype=torch.float64)
    late = torch.randn(2, 5, 16, generator=generator, dtype=torch.float64)
    plain = KrakenConfig(**SIZES, **MODERN)
    kraken = build_model(plain).double().layers[1]
    kraken.load_state_dict({k: v for k, v in layer.state_dict().items() if "gain" not in k})
    s = x.sum(dim=0)
    a = kraken.attention(x + 0.3 * late)
    expected = kraken.ffn(torch.zeros_like(x), a + 2.0 * x, 0.5 * s) - 2.0 * x + x + 0.1 * s
    found, used = layer(x, None, late, None, None)
    assert torch.allclose(found, expected, atol=1e-12, rtol=0)
    assert torch.equal(used, s)


def test_comparisons_are_fair() -> None:
    """All arms can be trained, and those of one question have the same parameters and tokens within 1%."""
    sizes: dict[str, tuple[int, object]] = {}
    for question in read_questions():
        for arm in question.arms:
            if arm not in sizes:
                settings = [*overrides(Run(arm, 0)), "data_dir=data", "run_dir=run"]
                config = compose_command(settings, TrainConfig, "train")
                tokens = (config.max_steps, config.max_tokens, config.global_batch_size)
                sizes[arm] = parse_model(config.model, 4096).num_parameters, tokens
        base, tokens = sizes[question.arms[0]]
        assert {arm: sizes[arm] for arm in question.arms if abs(sizes[arm][0] / base - 1) > 0.01} == {}
        assert {sizes[arm][1] for arm in question.arms} == {tokens}


def test_unknown_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="there is no model gpt-4m; use one of gpt-3m"):
        overrides(Run("gpt-4m", 0))
    with pytest.raises(ConfigError, match="there is no question 99-none"):
        missing(["99-none"], Results(STUDY, tmp_path))
    with pytest.raises(SystemExit):  # an option stands before the names of questions
        run_main([str(tmp_path / "data"), str(tmp_path / "runs"), "--workers", "1", "99-none"])
    assert f"{tmp_path / 'data'}" in capsys.readouterr().err.splitlines()[-1]


def results_in(folder: Path) -> Results:
    """As those of the study, with runs and record in this folder."""
    return Results(dataclasses.replace(STUDY, record=folder / "results.jsonl"), folder / "runs")


def test_results_outlive_their_runs(tmp_path: Path) -> None:
    """A recorded run is not asked for again, unless the settings of the study have changed."""
    results = results_in(tmp_path)
    runs = missing(["01-noise"], results)
    assert len(runs) == 3 * 3
    write_finished(results, runs[0], 5.25, KrakenConfig(**SIZES, **MODERN))
    job_of(runs[0], tmp_path, results)
    assert missing(["01-noise"], results) == runs[1:]
    assert results.add(runs)[runs[0]].validation_loss == 5.25
    shutil.rmtree(tmp_path / "runs")
    results = results_in(tmp_path)
    assert missing(["01-noise"], results) == runs[1:]
    assert results.recorded[runs[0]].parameters == KrakenConfig(**SIZES, **MODERN).num_parameters
    table = ledger.section(read_questions()[0], results.recorded)
    assert "5.2500" in table
    assert "not run" in table
    write_finished(results, runs[1], 5.5, KrakenConfig(**SIZES, **MODERN), data="other")
    with pytest.raises(ConfigError, match="were trained on other data than those in"):
        results.add(runs)
    results.record.write_text(results.record.read_text().replace("optim.lr=0.004", "optim.lr=0.001"))
    with pytest.raises(ConfigError, match=r"has optim.lr=0.001, but the study now asks for optim.lr=0.004"):
        missing(["01-noise"], results_in(tmp_path))
    results.record.write_text("<<<<<<< HEAD\n")
    with pytest.raises(ConfigError, match=r"results.jsonl:1 is no result of a run; restore the file"):
        missing(["01-noise"], results_in(tmp_path))


def test_a_started_run_keeps_its_settings(tmp_path: Path) -> None:
    results = results_in(tmp_path)
    run = missing(["01-noise"], results)[0]
    job_of(run, tmp_path, results)
    results.settings_file(run).write_text("seed=0\n")
    assert not results.is_known(run)  # it has not started
    (results.runs_dir / run.name).mkdir()
    with pytest.raises(ConfigError, match=r"no further settings, but the study now asks for .*max_steps=400"):
        results.is_known(run)


def test_a_teacher_is_trained_and_exported_before(tmp_path: Path) -> None:
    """Once for all that learn from it, and of their seed; and not again where its export is here."""
    results = results_in(tmp_path)
    student, other, teacher = Run("kraken-3m distill.teacher=gpt-3m", 1), Run("kraken-3m", 1), Run("gpt-3m", 1)
    whole = Run("kraken-3m distill.teacher=gpt-3m distill.weight=1", 1)
    plain, exports, taught = stages([student, other, whole], tmp_path, results)
    assert [job.name for job in plain] == [other.name, teacher.name]
    export = results.export_of(teacher)
    assert [job.commands[0][-2:] for job in exports] == [
        (f"run_dir={results.runs_dir / teacher.name}", f"output_dir={export}")
    ]
    assert [job.name for job in taught] == [student.name, whole.name]
    config = compose_command(list(taught[0].commands[0][3:]), TrainConfig, "train")
    assert config.distill.teacher == str(export)
    assert "distill.teacher=gpt-3m" in results.settings_file(student).read_text().splitlines()  # wherever RUNS is

    write_finished(results, teacher, 5.0, KrakenConfig(**SIZES, **MODERN))
    plain, exports, _ = stages([student], tmp_path, results)
    assert (plain, len(exports)) == ([], 1)
    export.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (export / name).touch()
    plain, exports, taught = stages([student], tmp_path, results)
    assert (plain, exports, len(taught)) == ([], [], 1)


def test_differences_are_taken_seed_by_seed(tmp_path: Path) -> None:
    losses = {("a", 0): 4.0, ("a", 1): 5.0, ("a", 2): 6.0, ("b", 1): 5.5, ("b", 0): 4.25, ("b", 3): 9.0}
    results = {Run(arm, seed): Result(arm, seed, loss, 10, 10, "data", ()) for (arm, seed), loss in losses.items()}
    assert differences(results, "b", "a") == [0.25, 0.5]
    assert differences(results, "c", "a") == []
    draw(["gpt-3m", "kraken-3m", "kraken-3m own_start=1", "kraken-6m", "kraken-3m optim.lr=1"], {
        Run(arm, 0): Result(arm, 0, 4.0, 10, 10, "data", ()) for arm in ("gpt-3m", "kraken-3m", "kraken-6m")
    }, tmp_path / "figure.png")  # fmt: skip
    assert (tmp_path / "figure.png").stat().st_size > 5000
    assert ledger.as_percent([0.01, 0.01]) == "+1.0% ± 0.0%"
    assert ledger.error([1.0, 1.0, 2.0, 4.0]) == " ± 0.7071"
    assert ledger.error([1.0]) == ""
