"""Data preparation, training, export and evaluation on a CPU, in a few minutes: python -m launch.demo [FOLDER]

Prepares the embedded corpus, trains a small Kraken whose four sub-layers are split over two ranks of the deepspeed
launcher, draws the curves, exports the model, evaluates the export and generates text. Every command is printed before
it runs, so that it can be copied and changed.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from checkpoints.exports.folder import read_export
from kraken_train.common.help import make_parser
from kraken_train.common.locales import use_unicode
from kraken_train.parallel.ranks import free_port

RANKS = 2
MODEL = "kraken-tiny-4way"
STEPS = 150
PROMPT = "Return a new"

console = Console(highlight=False)


def main() -> None:
    use_unicode()
    parser = make_parser(__doc__)
    parser.add_argument("folder", nargs="?", default="runs/demo", type=Path, help="where everything is written")
    folder: Path = parser.parse_args().folder
    make_folder(folder)
    data, run, export = folder / "data", folder / "run", folder / "export"
    started = time.monotonic()
    os.environ["DS_ACCELERATOR"] = "cpu"  # so that the demo is the same with and without GPUs
    console.print("$ export DS_ACCELERATOR=cpu", style="bold")
    python = [sys.executable, "-m"]
    # The launcher is in the folder of the interpreter, also if the environment is not activated.
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(RANKS), "--no_local_rank"]
    launcher += ["--log_level", "error", "--master_port", str(free_port()), "--module"]

    step("prepare", [*python, "data_prep.prepare", "source=embedded", "tokenizer=sentencepiece",
                     "tokenizer.vocab_size=2048", "validation_fraction=0.02", f"output_dir={data}"])  # fmt: skip
    step("train", [*launcher, "kraken_train.train", f"model={MODEL}", f"data_dir={data}", f"run_dir={run}",
                   f"parallel.sub_layer_parallel_size={RANKS}", f"max_steps={STEPS}", "optim.lr=2e-3",
                   "schedule.warmup_steps=20", "validation.every=50", "checkpoint.every=50",
                   "log_every=10"])  # fmt: skip
    step("draw the curves", [*python, "kraken_train.report", str(run)])
    step("export", [*python, "checkpoints.export", f"run_dir={run}", f"output_dir={export}"])
    evaluation = folder / "evaluation.json"
    step("evaluate", [*python, "kraken_train.evaluate", f"export_dir={export}", f"data_dir={data}",
                      f"output={evaluation}", "device=cpu"])  # fmt: skip
    text = step("generate", [*python, "kraken_train.generate", f"export_dir={export}", f"prompt={PROMPT}",
                             "max_new_tokens=60", "temperature=0.7", "top_k=40", "seed=1", "device=cpu"],
                capture=True)  # fmt: skip
    summarize(data, run, export, json.loads(evaluation.read_text(encoding="utf-8")), text, time.monotonic() - started)


def make_folder(folder: Path) -> None:
    """Delete an earlier demo and create the folder. Ends the program if the folder holds anything else."""
    marker = folder / ".demo"
    if folder.exists() and any(folder.iterdir()) and not marker.exists():
        sys.exit(f"error: {folder} is not empty and not an earlier demo; name another folder")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        marker.touch()
    except OSError as error:
        sys.exit(f"error: {folder} cannot be written: {error.strerror}; name another folder")


def step(title: str, command: list[str], capture: bool = False) -> str:
    """Print and run one command; what it printed if `capture`. Ends the demo if it fails."""
    console.rule(title)
    shown = [*command]
    shown[0] = Path(command[0]).name
    console.print("$ " + shlex.join(shown), style="bold", markup=False, soft_wrap=True)
    finished = subprocess.run(
        command, check=False, encoding="utf-8", errors="replace", stdout=subprocess.PIPE if capture else None
    )
    if finished.returncode:
        sys.exit(f"error: the step '{title}' failed with exit code {finished.returncode}; its message is above")
    if capture:
        print(finished.stdout, end="")
    return finished.stdout or ""


def summarize(data: Path, run: Path, export: Path, evaluation: dict[str, Any], text: str, seconds: float) -> None:
    manifest = json.loads((data / "manifest.json").read_text(encoding="utf-8"))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    model = read_export(export).config
    table = Table(title=f"kraken-train demo, {seconds:.0f} s", show_header=False, title_justify="left")
    totals = manifest["totals"]
    rows = {
        "corpus": f"docstrings of this Python's standard library, {totals['documents']:,} documents, "
        f"{totals['text_bytes'] / 1e6:.1f} MB",
        "tokens": f"{totals['tokens']:,} prepared, {records[-1]['tokens']:,} trained on, vocabulary "
        f"{manifest['tokenizer']['vocab_size']}",
        "model": f"{MODEL}, {model.num_parameters:,} parameters, its sub-layers split over {RANKS} ranks",
        "loss": f"{records[0]['loss']:.3f} at step {records[0]['step']}, {records[-1]['loss']:.3f} at step "
        f"{records[-1]['step']}",
        "validation perplexity": f"{evaluation['perplexity']:.2f} over {evaluation['tokens']:,} tokens",
        "export": str(export),
        "curves": str(run / "curves.png"),
        "sample": text.strip(),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table, markup=False)


if __name__ == "__main__":
    main()
