"""The study of architectures: whether its comparisons are fair, and its curves, times and verdicts right."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from data.prepared_set import write_set
from finished_runs import write_finished
from helpers import run_process

from kraken_train.common.cli import compose_command
from kraken_train.common.errors import ConfigError
from kraken_train.config import TrainConfig
from kraken_train.model.config import parse_model
from studies.architectures import verdict as verdict_command
from studies.architectures.comparison import Comparison, Trained, at_equal_time, rounded, trained, verdict
from studies.architectures.equal_time import loss_after, step_seconds
from studies.architectures.loss_curves import Curve, Point, fit
from studies.architectures.plan import Plan, read_plan
from studies.architectures.run import chosen_sizes, train_all
from studies.results import Results
from studies.study import Run

FOLDER = Path(read_plan.__code__.co_filename).parent
SMALL: dict[str, Any] = {
    "architectures": ["kraken", "standard"],
    "forms": {},
    "with_embedding_of_base": [],
    "sizes": {
        "s": {"num_layers": 2, "hidden_size": 64, "num_heads": 2, "head_dim": 32},
        "m": {"num_layers": 3, "hidden_size": 64, "num_heads": 2, "head_dim": 32},
        "l": {"num_layers": 4, "hidden_size": 96, "num_heads": 2, "head_dim": 32},
    },
    "tokens": ["256", "512", "1024"],
    "learning_rates": [1e-3, 2e-3, 4e-3],
    "seeds": [0, 1],
    "layers": {"vocab_size": 320, "context_length": 32},
    "changes": {},
    "warmup": 0.25,
    "training": {"optim": "adamw", "precision": "fp32", "global_batch_size": 4, "micro_batch_size": 4,
                 "validation.every": 1000000, "validation.samples": 8},
    "devices": 2,
    "tolerance": 0.1,
    "max_attention_cost": 1.0,
    "time": {
        "cluster": "dgx_h100", "interconnect": "h100_nvswitch", "own": {"micro_batch_size": 4, "accumulation_steps": 1},
        "large_name": "large", "large_model": {"num_layers": 8, "hidden_size": 1024, "num_heads": 16, "head_dim": 64},
        "large": {"micro_batch_size": 4, "accumulation_steps": 2},
    },
}  # fmt: skip


def small_plan(folder: Path, **changes: Any) -> Plan:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}, sort_keys=False))
    return read_plan(path)


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_comparisons_are_fair(name: str) -> None:
    """Models of a size have the same parameters within 1%, and are trained with settings that differ in the model."""
    plan = read_plan(FOLDER / f"{name}.yaml")
    assert len(plan.sizes) >= 3
    for models in plan.models.values():
        for model in models.values():
            assert abs(model.num_parameters / models["standard"].num_parameters - 1) <= 0.01
        assert models["kraken"].embedding_width == models["kraken"].hidden_size
        assert models["kraken-wide"].embedding_width == models["standard"].hidden_size > models["kraken"].hidden_size
    size, models = next(iter(plan.models.items()))
    others = set()
    for architecture, model in models.items():
        run = plan.screening(size, architecture)[plan.learning_rates[0]]
        config = compose_command([*plan.overrides(run), "data_dir=data", "run_dir=run"], TrainConfig, "train")
        assert parse_model(config.model) == model
        others.add(repr(dataclasses.replace(config, model={})))
    assert len(others) == 1
    most = plan.tokens[-1] / plan.tokens[-2]
    for seconds in (
        step_seconds(plan, models, plan.time.own),
        step_seconds(plan, plan.alike(plan.time.large_model), plan.time.large),
    ):  # the tokens in equal time have been trained
        assert seconds["kraken"] < seconds["standard"] < most * min(seconds.values())


def test_the_fit_recovers_its_curves() -> None:
    """From losses with noise of 0.1%, at sizes and tokens that are far apart."""
    noise = random.Random(0)
    true = {"kraken": Curve(1.7, 400.0, 0.34, 410.0, 0.28, 0.0), "standard": Curve(1.7, 300.0, 0.32, 600.0, 0.30, 0.0)}
    points = {
        name: [
            Point(n, d, curve.loss(n, d) * (1 + noise.gauss(0, 1e-3)))
            for n in (1e7, 4e7, 16e7, 64e7) for d in (1e8, 5e8, 25e8, 125e8)
        ]
        for name, curve in true.items()
    }  # fmt: skip
    found = fit(points)
    assert found["kraken"].entropy == found["standard"].entropy == pytest.approx(1.7, rel=0.05)
    for name, curve in true.items():
        assert found[name].alpha == pytest.approx(curve.alpha, rel=0.1)
        assert found[name].beta == pytest.approx(curve.beta, rel=0.1)
        assert found[name].error == pytest.approx(1e-3, rel=0.5)
        for n, d in ((2e7, 1e9), (3e8, 2e8)):  # between the points
            assert found[name].loss(n, d) == pytest.approx(curve.loss(n, d), rel=2e-3)


def test_losses_between_token_counts() -> None:
    """A parabola in ln D through the nearest three, by Lagrange's formula; nothing outside of what was trained."""
    losses = {100: 8.0, 200: 6.0, 400: 5.0, 800: 4.5}
    x = math.log2(500 / 100)  # the nearest three are at 1, 2 and 3
    weights = ((x - 2) * (x - 3) / 2, -(x - 1) * (x - 3), (x - 1) * (x - 2) / 2)
    logs = sum(weight * math.log(loss) for weight, loss in zip(weights, (6.0, 5.0, 4.5), strict=True))
    assert loss_after(500, losses) == pytest.approx(math.exp(logs), rel=1e-12)
    assert loss_after(200, losses) == pytest.approx(6.0)
    assert loss_after(99, losses) is None
    assert loss_after(801, losses) is None


def test_equal_time_by_hand(tmp_path: Path) -> None:
    """An architecture with half the step time sees twice the tokens, one with a third more than were trained."""
    model = small_plan(tmp_path).models["s"]["kraken"]
    curve = {100: 6.0, 200: 5.0, 400: 4.0}
    one = Trained(model, 1e-3, {0: curve, 1: {tokens: loss + 0.1 for tokens, loss in curve.items()}})
    found = {"standard": one, "kraken": one, "track": one}
    comparison = at_equal_time("s", found, {"standard": 6.0, "kraken": 3.0, "track": 2.0}, "here")
    assert comparison.losses["standard"] == pytest.approx([5.0, 5.1])
    assert comparison.losses["kraken"] == pytest.approx([4.0, 4.1])
    assert comparison.unknown == ("track",)
    assert comparison.relative_seconds == pytest.approx({"standard": 1.0, "kraken": 0.5, "track": 1 / 3})


def test_verdict() -> None:
    """Differences are more than noise from two standard errors on, which all architectures give together."""
    losses = {"kraken": [5.0, 5.1], "standard": [4.9, 5.02], "ladder": [5.01, 5.09], "track": [5.3, 5.42]}
    comparison = Comparison("1m", "4M tokens", "", losses)
    # Differences from kraken: -0.1 and -0.08, 0.01 and -0.01, 0.3 and 0.32, each with a variance of 2 * 0.01^2.
    assert comparison.noise("kraken") == pytest.approx(0.01)
    of_kraken = (
        "kraken is number 2 of 4: it wins against track, loses to standard and is within noise of ladder. Its "
        "perplexity is 9.4% above standard's."
    )
    assert verdict(comparison, ["kraken"]) == f"**1m, 4M tokens:** standard has the lowest loss. {of_kraken}"
    assert verdict(comparison, ["kraken", "track"]) == (
        f"**1m, 4M tokens:** standard has the lowest loss. {of_kraken} track is number 4 of 4: it loses to standard, "
        "kraken and ladder. Its perplexity is 49.2% above standard's."
    )
    without = dataclasses.replace(comparison, losses={"standard": [1.0, 1.0]})
    assert verdict(without, ["kraken"]) == "**1m, 4M tokens:** there is nothing to compare yet."
    unknown = dataclasses.replace(comparison, unknown=("fal",))
    assert "Not known, since it would see more or fewer tokens than were trained: fal." in verdict(unknown, ["kraken"])
    assert [rounded(tokens) for tokens in (1_003_520, 4_001_792, 2_000_158_720)] == ["1M", "4M", "2B"]


def finish(plan: Plan, results: Results, runs: list[Run], data: str = "d") -> None:
    """Losses fall with tokens, size and learning rate; the standard Transformer's best rate is the second."""
    for run in runs:
        cell = plan.cell(run.arm)
        rate = cell.learning_rate if cell.architecture == "kraken" else abs(cell.learning_rate - 2e-3)
        model = plan.models[cell.size][cell.architecture]
        loss = 3.0 + 90 / cell.tokens**0.6 + 30 / model.num_parameters**0.3 + 0.01 * run.seed
        loss += -rate if cell.architecture == "kraken" else rate
        write_finished(results, run, loss, model, cell.tokens, data)


def test_what_is_missing(tmp_path: Path) -> None:
    """First the runs that choose the rate, then those at the best rate; results outlive the folders of the runs."""
    plan = small_plan(tmp_path)
    results = Results(plan.study, tmp_path / "runs")
    first = plan.missing(["s"], plan.results(tmp_path / "runs"))
    assert [run.arm for run in first[:3]] == [
        f"kraken size=s tokens=256 lr={rate}" for rate in ("0.001", "0.002", "0.004")
    ]
    assert len(first) == 2 * 3
    assert {run.seed for run in first} == {0}
    finish(plan, results, first[:-1])
    found = plan.results(tmp_path / "runs")
    second = plan.missing(["s"], found)
    assert second.count(first[-1]) == 1  # of the standard Transformer nothing else can begin
    assert {run.arm for run in second} == {
        first[-1].arm, *(f"kraken size=s tokens={tokens} lr=0.004" for tokens in (256, 512, 1024))
    }  # fmt: skip
    assert len(second) == 1 + 2 * 3 - 1
    assert trained(plan, "s", found) == {}
    shutil.rmtree(tmp_path / "runs")
    assert plan.missing(["s"], plan.results(tmp_path / "runs")) == second


def test_refusals(tmp_path: Path) -> None:
    """Other data or settings than those of the recorded runs, before anything is started."""
    plan = small_plan(tmp_path)
    data = write_set(tmp_path / "data", {"train": 500, "validation": 100})
    results = Results(plan.study, tmp_path / "runs")
    finish(plan, results, plan.missing(["s"], {}), data="other")
    plan.results(tmp_path / "runs")
    with pytest.raises(ConfigError, match=r"data holds other data than those in .*small.jsonl.*prepare the data as "):
        train_all(plan, ["s"], data, tmp_path / "runs", [])
    with pytest.raises(ConfigError, match=r"has schedule.warmup_tokens=64, but the study now asks for .*tokens=128"):
        small_plan(tmp_path, warmup=0.5).results(tmp_path / "runs")
    for changes, message in (
        ({"seeds": [0]}, "seeds=1 must be at least 2"),
        ({"tokens": ["1k", "2k"]}, r"tokens=\[1000, 2000\] must be at least 3 values in ascending order"),
        ({"learning_rates": [3e-3, 2e-3, 1e-3]}, "learning_rates=.* in ascending order"),
        ({"architectures": ["standard", "fal"]}, "must have kraken, which others are compared with"),
        ({"architectures": ["kraken", "standard", "squid"]}, "architectures=squid"),
        ({"forms": {"squid": "squids"}}, "forms.squid=squids"),
        ({"with_embedding_of_base": ["track"]}, "with_embedding_of_base=track is not known"),
        ({"with_embedding_of_base": ["standard"]}, "with_embedding_of_base=standard, whose architecture=standard"),
        ({"speed": 1}, "speed is not a setting"),
        ({"training": {"optim": "adamw"}}, "training.precision is not set"),
    ):
        with pytest.raises(ConfigError, match=message):
            small_plan(tmp_path, **changes)
    with pytest.raises(ConfigError, match=r"cannot be read as YAML .* name a plan such as"):
        read_plan(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"--sizes s,xl: .*small.yaml has no xl; use one of s, m, l"):
        chosen_sizes(small_plan(tmp_path), "s,xl")
    with pytest.raises(ConfigError, match=r"parallel has -\d.*% parameters, more than tolerance=0.1 from the 121,152"):
        changes = {"parallel": {"ffn_hidden_size": 64}}
        _ = small_plan(tmp_path, architectures=["kraken", "standard", "parallel"], changes=changes).models


def test_report(tmp_path: Path) -> None:
    """The verdict of finished runs: winners, tables, a figure, curves."""
    plan = small_plan(tmp_path)
    results = Results(plan.study, tmp_path / "runs")
    finish(plan, results, plan.missing(["s"], {}))
    found = plan.results(tmp_path / "runs")
    runs = plan.missing(["s"], found)
    finish(plan, results, [run for run in runs if run.arm.startswith("standard ")])
    assert "At s these are not finished and not compared: kraken.\n" in write_verdict(plan)
    finish(plan, results, [run for run in runs if not run.arm.startswith("standard ")])
    report = write_verdict(plan)
    assert "not compared" not in report
    assert "24 or more" not in report
    assert "runs are missing" in report
    assert "They are fitted once 3 sizes are finished. Finished so far: s." in report
    assert "| s | kraken | " in report
    assert "| m | kraken | " not in report
    for size in ("m", "l"):
        finish(plan, results, plan.missing([size], found))
        known = plan.results(tmp_path / "runs")
        finish(plan, results, plan.missing([size], known))
    report = write_verdict(plan)
    assert "missing" not in report
    assert (
        "- **s, 1k tokens:** kraken has the lowest loss. kraken is number 1 of 2: it wins against standard." in report
    )
    assert "**l, the predicted time of 510 tokens of standard, as at large:** kraken has the lowest loss" in report
    assert "tried, so a better one may lie beyond it: kraken of s, kraken of m, kraken of l." in report
    row = next(line for line in report.partition("## Curves")[2].splitlines() if line.startswith("| kraken |"))
    assert float(row.split()[3]) == pytest.approx(3.0, abs=0.1)  # the entropy


def write_verdict(plan: Plan) -> str:
    verdict_command.main([str(plan.path), str(plan.path.parent / "runs")])
    assert plan.path.with_suffix(".png").stat().st_size > 10_000
    return plan.path.with_suffix(".md").read_text()


def test_the_recorded_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verdict that the repository has is that of its recorded runs, and the documents show its figure."""
    monkeypatch.setattr(verdict_command, "curve_section", lambda *_: [])  # the fit takes long
    for suffix in (".yaml", ".jsonl"):
        shutil.copy(FOLDER / f"cpu{suffix}", tmp_path)
    report = write_verdict(read_plan(tmp_path / "cpu.yaml"))
    assert "missing" not in report
    before_curves, heading, _ = report.partition("## Curves")
    assert (FOLDER / "cpu.md").read_text().partition("## Curves")[:2] == (before_curves, heading)
    assert (FOLDER / "cpu.png").read_bytes() == (FOLDER.parents[1] / "docs" / "architectures-cpu.png").read_bytes()


@pytest.mark.slow
def test_commands(tmp_path: Path, data: Path) -> None:
    """Tiny runs, recorded as they are finished: the same command then has nothing to do, and the verdict names them."""
    path = small_plan(tmp_path).path
    rest = [str(data), str(tmp_path / "runs"), "--sizes", "s"]
    command = ["studies.architectures.run", str(path), *rest]
    first = run_process(*command)
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stdout.count("\nfinished ") == 2 * 8
    assert first.stdout.splitlines()[-1].startswith("finished; write the verdict with: ")
    shutil.rmtree(tmp_path / "runs")
    again = run_process(*command)
    assert again.returncode == 0, again.stderr
    assert "started" not in again.stdout
    report = write_verdict(read_plan(path))
    assert "**s, 1k tokens:**" in report
    records = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    assert {record["tokens"] for record in records} == {256, 512, 1024}
    assert len({record["validation_loss"] for record in records}) == 16
    other = run_process(command[0], str(small_plan(tmp_path, warmup=0.5).path), *rest)
    assert other.returncode == 2
    assert "but the study now asks for" in other.stderr
