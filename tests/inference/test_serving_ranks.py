"""One model on two to four devices, evenly or not: the same logits, the same texts, and no needless collectives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import Golden
from helpers import REPOSITORY, launch_ranks, run_here, write_small_export

from checkpoints.exports.folder import read_export, write_export
from inference import serving_ranks
from inference.serving_ranks import CASES, CONFIGS, NUM_LAYERS, Case, case_name
from kraken_train.inference.engine import InferenceEngine
from kraken_train.inference.generation import continue_prompts
from kraken_train.inference.sampling import Sampling

Report = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    for name, config in CONFIGS.items():
        write_small_export(folder / name, config, tokenizer_dir if name == "small" else None)
    golden = Golden()
    write_export(folder / "golden", golden.config, golden.weights, tokenizer_dir=None, metadata={}, dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> Report:
    launch_ranks(4, str(serving_ranks.__file__), str(folder))
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_logits(report: Report, case: Case) -> None:
    """Of prompts of unequal lengths and of 64 further tokens, against the whole model; the same on all ranks."""
    for rank in range(len(case[1])):
        found = report["cases"][rank][case_name(case)]
        assert found["error"] < 1e-5
        assert found["equal"]


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_number_of_collectives(report: Report, case: Case) -> None:
    """The sums of the layers, and one gathering of the logits."""
    form = "kraken" if case[0] == "golden" else case[0].split("-")[0]
    layers = Golden().config.num_layers if case[0] == "golden" else NUM_LAYERS
    sums = {
        "kraken": layers,
        "parallel": layers,
        "standard": 2 * layers,
        "ladder": 2 * layers,
        "fal": layers + 1,
        "track": layers,
    }
    expected = [1 if case[0] == "track-2" else sums[form], 1]  # it sums every two layers
    found = report["cases"][0][case_name(case)]
    assert found["prefill"] == found["decode"] == expected


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_most_likely_without_gathered_logits(report: Report, case: Case) -> None:
    """Of three sequences each rank sends two numbers of 4 bytes, and not its share of the logits."""
    for rank in range(len(case[1])):
        found = report["cases"][rank][case_name(case)]["most_likely"]
        assert found["equal"] == [True] * 4
        assert found["moved"] == [1, 3 * 2 * 4]
        assert found["finite"] == [False] * 3


@pytest.mark.parametrize(
    ("name", "waited", "overlapped"),
    [
        ("kraken-4-mha", 1, 1),
        ("standard-mha", 4, 0),
        ("ladder-gqa", 1, 3),
        ("ladder-hybrid", 1, 3),
    ],
)
def test_sums_without_the_library(report: Report, name: str, waited: int, overlapped: int) -> None:
    """Of two layers; then two gatherings, of logits and of the most likely tokens."""
    for rank in range(4):
        found = report["shared"][rank][name]
        assert found["equal"] == [True] * 3
        assert found["waited"] == ["one-shot"] * (waited + 2)
        assert found["overlapped"] == ["one-shot"] * overlapped


def test_uneven_shares(report: Report) -> None:
    def shares(name: str) -> list[int]:
        return [rank[name]["units"] for rank in report["cases"] if name in rank]

    assert shares("kraken-6 [1.0, 1.0, 1.0, 1.0]") == [2, 2, 1, 1]
    assert shares("kraken-6 [1.0, 1.0, 0.5]") == [3, 2, 1]
    assert shares("kraken-4-gqa [1.0, 1.0, 1.0]") == [2, 1, 1]
    assert shares("standard-mqa [1.0, 1.0, 0.5]") == [2, 1, 1]


@pytest.mark.parametrize("temperature", ["0.0", "1.0", "3.0"])
def test_the_same_text_on_every_rank_and_in_one_process(report: Report, folder: Path, temperature: str) -> None:
    engine = InferenceEngine(read_export(folder / "kraken-6").load_model(), 3, 25)
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6], [5]]
    expected = continue_prompts(engine, prompts, 20, Sampling(float(temperature), seed=5))
    assert report["texts"][temperature] == [expected] * 4


def test_an_error_of_one_rank_is_raised_on_all(report: Report) -> None:
    assert report["failure"] == ["CheckpointError: rank 2: e/model.safetensors cannot be read"] * 4


def test_command(folder: Path) -> None:
    """On two unequal devices it prints once what it prints in one process."""
    prompts = folder / "prompts"
    prompts.write_text("Once upon a time\nThe river\nNumbers such as\n")
    arguments = [f"export_dir={folder / 'small'}", f"prompts_file={prompts}", "max_new_tokens=9", "batch_size=2"]
    alone = run_here("kraken_train.generate", *arguments)
    assert alone.returncode == 0, alone.stderr
    texts = [json.loads(line) for line in alone.stdout.splitlines()]
    assert all(text.startswith(line) for text, line in zip(texts, prompts.read_text().splitlines(), strict=True))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu"}
    together = subprocess.run(
        [*command, "-m", "kraken_train.generate", *arguments, "devices=[1.0,0.5]"],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert together.returncode == 0, together.stderr
    assert together.stdout == alone.stdout


@pytest.mark.parametrize(("variable", "printed"), [(None, "shut down\n"), ("RANK", ""), ("SLURM_PROCID", "")])
def test_a_rank_ends_without_python_s_shutdown(variable: str | None, printed: str) -> None:
    """Which can abort; of what it printed nothing is lost."""
    program = (
        "import atexit; from kraken_train.inference.ranks import end_rank; print('text')\n"
        "atexit.register(print, 'shut down'); end_rank()"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "SLURM_PROCID")}
    environment |= {"PYTHONPATH": str(REPOSITORY)} | ({variable: "0"} if variable else {})
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False
    )
    assert (result.returncode, result.stdout) == (0, f"text\n{printed}"), result.stderr
