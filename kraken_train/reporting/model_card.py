"""The model card of an export, README.md: the model, its training, its evaluation, and how to load it.

It is written once, from the run, and users may edit it afterwards. An evaluation of the export rewrites only the text
between two markers and the results in the front matter, which the Hub reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from checkpoints.exports.folder import Export, read_export
from kraken_train.common.errors import CheckpointError
from kraken_train.common.files import replace_synced
from kraken_train.common.settings import to_dict
from kraken_train.evaluation.results import Results, markdown, markdown_table, read_results
from kraken_train.recipe.batch_ramp import describe_batch_size
from kraken_train.recipe.phases import describe_phases, recorded_phases
from kraken_train.reporting.curves import draw_loss_curve
from kraken_train.run.metrics import METRICS_FILE, Run, read_run

CARD_FILE = "README.md"
PROJECT_TAG = "kraken"  # of all models of this program on the Hub
LOSS_CURVE_FILE = "loss.png"
BEGIN, END = "<!-- evaluation: begin -->", "<!-- evaluation: end -->"
# Settings that describe the training; the others describe places and machines.
TRAINING_SETTINGS = ("optim", "schedule", "max_steps", "max_tokens", "phases", "global_batch_size", "precision", "seed")
METRIC_TYPES = {"acc": "accuracy", "acc_norm": "accuracy", "f1": "f1", "perplexity": "perplexity"}


@dataclass(frozen=True)
class Training:
    """The training run for the card; `metrics` is None if they do not exist."""

    settings: Mapping[str, Any]  # the run's configuration
    metrics: Run | None

    @classmethod
    def of_run(cls, run_dir: Path, settings: Mapping[str, Any], last_step: int) -> Training:
        """Read the metrics up to `last_step`. Raises DataError if they are damaged."""
        if not (run_dir / METRICS_FILE).is_file():
            return cls(settings, None)
        run = read_run(run_dir)
        return cls(settings, Run(run.label, [record for record in run.records if record["step"] <= last_step]))


def write_card(
    export_dir: Path, training: Training | None = None, license_name: str | None = None, name: str | None = None
) -> None:
    """Write the card, and the loss curve if there are metrics. Raises CheckpointError.

    `name` is that of the folder, where it has another one while it is being written.
    """
    export = read_export(export_dir)
    name = name or export_dir.resolve().name
    results = read_results(export_dir)
    has_curve = training is not None and training.metrics is not None and len(training.metrics.records) > 0
    if has_curve:
        draw_loss_curve(training.metrics, export_dir / LOSS_CURVE_FILE)  # type: ignore[union-attr, arg-type]
    data = ModelCardData(
        license=license_name,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys([PROJECT_TAG, export.config.architecture])),
        model_name=name,
        eval_results=eval_results(results) or None,
    )
    text = body(export, name, training, has_curve, results)
    save(export_dir, f"---\n{data.to_yaml()}\n---\n\n{text}")


def refresh_results(export: Export, results: Results) -> None:
    """Update the results in the card, or write a card if there is none. Raises CheckpointError."""
    path = export.folder / CARD_FILE
    if not path.exists():
        write_card(export.folder)
        return
    try:
        card = ModelCard.load(path, ignore_metadata_errors=True)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} cannot be read ({reason}); repair its front matter or remove it") from error
    before, begin, rest = card.text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        print(f"note: {path} has no markers for results ({BEGIN} ... {END}), so they are only in its front matter")
    else:
        card.text = f"{before}{section(results)}{after}"
    card.data.model_name = card.data.get("model_name") or export.folder.resolve().name
    card.data.eval_results = eval_results(results) or None
    save(export.folder, str(card))


def save(export_dir: Path, text: str) -> None:
    try:
        replace_synced(export_dir / CARD_FILE, text.rstrip() + "\n")
    except OSError as error:
        raise CheckpointError(f"{export_dir / CARD_FILE} cannot be written: {error.strerror}") from error


def eval_results(results: Results) -> list[EvalResult]:
    """The suites' results for the front matter of the Hub: the main metric of each task."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=task.dataset,
            dataset_name=f"{suite.title}: {name}",
            metric_type=METRIC_TYPES.get(task.metric, task.metric),
            metric_name=task.metric,
            metric_value=round(task.scores[task.metric].value, 6),
            source_name=f"{task.harness}, task version {task.version}, {task.shots}-shot",
            source_url="https://github.com/EleutherAI/lm-evaluation-harness",
        )
        for suite in results.suites.values()
        for name, task in suite.tasks.items()
    ]


# ---------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------


def body(export: Export, name: str, training: Training | None, has_curve: bool, results: Results) -> str:
    """The card below its front matter."""
    parts = [
        f"# {name}",
        f"{export.config.introduction} Trained with kraken-train.",
        "## Configuration",
        two_columns({**to_dict(export.config), "parameters": f"{export.config.num_parameters:,}"}),
        "## Training",
        two_columns(training_facts(export, training)),
    ]
    if has_curve:
        parts.append(f"![loss over the steps of training]({LOSS_CURVE_FILE})")
    parts += ["## Evaluation", section(results), "## How to load it", loading(name)]
    return "\n\n".join(parts)


def training_facts(export: Export, training: Training | None) -> dict[str, Any]:
    known = export.training
    facts: dict[str, Any] = {
        "tokens seen": f"{known['tokens']:,}" if "tokens" in known else None,
        "optimizer steps": f"{known['step']:,}" if "step" in known else None,
        "mean of the weights of steps": ", ".join(map(str, known.get("averaged_steps", []))) or None,
        "weights": "exponential average" if known.get("weights") == "ema" else None,
        "data fingerprint": ", ".join(known.get("phase_data_fingerprints", [])) or known.get("data_fingerprint"),
    }
    if training is not None:
        if training.metrics is not None:
            facts |= {
                "training loss (nats per token)": last_value(training.metrics, "loss"),
                "validation loss (nats per token)": last_value(training.metrics, "validation_loss"),
            }
        for name in TRAINING_SETTINGS:
            value = training.settings.get(name)
            if name == "global_batch_size" and value is not None:
                value = describe_batch_size(value)
            elif name == "phases" and value is not None:
                value = describe_phases(recorded_phases(training.settings))
            facts |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {name: value}
    facts = {name: value for name, value in facts.items() if value is not None}
    return facts or {"training": "unknown"}


def last_value(run: Run, key: str) -> str | None:
    """The last logged value with its step; None if there is none."""
    steps, values = run.series(key)
    if not steps:
        return None
    extra = f", perplexity {math.exp(values[-1]):,.2f}" if key == "validation_loss" and values[-1] < 700 else ""
    return f"{values[-1]:.4f} at step {steps[-1]:,.0f}{extra}"


def section(results: Results) -> str:
    """The results between their markers."""
    return f"{BEGIN}\n{markdown(results)}{END}"


def loading(name: str) -> str:
    return f"""The files of this folder are all that is needed; `trust_remote_code=True` runs its modeling file.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

As usual in transformers, text that spells a special token, such as the end of a document, becomes that token. In
training it stayed text; `AutoTokenizer.from_pretrained("{name}", split_special_tokens=True)` keeps it text too.

With kraken-train:

```
python -m kraken_train.generate export_dir={name} prompt="Once upon a time"
python -m kraken_train.evaluate export_dir={name} suite=superglue
```"""


def two_columns(facts: Mapping[str, Any]) -> str:
    rows = [(name, str(value)) for name, value in facts.items() if value is not None]
    return markdown_table(("setting", "value"), rows)
