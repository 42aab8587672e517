"""Suites of tasks on a model that is in memory, for example one that is being trained.

All ranks go through the same tasks and requests, and share the answers. Nothing here draws a random number.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from data_prep.tokenizers import Tokenizer
from kraken_train.common.errors import ConfigError, DataError
from kraken_train.evaluation.likelihoods import Likelihood
from kraken_train.evaluation.results import SuiteResult
from kraken_train.evaluation.suites import TaskChoice, load_tasks, read_suite, require_harness, suite_result
from kraken_train.run.metrics import suite_key

if TYPE_CHECKING:
    from kraken_train.evaluation.harness_model import Answer

Item = TypeVar("Item")
SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")  # None leaves them as they are


class LiveSuites:
    """The tasks of some suites, loaded and ready. A name is that of a suite, or SUITE/TASK for one of its tasks.

    `limit` is the number of documents of a task, None for all. Raises ConfigError for an unknown suite or without
    lm-evaluation-harness, and DataError for documents that are missing or cannot be used with `context_length`: all
    is done once as `measure` does it, without a model.
    """

    def __init__(
        self, names: Sequence[str], data_dir: Path | None, limit: int | None, tokenizer: Tokenizer, context_length: int
    ) -> None:
        chosen = tasks_by_suite(names)
        self.suites = {name: read_suite(name) for name in chosen}
        require_harness(f"validation.suites=[{','.join(names)}]")
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self.choices = {name: TaskChoice(tasks, data_dir) for name, tasks in chosen.items()}
        self.limit = limit
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.folder = tempfile.TemporaryDirectory(prefix="kraken-suites-")  # definitions, as long as the tasks live
        self.tasks = {}
        for name, suite in self.suites.items():
            definitions = Path(self.folder.name) / name
            definitions.mkdir()
            with without_bars():
                self.tasks[name] = load_tasks(suite, self.choices[name], definitions)
        self.measure(lambda requests: [Likelihood(0.0, greedy=False)] * len(requests))

    def measure(self, answer: Answer) -> dict[str, SuiteResult]:
        """The results by name of the suite, with the likelihoods that `answer` gives to the requests of each.

        The harness gives them to the first rank of a machine (LOCAL_RANK) only; others get none.
        """
        import lm_eval  # noqa: PLC0415 (optional, and takes seconds)

        from kraken_train.evaluation.harness_model import HarnessModel  # noqa: PLC0415

        model = HarnessModel(answer, self.tokenizer, self.context_length)
        results = {}
        for name, suite in self.suites.items():
            tasks, not_run = self.tasks[name]
            try:
                with without_bars():
                    found = lm_eval.simple_evaluate(
                        model=model,
                        tasks=[loaded.task for loaded in tasks.values()],
                        limit=self.limit,
                        log_samples=False,
                        bootstrap_iters=0,
                        **dict.fromkeys(SEEDS),
                    )
            except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # of a document or a metric
                raise DataError(f"the documents of the suite {name} cannot be used: {error!r}") from error
            if found is not None:
                results[name] = suite_result(suite, self.choices[name], tasks, not_run, found)
        return results


def tasks_by_suite(names: Sequence[str]) -> dict[str, list[str] | None]:
    """The chosen tasks of each suite; None: all. Raises ConfigError for a suite that is named beside its tasks."""
    chosen: dict[str, list[str] | None] = {}
    for name in names:
        suite, slash, task = name.partition("/")
        tasks = chosen.setdefault(suite, [] if slash else None)
        if (tasks is None) == bool(slash):
            raise ConfigError(
                f"validation.suites={list(names)} has the suite {suite} and a task of it; name one of both"
            )
        if tasks is not None:
            tasks.append(task)
    return chosen


@contextmanager
def without_bars() -> Iterator[None]:
    """Without the progress bars of the harness and of its data sets, of which each rank would show its own."""
    import datasets  # noqa: PLC0415 (takes seconds)
    from lm_eval.api import model, task  # noqa: PLC0415 (optional, and takes seconds)

    def plain(items: Iterable[Item], **_: Any) -> Iterable[Item]:
        return items

    enabled, bars = datasets.is_progress_bar_enabled(), (model.tqdm, task.tqdm)
    datasets.disable_progress_bars()
    model.tqdm = task.tqdm = plain
    try:
        yield
    finally:
        model.tqdm, task.tqdm = bars
        if enabled:
            datasets.enable_progress_bars()


def scores_of(results: dict[str, SuiteResult]) -> dict[str, float]:
    """By the names of metrics.jsonl: the average of a suite whose tasks were all run, and the metric of each task."""
    scores = {}
    for name, result in results.items():
        if "paper" in result.averages and not result.not_run:
            scores[suite_key(name)] = result.averages["paper"].value
        scores |= {suite_key(task): found.scores[found.metric].value for task, found in result.tasks.items()}
    return scores
