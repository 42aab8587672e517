"""Suites of tasks, run by lm-evaluation-harness on an export as transformers loads it.

What is run is `lm_eval --model hf --model_args pretrained=EXPORT,trust_remote_code=True,dtype=float32`, by its Python
interface; the harness is an optional dependency (the extra `eval`). Not in bf16, even if the export is stored in it:
the harness adds up log-probabilities in the model's type, so many answers would be equally likely after rounding, and
what is rounded depends on the batch size.
"""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from checkpoints.exports.folder import MODELING_FILE, Export
from kraken_train.common.errors import CheckpointError, ConfigError, DataError
from kraken_train.common.validation import suggestion
from kraken_train.evaluation.offline import find_file, write_group, write_task
from kraken_train.evaluation.results import Score, SuiteResult, TaskResult
from kraken_train.evaluation.squad import provide_squad_metrics


@dataclass(frozen=True)
class SuiteTask:
    """See conf/suite/."""

    metric: str  # the harness's name of the metric that the paper reports
    benchmark_metrics: list[str] | None = None  # whose mean is the benchmark's own score; None: `metric` alone
    file: str | None = None  # of its documents, without the ending; None: what the data set's part is called on the Hub


@dataclass(frozen=True)
class Suite:
    """See conf/suite/."""

    name: str
    title: str
    average: str | None  # what the average over its tasks is of; None if there is none
    tasks: dict[str, SuiteTask]  # by the harness's names


@dataclass(frozen=True)
class SuiteRun:
    """What of a suite is run, and how."""

    tasks: list[str] | None  # None: all
    data_dir: Path | None  # of JSONL files; None: from the Hub
    skip_missing: bool  # files
    task_dir: Path | None  # where the definitions of offline tasks are left, for the harness's own command
    limit: int | None  # documents per task, to try something out
    batch_size: int
    device: str
    dtype: str  # that the model computes in: float32 or float64


@dataclass(frozen=True)
class LoadedTask:
    task: Any  # the harness's task or group
    dataset: str  # of its first task, on the Hub


def require_harness(suite: str) -> None:
    """Raises ConfigError unless lm-evaluation-harness and what it needs for transformers are installed."""
    try:
        import accelerate  # noqa: F401, PLC0415 (optional, and takes seconds)
        import lm_eval  # noqa: F401, PLC0415
    except ImportError as error:
        raise ConfigError(
            f"suite={suite} needs lm-evaluation-harness ({error}); install it with "
            "`pip install 'kraken-train[eval]'`, or in a checkout with `pip install -c constraints.txt -e '.[eval]'`"
        ) from error


def run_suite(export: Export, suite: Suite, run: SuiteRun) -> SuiteResult:
    """Results of the suite's tasks on an export.

    Raises CheckpointError for an export that transformers cannot load, ConfigError for an unknown task, DataError for
    documents that are missing, not in the Hub's schema, or whose answers alone are longer than the model's context.
    """
    require_harness(suite.name)
    require_loadable(export)
    import lm_eval  # noqa: PLC0415 (optional, and takes seconds)

    with tempfile.TemporaryDirectory() as temporary:
        tasks, not_run = load_tasks(suite, run, run.task_dir or Path(temporary))
        if not tasks:
            raise DataError(f"suite={suite.name}: no task can be run: {describe(not_run)}")
        with counted_truncations() as truncations:
            try:
                found = lm_eval.simple_evaluate(
                    model="hf",
                    model_args={"pretrained": str(export.folder), "trust_remote_code": True, "dtype": run.dtype},
                    tasks=[loaded.task for loaded in tasks.values()],
                    batch_size=run.batch_size,
                    device=run.device,
                    limit=run.limit,
                    log_samples=False,
                )
            except AssertionError:  # which is what it says of an answer that does not fit the context
                require_answers_that_fit(export, tasks)
                raise
    if truncations:
        print(f"note: {len(truncations):,} requests were longer than the model's context and lost their beginning")
    source = "hub" if run.data_dir is None else "files"
    results = {name: task_result(name, suite.tasks[name], tasks[name], found, source) for name in tasks}
    return SuiteResult(suite.title, suite.average, results, not_run)


def require_loadable(export: Export) -> None:
    """Raises CheckpointError unless the export has what transformers needs."""
    for name in (MODELING_FILE.name, "tokenizer_config.json"):
        if not (export.folder / name).is_file():
            raise CheckpointError(
                f"{export.folder} has no {name}, without which transformers cannot load it; export the training "
                "checkpoint again, with its tokenizer"
            )


def require_answers_that_fit(export: Export, tasks: Mapping[str, LoadedTask]) -> None:
    """Raises DataError if a task has an answer of more tokens than the context."""
    tokenizer, context_length = export.load_tokenizer(), export.config.context_length
    for name, loaded in tasks.items():
        if getattr(loaded.task, "OUTPUT_TYPE", None) != "multiple_choice":
            continue
        answers = [answer for document in loaded.task.eval_docs for answer in loaded.task.doc_to_choice(document)]
        longest = max(map(len, tokenizer.encode_batch(answers)))
        if longest > context_length:
            raise DataError(
                f"{name} has an answer of {longest} tokens, but the model's context_length is {context_length}; choose "
                "other tasks=[...], or use a model with a longer context"
            )


@contextmanager
def counted_truncations() -> Iterator[list[str]]:
    """Collects the harness's warnings about requests that are too long, which are as many as these."""
    messages: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if text.startswith("Combined length of context"):
            messages.append(text)
            return False
        return True

    logger = logging.getLogger("lm_eval.models.huggingface")
    logger.addFilter(keep)
    try:
        yield messages
    finally:
        logger.removeFilter(keep)


# ---------------------------------------------------------------------------------------------------------------
# Tasks
# ---------------------------------------------------------------------------------------------------------------


def load_tasks(suite: Suite, run: SuiteRun, folder: Path) -> tuple[dict[str, LoadedTask], dict[str, str]]:
    """(the tasks that are run, why the others are not)."""
    from lm_eval.tasks import TaskManager  # noqa: PLC0415 (optional, and takes seconds)

    provide_squad_metrics()
    asked = list(suite.tasks) if run.tasks is None else run.tasks
    for name in asked:
        if name not in suite.tasks:
            raise ConfigError(
                f"tasks: {name} is not in suite={suite.name}{suggestion(name, tuple(suite.tasks))}; use some of "
                f"{', '.join(suite.tasks)}"
            )
    stock = manager = stock_tasks()
    for name in asked:
        if name not in stock.task_index:
            raise ConfigError(f"lm-eval {version('lm-eval')} has no task {name} of suite={suite.name}; install another")
    not_run = {name: "not asked for" for name in suite.tasks if name not in asked}
    if run.data_dir is not None:
        missing = write_definitions(suite, asked, run.data_dir, stock.task_index, folder)
        if missing and not run.skip_missing:
            raise DataError(
                f"suite_data={run.data_dir} lacks files: {describe(missing)}; add them, choose tasks=[...], or leave "
                "out what is missing with missing=skip"
            )
        not_run |= missing
        manager = TaskManager(include_path=str(folder), include_defaults=False)
    tasks = {}
    for name in suite.tasks:
        if name not in not_run:
            dataset = stock.task_index[members(name, stock.task_index)[0]].cfg["dataset_path"]
            tasks[name] = LoadedTask(load_task(name, manager, run.data_dir), dataset)
    return tasks, {name: not_run[name] for name in suite.tasks if name in not_run}


@functools.cache
def stock_tasks() -> Any:
    """The harness's own tasks; reading the definitions of all of them takes seconds."""
    from lm_eval.tasks import TaskManager  # noqa: PLC0415 (optional, and takes seconds)

    return TaskManager()


def members(name: str, index: Mapping[str, Any]) -> list[str]:
    """The tasks of a group, or the task itself."""
    return [str(member) for member in index[name].cfg["task"]] if index[name].kind.name == "GROUP" else [name]


def write_definitions(
    suite: Suite, asked: Sequence[str], data_dir: Path, index: Mapping[str, Any], folder: Path
) -> dict[str, str]:
    """Write offline definitions of the tasks whose files are there; returns what the others lack."""
    missing = {}
    for name in asked:
        stems = {m: suite.tasks[name].file or index[m].cfg.get("dataset_name") or m for m in members(name, index)}
        files = {member: file for member, stem in stems.items() if (file := find_file(data_dir, stem))}
        absent = [f"{stem}.jsonl" for member, stem in stems.items() if member not in files]
        if absent:
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            missing[name] = f"{absent[0]}{more} is not there"
            continue
        for member, file in files.items():
            write_task(folder, member, index[member].yaml_path, index[member].cfg, file)
        if name not in files:
            write_group(folder, name, index[name].yaml_path)
    return missing


def load_task(name: str, manager: Any, data_dir: Path | None) -> Any:
    """A task or group with its documents, the first of which has been tried. Raises DataError."""
    from datasets.exceptions import DatasetsError  # noqa: PLC0415 (takes seconds)
    from jinja2 import TemplateError  # noqa: PLC0415

    where = f"the Hub's data of {name}" if data_dir is None else f"the file of {name} in suite_data={data_dir}"
    try:
        loaded = manager.load([name])
        for task in loaded["tasks"].values():
            require_usable(task, where)
    except (DatasetsError, OSError, LookupError, TypeError, ValueError, TemplateError, StopIteration) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if data_dir is None:
            remedy = "the Hub must be reachable, or its cache hold the data; without, give suite_data=FOLDER"
        else:
            remedy = "it must be JSONL in the schema that the data set has on the Hub"
        raise DataError(f"{where} cannot be used ({type(error).__name__}: {reason}); {remedy}") from error
    return loaded["groups"].get(name) or loaded["tasks"][name]


def require_usable(task: Any, where: str) -> None:
    """Make the prompt of the first document. Raises DataError if there is none or the labels are left out."""
    documents = list(task.eval_docs)
    if not documents:
        raise DataError(f"{where} holds no documents; use the validation set")
    if any(document.get("label") == -1 for document in documents):
        raise DataError(f"{where} has documents with the label -1, as test sets have whose answers are secret; use the "
                        "validation set")  # fmt: skip
    task.doc_to_text(documents[0])
    task.doc_to_target(documents[0])
    if task.OUTPUT_TYPE == "multiple_choice":
        task.doc_to_choice(documents[0])


def describe(not_run: dict[str, str]) -> str:
    return ", ".join(f"{name} ({why})" for name, why in not_run.items())


# ---------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------


def task_result(name: str, task: SuiteTask, loaded: LoadedTask, found: Any, source: str) -> TaskResult:
    """From the harness's tables, whose keys are `metric,filter` and `metric_stderr,filter`."""
    scores = {}
    for key, value in found["results"][name].items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr"):
            continue
        error = found["results"][name].get(f"{metric}_stderr,{kind}")
        scores[metric] = Score(float(value), float(error) if isinstance(error, int | float) else None)
    parts = found["group_subtasks"].get(name) or [name]
    return TaskResult(
        scores=scores,
        metric=task.metric,
        benchmark_metrics=task.benchmark_metrics or [task.metric],
        documents=sum(found["n-samples"][member]["effective"] for member in parts),
        dataset=loaded.dataset,
        source=source,
        harness=f"lm-eval {version('lm-eval')}",
        version=str(found["versions"].get(name)),
        shots=found["n-shot"][parts[0]],
    )
