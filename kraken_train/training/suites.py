"""Suites of tasks on the model that is being trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from data_prep.tokenizers import load_tokenizer
from kraken_train.common.errors import ConfigError
from kraken_train.evaluation.likelihoods import shared_likelihoods
from kraken_train.evaluation.live_suites import LiveSuites, scores_of
from kraken_train.model.language_model import LanguageModel
from kraken_train.parallel.mesh import ParallelMesh
from kraken_train.parallel.ranks import Runtime
from kraken_train.settings.validation import ValidationConfig
from kraken_train.training.metrics_logger import Record


def open_suites(config: ValidationConfig, tokenizer_dir: Path, context_length: int) -> LiveSuites | None:
    """`validation.suites`, ready to be measured; None where there are none.

    Raises ConfigError and DataError where they could not be measured, so that training does not begin.
    """
    if config.suites is None:
        return None
    folder = None if config.suite_data is None else Path(config.suite_data).expanduser()
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"validation.suite_data={folder} is not a folder")
    return LiveSuites(config.suites, folder, config.suite_limit, load_tokenizer(tokenizer_dir), context_length)


def measure_suites(
    suites: LiveSuites,
    model: LanguageModel,
    batch_size: int,
    mesh: ParallelMesh,
    runtime: Runtime,
    progress: Callable[[], None],
) -> Record:
    """The scores for metrics.jsonl, of the weights as they are. A collective: the model copies share the requests.

    `progress` is called after each batch. As after its export, the model sees whole requests as one document.
    """
    share = mesh.data_rank, mesh.data_size
    end_of_document, model.end_of_document = model.end_of_document, None
    try:
        results = suites.measure(
            lambda requests: shared_likelihoods(model, requests, batch_size, share, runtime, progress)
        )
    finally:
        model.end_of_document = end_of_document
    return {**scores_of(results)}
