"""Curves from `metrics.jsonl`."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from kraken_train.errors import DataError
from kraken_train.report import main, read_run


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
        assert picture.width > 1000 and picture.height > 600
        assert len(set(picture.convert("RGB").resize((200, 120)).getdata())) > 50  # something is drawn


def test_several_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [str(write_metrics(tmp_path / name, steps)) for name, steps in (("gpt", 300), ("kraken", 200))]
    monkeypatch.chdir(tmp_path)
    main(runs)
    main([*runs, "--output", str(tmp_path / "both.png")])
    assert (tmp_path / "curves.png").stat().st_size > 10_000 and (tmp_path / "both.png").exists()


def test_series(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 5.0}\n{"step": 3, "loss": null}\n{"step": 2, "loss": 4.0, "validation_loss": 4.5}\n'
        '{"step": 1, "loss": 6.0}\n{"step": 4, "lo'
    )
    run = read_run(tmp_path)
    assert run.label == tmp_path.name
    assert run.series("loss") == ([1, 2], [6.0, 4.0])  # the later record of a step counts, null is no value
    assert run.series("validation_loss") == ([2], [4.5])
    assert run.series("mfu") == ([], [])


def test_a_run_with_little_in_it(tmp_path: Path) -> None:
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
