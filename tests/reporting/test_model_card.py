"""The model card: written from the run, updated by evaluations, otherwise edited only by the user."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import rough_model, small_configs, write_small_export

from checkpoints.exports.folder import read_export, write_export
from kraken_train.common.errors import CheckpointError
from kraken_train.evaluation.results import Results, Score, SuiteResult, TaskResult, record_results
from kraken_train.reporting.model_card import Training, refresh_results, write_card

CONFIG = small_configs()["kraken"]
TASK = TaskResult(
    {"acc": Score(0.625, 0.01)},
    "acc",
    ["acc"],
    3270,
    "aps/super_glue",
    "hub",
    "lm-eval 0.4.13",
    "2.0",
    0,
)
SUITE = SuiteResult("SuperGLUE, zero-shot", "accuracy", {"boolq": TASK}, {"cb": "not selected"})


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run folder with the metrics of 8 steps."""
    folder = tmp_path / "run"
    folder.mkdir()
    records = [{"step": step, "loss": 5 - step / 8, "tokens": step * 64} for step in range(1, 9)]
    records[4]["validation_loss"] = 4.5
    records[7]["validation_loss"] = 4.2
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def front_matter(card: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(card.split("---")[1])
    return loaded


def write(folder: Path) -> None:
    write_export(
        folder,
        CONFIG,
        rough_model(CONFIG).state_dict(),
        tokenizer_dir=None,
        metadata={"step": 6, "tokens": 384, "data_fingerprint": "f00d"},
        dtype=torch.float32,
    )


def test_card_of_a_run(run_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my-kraken"
    write(folder)
    settings = {"optim": {"lr": 0.003}, "max_steps": 8, "run_dir": "/home/somebody", "precision": "bf16"}
    write_card(folder, Training.of_run(run_dir, settings, last_step=6), "apache-2.0")
    card = (folder / "README.md").read_text()
    about = front_matter(card)
    assert about["library_name"] == "transformers"
    assert about["license"] == "apache-2.0"
    assert "kraken" in about["tags"]
    for text in (
        "# my-kraken",
        f"| parameters | {CONFIG.num_parameters:,} |",
        "| hidden_size | 16 |",
        "| tokens seen | 384 |",
        "| data fingerprint | f00d |",
        "| training loss (nats per token) | 4.2500 at step 6 |",  # at the exported step, not at a later one
        "| validation loss (nats per token) | 4.5000 at step 5, perplexity 90.02 |",
        "| optim.lr | 0.003 |",
        "Not evaluated yet.",
        'from_pretrained("my-kraken", trust_remote_code=True)',
    ):
        assert text in card, text
    assert "somebody" not in card  # paths of the training machine must not be published
    assert (folder / "loss.png").stat().st_size > 5000
    assert "(loss.png)" in card


def test_data_of_all_phases(tmp_path: Path) -> None:
    write(tmp_path / "e")
    description = json.loads((tmp_path / "e" / "config.json").read_text())
    description["training"]["phase_data_fingerprints"] = ["f00d", "beef"]
    (tmp_path / "e" / "config.json").write_text(json.dumps(description))
    (tmp_path / "e" / "SHA256SUMS").unlink()
    write_card(tmp_path / "e")
    assert "| data fingerprint | f00d, beef |" in (tmp_path / "e" / "README.md").read_text()


def test_the_code_in_the_card_works(tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks no question when it runs, and the text ends at the context length."""
    import transformers.dynamic_module_utils as modules  # noqa: PLC0415

    write_small_export(tmp_path / "e", small_configs(vocab_size=320)["kraken"], tokenizer_dir)
    write_card(tmp_path / "e")
    code = (tmp_path / "e" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", pytest.fail)
    found: dict[str, Any] = {}
    with pytest.warns(UserWarning, match="context of 24 tokens is full"):
        exec(code, found)
    assert found["inputs"]["input_ids"].shape[1] < 24
    assert type(found["model"]).__name__ == "KrakenForCausalLM"


def test_only_results_are_updated(tmp_path: Path) -> None:
    folder = tmp_path / "e"
    write(folder)
    write_card(folder)
    path = folder / "README.md"
    assert "license" not in front_matter(path.read_text())
    assert not (folder / "loss.png").exists()
    edited = path.read_text().replace("# e\n", "# The user's own title\n").replace("tags:", "language: en\ntags:")
    path.write_text(edited)
    for _ in range(2):
        refresh_results(read_export(folder), record_results(folder, suites={"superglue": SUITE}))
    card = path.read_text()
    assert "# The user's own title" in card
    assert "Not evaluated yet." not in card
    assert card.count("| boolq | acc | 0.6250 | 0.0100 | 3,270 |") == 1
    assert card.count("evaluation: begin") == 1
    about = front_matter(card)
    assert about["language"] == "en"
    result = about["model-index"][0]["results"][0]
    assert result["dataset"]["type"] == "aps/super_glue"
    assert result["metrics"][0]["value"] == 0.625


def test_other_cards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "e"
    write_small_export(folder, small_configs()["parallel"], None)
    results = Results(suites={"superglue": SUITE})
    refresh_results(read_export(folder), results)
    assert "parallel form" in (folder / "README.md").read_text()  # an export without a card gets one
    (folder / "README.md").write_text("Mine alone.\n")
    refresh_results(read_export(folder), results)
    card = (folder / "README.md").read_text()
    assert "Mine alone." in card
    assert "| boolq" not in card
    assert "model-index" in front_matter(card)
    assert "has no markers for results" in capsys.readouterr().out
    (folder / "README.md").write_text("---\na: [\n---\n")
    with pytest.raises(CheckpointError, match="repair its front matter"):
        refresh_results(read_export(folder), results)
