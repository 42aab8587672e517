"""The times in vLLM, with a vLLM that answers in times which the test chooses."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import run_here, user_error

from kraken_train.bench import vllm
from kraken_train.bench.vllm_jobs import Answer, Job, Outcome, require_vllm
from kraken_train.common.errors import ConfigError

PREFILL = {("kraken", True): 0.05, ("kraken", False): 0.08, ("standard", True): 0.1}  # seconds, of 8 tokens
STEP = 0.01  # seconds, of each further token
SETTINGS = ["sizes=[tiny]", "architectures=[kraken,standard]", "degrees=[2]", "contexts=[8,16]", "output_tokens=5"]
SETTINGS += ["repeats=3", "vocab_size=128", "dtype=fp32", "eager=true"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], Job]]:
    """The config.json and the job of each model that vLLM was asked for."""
    found: list[tuple[dict[str, Any], Job]] = []

    def run_jobs(python: Path, jobs: Sequence[Job], folder: Path) -> list[Outcome]:
        (job,) = jobs
        description = json.loads(Path(job.settings["model"], "config.json").read_text(encoding="utf-8"))
        found.append((description, job))
        overlap = job.settings.get("hf_overrides", {}).get("overlap", True)
        prefill = PREFILL[description["architecture"], overlap]
        answers = []
        for number, ((prompt, tokens),) in enumerate(job.calls):
            seconds = prefill * len(prompt) / 8 + STEP * (tokens - 1)
            late = 9.0 if number < 2 * vllm.WARMUP_ROUNDS else 0.0  # as what is compiled meanwhile
            answers.append(Answer(seconds + late, [[0] * tokens], [0]))
        return [Outcome(answers)]

    monkeypatch.setattr(vllm, "run_jobs", run_jobs)
    monkeypatch.setattr(vllm, "require_vllm", lambda python: "0.32.0")
    return found


def run(tmp_path: Path, *more: str) -> dict[str, Any]:
    from kraken_train.common.cli import compose_command  # noqa: PLC0415 (Hydra)

    vllm.measure_all(compose_command([*SETTINGS, f"output_dir={tmp_path}", *more], vllm.VllmConfig, "vllm"))
    record: dict[str, Any] = json.loads((tmp_path / "vllm.json").read_text())
    return record


def test_times_and_speed_ups(
    asked: list[tuple[dict[str, Any], Job]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [
        {"size": "tiny", "context": 16, "devices": 2, "architecture": "kraken",
         "ttft": {"seconds": 0.123456}, "time_per_output_token": {"seconds": 0.004321}},
    ]  # fmt: skip
    (tmp_path / "ttft.json").write_text(json.dumps({"results": own}))
    record = run(tmp_path, f"ttft_file={tmp_path / 'ttft.json'}")
    assert [(r["architecture"], r["overlap"], r["context"]) for r in record["results"]] == [
        ("kraken", True, 8), ("kraken", True, 16), ("kraken", False, 8), ("kraken", False, 16),
        ("standard", True, 8), ("standard", True, 16),
    ]  # fmt: skip
    for result in record["results"]:
        prefill = PREFILL[result["architecture"], result["overlap"]] * result["context"] / 8
        assert result["ttft"]["seconds"] == pytest.approx(prefill)
        assert result["time_per_output_token"]["seconds"] == pytest.approx(STEP)
    assert record["summary"]["kraken"]["first_token_speed_up_over_standard"] == pytest.approx(1.0)
    assert record["summary"]["kraken, waiting"]["first_token_speed_up_over_standard"] == pytest.approx(0.25)
    assert record["summary"]["kraken"]["output_token_speed_up_over_standard"] == pytest.approx(0.0)
    assert "standard" not in record["summary"]
    table = capsys.readouterr().out
    assert "+100.0%" in table
    assert "123.456" in table
    assert "4.321" in table
    assert (tmp_path / "vllm.png").stat().st_size > 0


def test_what_vllm_is_asked_for(asked: list[tuple[dict[str, Any], Job]], tmp_path: Path) -> None:
    run(tmp_path)
    kraken, waiting, standard = asked
    assert kraken[0] == waiting[0]
    assert (kraken[0]["num_sub_layers"], kraken[0]["context_length"], standard[0]["hidden_size"]) == (2, 21, 448)
    assert kraken[0]["model_type"] == "kraken"
    assert "hf_overrides" not in kraken[1].settings
    expected = {"load_format": "dummy", "tensor_parallel_size": 2, "enforce_eager": True, "dtype": "float32"}
    assert expected.items() <= standard[1].settings.items()
    assert standard[1].settings["max_num_batched_tokens"] >= 16  # no prompt is cut
    assert [tokens for ((_, tokens),) in standard[1].calls] == [1, 5] * (vllm.WARMUP_ROUNDS + 3) * 2


def test_a_refusal_of_vllm_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(vllm, "require_vllm", lambda python: "0.32.0")
    monkeypatch.setattr(vllm, "run_jobs", lambda *_: [Outcome(error="ValueError: no room")])
    with pytest.raises(ConfigError, match=r"vLLM does not serve kraken of sizes=tiny: ValueError: no room"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("output_tokens=1", "output_tokens=1 must be at least 2"),
        ("dtype=fp8", "dtype=fp8"),
        ("python=/nowhere/python", "python=/nowhere/python does not exist; give the interpreter"),
        ("ttft_file=/nowhere.json", "ttft_file=/nowhere.json is not a ttft.json"),
    ],
)
def test_mistakes(mistake: str, message: str, tmp_path: Path) -> None:
    result = run_here("kraken_train.bench.vllm", *SETTINGS, f"output_dir={tmp_path / 'out'}", mistake)
    assert message in user_error(result)


def test_an_interpreter_without_vllm() -> None:
    with pytest.raises(ConfigError, match="has not both vLLM and the plugin"):
        require_vllm(Path(sys.executable))
