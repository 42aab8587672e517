"""Commands in a locale that cannot spell a text, or the names of its files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import REPOSITORY

from data_prep.manifest import verify_quick
from data_prep.prepare import PrepareConfig, prepare
from kraken_train.common.locales import use_unicode
from kraken_train.common.settings import from_dict

# The first is what a cluster's minimal environment can be, without what Python does about it by itself.
ASCII = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
TEXTS = [f"{number}: schöne Schiffe 🦑 日本" for number in range(40)]


def run_in(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    rest = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=rest | {"PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu"} | ASCII | environment,
        capture_output=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "données"
    folder.mkdir()
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS)
    (folder / "tëxt.jsonl").write_text(lines, encoding="utf-8")
    return folder


def prepare_here(folder: Path, tokenizer_dir: Path) -> Path:
    settings = {
        "source": str(folder / "tëxt.jsonl"),
        "output_dir": str(folder / "dätä"),
        "validation_fraction": 0.2,
        "num_workers": 0,
        "tokenizer": {"kind": "sentencepiece_model", "path": str(tokenizer_dir / "tokenizer.model")},
    }
    prepare(from_dict(settings, PrepareConfig))
    return folder / "dätä"


def test_text_that_the_terminal_cannot_show(folder: Path, tokenizer_dir: Path) -> None:
    prepare_here(folder, tokenizer_dir)
    result = run_in(folder, "data_prep.verify", "dätä")
    assert result.returncode == 0, result.stderr.decode()
    assert rb"sch\xf6ne Schiffe \U0001f991 \u65e5\u672c" in result.stdout
    assert rb"d\xe4t\xe4: all" in result.stdout
    result = run_in(folder, "data_prep.verify", "nöwhere")
    assert result.returncode == 2
    assert rb"error: n\xf6where does not exist" in result.stderr


def test_the_terminal_keeps_its_encoding(folder: Path, tokenizer_dir: Path) -> None:
    prepare_here(folder, tokenizer_dir)
    result = run_in(folder, "data_prep.verify", "dätä", PYTHONIOENCODING="iso-8859-1")
    assert result.returncode == 0, result.stderr.decode()
    assert "schöne Schiffe".encode("iso-8859-1") + rb" \U0001f991 \u65e5\u672c" in result.stdout


@pytest.mark.slow  # a process for each command, some of which import torch and DeepSpeed twice
def test_all_of_a_model(folder: Path, tokenizer_dir: Path) -> None:
    def run(*command: str) -> bytes:
        result = run_in(folder, *command)
        assert result.returncode == 0, result.stderr.decode()
        return result.stdout

    elsewhere = prepare_here(folder, tokenizer_dir)
    pq.write_table(pa.table({"text": TEXTS}), folder / "tëxt.parquet")
    for source, output in (("tëxt.jsonl", "daten-ö"), ("tëxt.parquet", "daten-ü")):
        run("data_prep.prepare", f"source={source}", f"output_dir={output}", "validation_fraction=0.2",
            "tokenizer=sentencepiece_model", f"tokenizer.path={tokenizer_dir}/tokenizer.model")  # fmt: skip
        assert verify_quick(folder / output).fingerprint == verify_quick(elsewhere).fingerprint
    run("data_prep.inspect", "daten-ö")
    run("kraken_train.train", "model=kraken-tiny-2way", "model.context_length=16", "data_dir=daten-ö", "run_dir=läuft",
        "max_steps=2", "log_every=1", "validation.every=2", "global_batch_size=2", "micro_batch_size=2",
        "schedule.warmup_steps=1")  # fmt: skip
    assert rb"l\xe4uft" in run("kraken_train.status", "läuft")
    run("kraken_train.report", "läuft", "läuft", "--table", "tafel-ä.md", "--output", "bild-ä.png")
    run("checkpoints.inspect", "läuft")
    run("checkpoints.export", "run_dir=läuft", "output_dir=modell-ö")
    run("kraken_train.evaluate", "export_dir=modell-ö", "data_dir=daten-ö", "device=cpu")
    (folder / "fragen-ö").write_text("schön\n", encoding="utf-8")
    arguments = ("kraken_train.generate", "export_dir=modell-ö", "max_new_tokens=4", "device=cpu")
    assert run(*arguments, "prompt=schön").startswith(rb"sch\xf6n")
    assert json.loads(run(*arguments, "prompts_file=fragen-ö")).startswith("schön")


def test_names_that_are_no_unicode(tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """File names are bytes; here they are in ISO 8859-1."""
    folder = tmp_path / os.fsdecode(b"donn\xe9es")
    folder.mkdir()
    table = pa.table({"text": TEXTS})
    with open(folder / os.fsdecode(b"t\xebxt.parquet"), "wb") as file:
        pq.write_table(table, file)
    settings = {
        "source": str(folder),
        "output_dir": str(folder / os.fsdecode(b"d\xe4t\xe4")),
        "validation_fraction": 0.2,
        "num_workers": 0,
        "tokenizer": {"kind": "sentencepiece_model", "path": str(tokenizer_dir / "tokenizer.model")},
    }
    use_unicode()
    manifest = prepare(from_dict(settings, PrepareConfig))
    assert r"d\udce4t\udce4 in" in capsys.readouterr().out
    assert manifest.documents == len(TEXTS)
    again = prepare(from_dict(settings, PrepareConfig))
    assert again.fingerprint == manifest.fingerprint
