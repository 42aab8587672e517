"""Runs suites of tasks with lm-evaluation-harness on an export, which transformers loads.

It runs `lm_eval --model hf --model_args pretrained=EXPORT,dtype=float32` through its Python interface, with the model
code of this program in place of the file in the export, which is not run; the harness is an optional dependency (the
extra `eval`). The model computes in float32 even if the export is stored in bf16: the harness sums log-probabilities in
the model's dtype, so in bf16 many answers would become equally likely by rounding, and the rounding would depend on the
batch size.
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

import yaml

from checkpoints.exports.folder import MODELING_FILE, Export
from kraken_train.common.cli import CONF_DIR
from kraken_train.common.errors import CheckpointError, ConfigError, DataError
from kraken_train.common.settings import from_dict
from kraken_train.common.validation import require_choice, suggestion
from kraken_train.evaluation.offline import find_file, write_group, write_task
from kraken_train.evaluation.results import Score, SuiteResult, TaskResult
from kraken_train.evaluation.squad import provide_squad_metrics


@dataclass(frozen=True)
class SuiteTask:
    """See conf/suite/."""

    metric: str  # the harness's name of the metric that the paper reports
    benchmark_metrics: list[str] | None = None  # their mean is the benchmark's own score; None: only `metric`
    file: str | None = None  # name of its JSONL file without the ending; None: the data set's configuration name


@dataclass(frozen=True)
class Suite:
    """See conf/suite/."""

    name: str
    title: str
    average: str | None  # describes the averaged metrics; None: no average
    tasks: dict[str, SuiteTask]  # by name in the harness


@dataclass(frozen=True)
class TaskChoice:
    """Which tasks of a suite are run, and on which documents."""

    names: list[str] | None = None  # None: all
    data_dir: Path | None = None  # folder of JSONL files; None: from the Hub
    skip_missing: bool = False  # skip tasks whose file is missing


@dataclass(frozen=True)
class SuiteRun:
    """How the tasks are run."""

    tasks: TaskChoice
    task_dir: Path | None  # where definitions of offline tasks are kept, for the harness's own command
    limit: int | None  # documents per task, for trials
    batch_size: int
    device: str
    dtype: str  # in which the model computes: float32 or float64


@dataclass(frozen=True)
class LoadedTask:
    task: Any  # the harness's task or group
    dataset: str  # name of its (first task's) data set on the Hub


def read_suite(name: str) -> Suite:
    """A file of conf/suite. Raises ConfigError for an unknown name."""
    names = tuple(sorted(path.stem for path in (CONF_DIR / "suite").glob("*.yaml")))
    require_choice("suite", name, names)
    return from_dict(yaml.safe_load((CONF_DIR / "suite" / f"{name}.yaml").read_text(encoding="utf-8")), Suite)


def require_harness(setting: str) -> None:
    """Raises ConfigError, which names the `setting`, unless lm-evaluation-harness and accelerate are installed."""
    try:
        import accelerate  # noqa: F401, PLC0415 (optional, and takes seconds)
        import lm_eval  # noqa: F401, PLC0415
    except ImportError as error:
        raise ConfigError(
            f"{setting} needs lm-evaluation-harness ({error}); install it with "
            "`pip install 'kraken-train[eval]'`, or in a checkout with `pip install -c constraints.txt -e '.[eval]'`"
        ) from error


def run_suite(export: Export, suite: Suite, run: SuiteRun) -> SuiteResult:
    """Run the suite's tasks on an export.

    Raises CheckpointError if transformers cannot load the export, ConfigError for an unknown task, and DataError if
    documents are missing or not in the Hub's schema, or if an answer alone is longer than the model's context.
    """
    require_harness(f"suite={suite.name}")
    require_loadable(export)
    register_own_model()
    import lm_eval  # noqa: PLC0415 (optional, and takes seconds)

    with tempfile.TemporaryDirectory() as temporary:
        tasks, not_run = load_tasks(suite, run.tasks, run.task_dir or Path(temporary))
        if not tasks:
            raise DataError(f"suite={suite.name}: no task can be run: {describe(not_run)}")
        with counted_truncations() as truncations:
            try:
                found = lm_eval.simple_evaluate(
                    model="hf",
                    model_args={"pretrained": str(export.folder), "trust_remote_code": False, "dtype": run.dtype},
                    tasks=[loaded.task for loaded in tasks.values()],
                    batch_size=run.batch_size,
                    device=run.device,
                    limit=run.limit,
                    log_samples=False,
                )
            except AssertionError:  # the harness raises it if an answer does not fit into the context
                require_answers_that_fit(export, tasks)
                raise
    if truncations:
        print(
            f"note: {len(truncations):,} requests were longer than the model's context and were cut at their beginning"
        )
    return suite_result(suite, run.tasks, tasks, not_run, found)


def require_loadable(export: Export) -> None:
    """Raises CheckpointError unless the export has the files that transformers needs."""
    for name in (MODELING_FILE.name, "tokenizer_config.json"):
        if not (export.folder / name).is_file():
            raise CheckpointError(
                f"{export.folder} has no {name}, which transformers needs to load it; export the training "
                "checkpoint again, with its tokenizer"
            )


def register_own_model() -> None:
    """Make transformers load exports with the code of this program: that in a stranger's export may do anything."""
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415 (takes seconds)

    from checkpoints.exports.modeling_kraken import KrakenForCausalLM  # noqa: PLC0415

    config_class = KrakenForCausalLM.config_class
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, KrakenForCausalLM, exist_ok=True)


def require_answers_that_fit(export: Export, tasks: Mapping[str, LoadedTask]) -> None:
    """Raises DataError if a task has an answer with more tokens than the context."""
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
    """Collects the harness's warnings about requests that are too long; there is one per request."""
    messages: list[str] = []

    def collect(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if text.startswith("Combined length of context"):
            messages.append(text)
            return False
        return True

    logger = logging.getLogger("lm_eval.models.huggingface")
    logger.addFilter(collect)
    try:
        yield messages
    finally:
        logger.removeFilter(collect)


# ---------------------------------------------------------------------------------------------------------------
# Tasks
# ---------------------------------------------------------------------------------------------------------------


def load_tasks(suite: Suite, choice: TaskChoice, folder: Path) -> tuple[dict[str, LoadedTask], dict[str, str]]:
    """(the tasks to run, the reason for each task that is not run); definitions of offline tasks go into `folder`."""
    from lm_eval.tasks import TaskManager  # noqa: PLC0415 (optional, and takes seconds)

    provide_squad_metrics()
    selected = list(suite.tasks) if choice.names is None else choice.names
    for name in selected:
        if name not in suite.tasks:
            raise ConfigError(
                f"tasks: {name} is not in suite={suite.name}{suggestion(name, tuple(suite.tasks))}; use some of "
                f"{', '.join(suite.tasks)}"
            )
    stock = manager = stock_tasks()
    for name in selected:
        if name not in stock.task_index:
            raise ConfigError(f"lm-eval {version('lm-eval')} has no task {name} of suite={suite.name}; install another")
    not_run = {name: "not selected" for name in suite.tasks if name not in selected}
    if choice.data_dir is not None:
        missing = write_definitions(suite, selected, choice.data_dir, stock.task_index, folder)
        if missing and not choice.skip_missing:
            raise DataError(
                f"suite_data={choice.data_dir} lacks files: {describe(missing)}; add them, choose tasks=[...], or skip "
                "these tasks with missing=skip"
            )
        not_run |= missing
        manager = TaskManager(include_path=str(folder), include_defaults=False)
    tasks = {}
    for name in suite.tasks:
        if name not in not_run:
            dataset = stock.task_index[members(name, stock.task_index)[0]].cfg["dataset_path"]
            tasks[name] = LoadedTask(load_task(name, manager, choice.data_dir), dataset)
    return tasks, {name: not_run[name] for name in suite.tasks if name in not_run}


@functools.cache
def stock_tasks() -> Any:
    """The harness's own tasks. Cached, because reading all definitions takes seconds."""
    from lm_eval.tasks import TaskManager  # noqa: PLC0415 (optional, and takes seconds)

    return TaskManager()


def members(name: str, index: Mapping[str, Any]) -> list[str]:
    """The tasks of a group, or the task itself."""
    return [str(member) for member in index[name].cfg["task"]] if index[name].kind.name == "GROUP" else [name]


def write_definitions(
    suite: Suite, selected: Sequence[str], data_dir: Path, index: Mapping[str, Any], folder: Path
) -> dict[str, str]:
    """Write offline definitions of the tasks whose files exist; the missing files of each other task."""
    missing = {}
    for name in selected:
        stems = {m: suite.tasks[name].file or index[m].cfg.get("dataset_name") or m for m in members(name, index)}
        files = {member: file for member, stem in stems.items() if (file := find_file(data_dir, stem))}
        absent_files = [f"{stem}.jsonl" for member, stem in stems.items() if member not in files]
        if absent_files:
            more = f" and {len(absent_files) - 1} more" if len(absent_files) > 1 else ""
            missing[name] = f"{absent_files[0]}{more} missing"
            continue
        for member, file in files.items():
            write_task(folder, member, index[member].yaml_path, index[member].cfg, file)
        if name not in files:
            write_group(folder, name, index[name].yaml_path)
    return missing


def load_task(name: str, manager: Any, data_dir: Path | None) -> Any:
    """A task or group with its documents, after a check of the first one. Raises DataError."""
    from datasets.exceptions import DatasetsError  # noqa: PLC0415 (takes seconds)
    from jinja2 import TemplateError  # noqa: PLC0415

    source = f"the Hub's data of {name}" if data_dir is None else f"the file of {name} in suite_data={data_dir}"
    try:
        loaded = manager.load([name])
        for task in loaded["tasks"].values():
            require_usable(task, source)
    except (DatasetsError, OSError, LookupError, TypeError, ValueError, TemplateError, StopIteration) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if data_dir is None:
            remedy = "make the Hub or a cache with the data available, or give suite_data=FOLDER"
        else:
            remedy = "it must be JSONL in the schema of the data set on the Hub"
        raise DataError(f"{source} cannot be used ({type(error).__name__}: {reason}); {remedy}") from error
    return loaded["groups"].get(name) or loaded["tasks"][name]


def require_usable(task: Any, source: str) -> None:
    """Make the prompt of the first document. Raises DataError if there are no documents or no labels."""
    documents = list(task.eval_docs)
    if not documents:
        raise DataError(f"{source} holds no documents; use the validation set")
    if any(document.get("label") == -1 for document in documents):
        raise DataError(f"{source} has documents with the label -1, as test sets with secret answers have; use the "
                        "validation set")  # fmt: skip
    task.doc_to_text(documents[0])
    task.doc_to_target(documents[0])
    if task.OUTPUT_TYPE == "multiple_choice":
        task.doc_to_choice(documents[0])


def describe(not_run: dict[str, str]) -> str:
    return ", ".join(f"{name} ({reason})" for name, reason in not_run.items())


# ---------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------


def suite_result(
    suite: Suite, choice: TaskChoice, tasks: Mapping[str, LoadedTask], not_run: dict[str, str], found: Any
) -> SuiteResult:
    """The results of a suite out of what the harness has `found`."""
    source = "hub" if choice.data_dir is None else "files"
    results = {name: task_result(name, suite.tasks[name], tasks[name], found, source) for name in tasks}
    return SuiteResult(suite.title, suite.average, results, not_run)


def task_result(name: str, task: SuiteTask, loaded: LoadedTask, found: Any, source: str) -> TaskResult:
    """A result out of the harness's tables, whose keys are `metric,filter` and `metric_stderr,filter`."""
    scores = {}
    for key, value in found["results"][name].items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or metric.endswith("_stderr"):
            continue
        error = found["results"][name].get(f"{metric}_stderr,{filter_name}")
        scores[metric] = Score(float(value), float(error) if isinstance(error, int | float) else None)
    subtasks = found["group_subtasks"].get(name) or [name]
    return TaskResult(
        scores=scores,
        metric=task.metric,
        benchmark_metrics=task.benchmark_metrics or [task.metric],
        documents=sum(found["n-samples"][member]["effective"] for member in subtasks),
        dataset=loaded.dataset,
        source=source,
        harness=f"lm-eval {version('lm-eval')}",
        version=str(found["versions"].get(name)),
        shots=found["n-shot"][subtasks[0]],
    )
