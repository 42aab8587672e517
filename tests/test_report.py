"""Curves of runs and comparisons."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from helpers import small_configs, write_small_export
from PIL import Image

from kraken_train.common.errors import DataError
from kraken_train.common.settings import to_dict
from kraken_train.evaluation.results import Score, SuiteResult, TaskResult, record_results
from kraken_train.model.registry import build_model
from kraken_train.report import main
from kraken_train.reporting.norms_figure import COLOURS
from kraken_train.run.exports import record_export
from kraken_train.run.metrics import read_run


def write_metrics(run_dir: Path, steps: int = 300) -> Path:
    run_dir.mkdir()
    with (run_dir / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            record = {
                "step": step,
                "loss": 3 + 5 * math.exp(-step / 60) + 0.05 * math.sin(step * 7),
                "grad_norm": 0.6 + 2 * math.exp(-step / 20) + 0.1 * math.sin(step * 5),
                "lr": 1e-3 * min(1, step / 30) * (0.55 + 0.45 * math.cos(math.pi * step / steps)),
                "tokens": step * 4096,
                "tokens_per_second": 51000 + 800 * math.sin(step),
            }
            if step % 50 == 0:
                record["validation_loss"] = 3.05 + 5 * math.exp(-step / 60)
            file.write(json.dumps(record) + "\n")
    return run_dir


def test_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = write_metrics(tmp_path / "run")
    main([str(run_dir)])
    assert capsys.readouterr().out.strip() == f"wrote {run_dir / 'curves.png'}"
    with Image.open(run_dir / "curves.png") as picture:
        assert picture.width > 1000
        assert picture.height > 600
        assert len(set(picture.convert("RGB").resize((200, 120)).getdata())) > 50  # not a blank picture


def test_several_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [str(write_metrics(tmp_path / name, steps)) for name, steps in (("gpt", 300), ("kraken", 200))]
    monkeypatch.chdir(tmp_path)
    main(runs)
    main([*runs, "--output", str(tmp_path / "both.png")])
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert (tmp_path / "both.png").exists()


SCORES = {"boolq": {"kraken": 0.7, "gpt": 0.6}, "cb": {"kraken": 0.4, "gpt": 0.5}, "copa": {"kraken": 0.9}}


@pytest.fixture
def compared(tmp_path: Path) -> list[Path]:
    """A Kraken run with an evaluated export, an evaluated export of a baseline, and a run with metrics only."""
    configs = small_configs()
    paths = [write_metrics(tmp_path / "kraken"), tmp_path / "gpt", write_metrics(tmp_path / "unknown", steps=20)]
    identity = {"id": "1", "model": to_dict(configs["kraken"]), "data_fingerprint": "f", "seed": 0}
    (paths[0] / "run.json").write_text(json.dumps(identity))
    exports = {"kraken": tmp_path / "exported", "gpt": paths[1]}
    for name, config in (("kraken", configs["kraken"]), ("gpt", configs["standard"])):
        write_small_export(exports[name], config, None)
        found = {
            task: TaskResult({"acc": Score(of[name], 0.03)}, "acc", ["acc"], 10, "d", "files", "lm-eval", "1", 0)
            for task, of in SCORES.items()
            if name in of
        }
        suite = SuiteResult("SuperGLUE, zero-shot", "accuracy", found, dict.fromkeys(SCORES.keys() - found, "-"))
        loss = {"kraken": 3.0, "gpt": 3.2}[name]
        about = {"data_fingerprint": "f" * 32, "split": "validation", "mode": "stream", "stride": 24, "dtype": "fp32"}
        perplexity = {**about, "loss": loss, "perplexity": math.exp(loss), "tokens": 9, "bits_per_byte": loss / 3}
        record_results(exports[name], perplexity, {"superglue": suite})
    record_export(paths[0], tmp_path / "gone", 5)
    record_export(paths[0], exports["kraken"], 7)
    record_export(paths[0], tmp_path / "gone too", 9)
    return paths


def test_comparison(compared: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(path) for path in compared]
    main([*paths, "--output", str(tmp_path / "c.png"), "--table", str(tmp_path / "c.md")])
    main([*paths, "--output", str(tmp_path / "c.png"), "--table", str(tmp_path / "c.json")])
    kraken, gpt, unknown = json.loads((tmp_path / "c.json").read_text())["runs"]
    parameters = sum(p.numel() for p in build_model(small_configs()["kraken"]).parameters())
    assert kraken["parameters"] == parameters
    assert kraken["tokens"] == 300 * 4096
    assert gpt["tokens"] is None
    assert kraken["validation_loss"] == pytest.approx(3.05 + 5 * math.exp(-5))
    assert gpt["validation_loss"] is None
    assert 51000 - 800 < kraken["tokens_per_second"] < 51000 + 800
    assert kraken["evaluation"]["perplexity"] == pytest.approx(math.exp(3))
    assert unknown["evaluation"] is None
    # Averages are over the tasks that all have: only one has COPA.
    averages = [run["suites"]["superglue"]["average"]["value"] for run in (kraken, gpt)]
    assert averages == pytest.approx([0.55, 0.55])
    assert unknown["suites"] == {}
    assert kraken["suites"]["superglue"]["tasks"]["copa"]["value"] == 0.9
    text = (tmp_path / "c.md").read_text()
    assert f"| kraken | 3-way Kraken, 3 layers of 16 | {parameters:,} | 1,228,800 |" in text
    assert "| gpt | 0.600 ± 0.030 | 0.500 ± 0.030 | - | 0.550 ± 0.021 |" in text
    assert "| unknown | - | - | 81,920 |" in text
    assert "average of 2/3" in text
    assert "3-way Kraken" in capsys.readouterr().out
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.height > 1500  # with rows for perplexity and SuperGLUE


def test_series(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 5.0}\n{"step": 3, "loss": null}\n{"step": 2, "loss": 4.0, "validation_loss": 4.5}\n'
        '{"step": 1, "loss": 6.0}\n{"step": 4, "lo'
    )
    run = read_run(tmp_path)
    assert run.label == tmp_path.name
    assert run.series("loss") == ([1, 2], [6.0, 4.0])  # the later record of a step is used, and null is not a value
    assert run.series("validation_loss") == ([2], [4.5])
    assert run.series("mfu") == ([], [])


def test_a_run_of_one_step(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0}\n')
    main([str(tmp_path)])
    assert (tmp_path / "curves.png").exists()


def test_unusable_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"metrics.jsonl cannot be read \(No such file or directory\)"):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no metrics yet"):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0}\nnonsense\n{"step": 2, "loss": 5.0}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl:2 is not a JSON object"):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 5.0}\n{"step": 2, "x": "\xff"}\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl:2 is not a JSON object"):
        read_run(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "nowhere")])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_norms_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = write_metrics(tmp_path / "run", steps=5)
    message = refused(capsys, str(run_dir), "--norms")
    assert "run run has measured no norms yet; train with norms.every=100" in message
    with (run_dir / "metrics.jsonl").open("a") as file:
        for step in (6, 8):
            sizes = {f"rms/{kind}/layer_{layer}": 0.02 / step for kind in ("weight", "update") for layer in range(3)}
            skipped = {"rms/update/layer_0": 0.0, "rms/activation/layer_0": None}  # which have no place on the axis
            file.write(json.dumps({"step": step, "loss": 5.0, **sizes, **skipped}) + "\n")
    main([str(run_dir), "--norms"])
    assert capsys.readouterr().out.strip() == f"wrote {run_dir / 'norms.png'}"
    with Image.open(run_dir / "norms.png") as picture:
        colors = set(picture.convert("RGB").getdata())
    assert {tuple(round(255 * part) for part in COLOURS(layer / 2)[:3]) for layer in (0, 1, 2)} <= colors
    assert "--norms draws one run" in refused(capsys, str(run_dir), str(run_dir), "--norms")
    assert "--norms draws one run" in refused(capsys, str(run_dir), "--norms", "--table", "t.md")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err
