"""What reads files that may come from strangers. Each reader goes through all that a command does with such a folder.

It returns a digest of what it has read, for those kinds of files that have checksums.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from helpers import TEXTS
from worker import digest

from checkpoints import import_reference, import_transformers, push
from checkpoints import inspect as inspect_checkpoint
from checkpoints.exports.folder import read_export
from checkpoints.exports.transformers_tokenizer import convert
from checkpoints.training.manifest import find_complete_checkpoint
from checkpoints.training.store import read_weights
from data_prep import foreign, merge, verify
from data_prep import inspect as inspect_data
from data_prep.documents import BadRecords, Part
from data_prep.files import FilesSource
from data_prep.manifest import load_manifest
from data_prep.recovery import Recovery
from data_prep.tokenizers import Tokenizer, TokenizerSettings, build_tokenizer, load_tokenizer
from kraken_train import status
from kraken_train.common.cli import compose_command
from kraken_train.common.errors import KrakenError
from kraken_train.common.parsing import parse_json
from kraken_train.config import TrainConfig
from kraken_train.data.dataset import TrainingData
from kraken_train.evaluation.results import markdown, read_results, record_results, suite_rows
from kraken_train.inference.loading import load_part, share_model
from kraken_train.parallel.communicator import LocalCommunicator
from kraken_train.reporting import comparison
from kraken_train.run.logs import logs_of, merged
from kraken_train.run.metrics import read_run
from kraken_train.run.state import read_state
from kraken_train.tracking.run_info import read_run_info
from kraken_train.tracking.tail import Tail
from kraken_train.training import open_run, resume


def read_checkpoint(folder: Path) -> str:
    """A run: its checkpoint is described, exported, and continued."""
    find_complete_checkpoint(folder / "checkpoints")
    trained = read_weights(folder)
    inspect_checkpoint.inspect(folder)
    for read in (continue_run, read_average):
        with contextlib.suppress(KrakenError):
            read(folder)
    return digest(*(name.encode() + tensor.numpy().tobytes() for name, tensor in sorted(trained.weights.items())))


def continue_run(folder: Path) -> None:
    settings = [f"run_dir={folder}", "data_dir=DATA", "model=kraken-tiny-2way", "max_steps=200"]
    config = compose_command(settings, TrainConfig, "train")
    trained = read_weights(folder)
    fingerprint = "9879375ef90c4149f62f61c9740dc237"
    open_run.check_run_folder(config, trained.model_config, fingerprint)
    identity = open_run.identity_of_checkpoints(folder / "checkpoints")
    assert identity is not None
    run = open_run.RunFolder(folder, identity["id"], resuming=True)
    runtime = resume.Runtime(rank=0, local_rank=0, world_size=1, local_world_size=1)
    resume.find_checkpoint_to_resume(run, config, trained.model_config, fingerprint, runtime, print)


def read_average(folder: Path) -> None:
    read_weights(folder, step=100, prefix="optimizer.ema.")


def read_export_folder(folder: Path) -> str:
    """An export: loaded whole and in part, used, and got ready for an upload."""
    export = read_export(folder)
    model = export.load_model()
    model(torch.arange(4)[None] % export.config.vocab_size)
    units = share_model(export.config, [1.0])[0]
    load_part(export, units, LocalCommunicator(), torch.float32, torch.device("cpu"))
    use_tokenizer(export.load_tokenizer())
    push.complete_export(folder)
    read_evaluation(folder)
    return ""


def read_evaluation(folder: Path) -> str:
    results = read_results(folder)
    markdown(results)
    for suite in results.suites.values():
        suite_rows(suite)
    compare(folder)
    record_results(folder, perplexity=dict(results.perplexity[0]) if results.perplexity else None)
    return ""


def read_transformers(folder: Path) -> str:
    """A folder that transformers has saved."""
    output = folder.parent / "imported"
    import_transformers.import_transformers(import_transformers.ImportConfig(str(folder), str(output), None, "fp32"))
    read_export(output).load_model()
    return ""


def read_reference(folder: Path) -> str:
    output = folder.parent / "imported"
    import_reference.import_reference(import_reference.ImportConfig(str(folder / "ckpt.pt"), str(output), None, None))
    return ""


def read_data(folder: Path) -> str:
    """Prepared data: verified, described, trained on, merged."""
    verify.verify(folder)
    inspect_data.describe(load_manifest(folder))
    for name, split in load_manifest(folder).splits.items():
        lengths = inspect_data.document_lengths(folder, split)
        inspect_data.describe_split(name, split, lengths)
        inspect_data.text_histogram(lengths)
    data = TrainingData({folder: 1})
    samples = data.samples(16, seed=0)
    samples.batch(range(3))
    data.require_ends_of_documents()
    with contextlib.suppress(KrakenError):
        merge.merge([folder], folder.parent / "merged")
    return digest(*(np.ascontiguousarray(shard).tobytes() for shard in samples.stream.shards))


def read_megatron(folder: Path) -> str:
    return read_foreign(folder, "megatron")


def read_nanogpt(folder: Path) -> str:
    return read_foreign(folder, "nanogpt")


def read_foreign(folder: Path, form: str) -> str:
    settings = TokenizerSettings(kind="sentencepiece_model", path=str(folder / "tokenizer.model"))
    output = folder.parent / "accepted"
    foreign.accept(foreign.ForeignConfig(source=str(folder), format=form, output_dir=str(output), tokenizer=settings))
    verify.verify(output)
    return ""


def read_saved_tokenizer(folder: Path) -> str:
    use_tokenizer(load_tokenizer(folder))
    return ""


def read_tokenizer_by_path(folder: Path) -> str:
    kind, path = ("huggingface", folder) if (folder / "tokenizer.json").exists() else (
        "sentencepiece_model", folder / "tokenizer.model"
    )  # fmt: skip
    use_tokenizer(build_tokenizer(TokenizerSettings(kind=kind, path=str(path)), lambda: iter(())))
    return ""


def use_tokenizer(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        ids = list(tokenizer.encode_batch([text])[0])
        tokenizer.decode(ids)
        tokenizer.normalized(text)
    tokenizer.decode(range(min(tokenizer.vocab_size, 300)))
    Recovery(tokenizer).text_of([0, 1, 2])
    with contextlib.suppress(KrakenError):
        convert(tokenizer)


def read_sources(folder: Path) -> str:
    """Documents of each file, in whole and in part; records that are none may be left out or end it."""
    for rule in ("skip", "fail"):
        for file in sorted(folder.iterdir()):
            with contextlib.suppress(KrakenError):
                source = FilesSource(file, "text")
                for _ in source.documents(BadRecords(rule)):
                    pass
    source = FilesSource(folder, "text")
    source.identity()
    for _, block in source.blocks(part=Part(2, 3)):
        list(block.records(BadRecords("skip")))
    return ""


def read_run_records(folder: Path) -> str:
    """What a run has recorded: its state, its curves, its settings."""
    for read in (read_states, read_curves, read_logs, read_tracked):
        with contextlib.suppress(KrakenError):
            read(folder)
    return ""


def read_states(folder: Path) -> None:
    with cli_errors():
        print_state(folder)


@contextlib.contextmanager
def cli_errors() -> Iterator[None]:
    """What the system refuses is a message too in commands without Hydra (`kraken_train.common.cli.user_errors`)."""
    try:
        yield
    except OSError as error:
        raise KrakenError(f"{error.filename2 or error.filename} cannot be read or written") from error


def print_state(folder: Path) -> None:
    state = read_state(folder)
    for as_json in (True, False):
        status.print_states([state], as_json, verify=False)
    status.print_states([state, state], as_json=False, verify=False)


def read_curves(folder: Path) -> None:
    run = read_run(folder)
    for name in ("loss", "lr", "grad_norm", "tokens_per_second", "validation_loss"):
        run.series(name)
    compare(folder)


def compare(folder: Path) -> None:
    """All that a report says, without its picture, which takes a second."""
    entries = [comparison.read_entry(folder)]
    comparison.rows(entries)
    for suite in comparison.compare_suites(entries).values():
        comparison.suite_table(suite)
    comparison.notes(entries)
    comparison.to_json(entries)


def read_logs(folder: Path) -> None:
    with cli_errors():
        list(merged(logs_of(folder, None), 20))


def read_tracked(folder: Path) -> None:
    info = read_run_info(folder)
    json.dumps({"settings": info.settings, "facts": info.facts}, default=str)
    for name in ("metrics.jsonl", "events.jsonl"):
        list(Tail(folder / name).read())


def read_command(folder: Path) -> str:
    """The command line of a training, as Hydra composes it."""
    try:
        arguments = parse_json((folder / "arguments.json").read_bytes())
    except ValueError as error:
        raise KrakenError("no arguments") from error
    if not isinstance(arguments, list):
        raise KrakenError("no arguments")
    compose_command([str(argument) for argument in arguments], TrainConfig, "train")
    return ""


READERS = {
    "checkpoint": read_checkpoint,
    "export": read_export_folder,
    "transformers": read_transformers,
    "llama": read_transformers,
    "qwen3": read_transformers,
    "reference": read_reference,
    "data": read_data,
    "megatron": read_megatron,
    "nanogpt": read_nanogpt,
    "sentencepiece": read_saved_tokenizer,
    "huggingface": read_saved_tokenizer,
    "gpt2": read_saved_tokenizer,
    "sentencepiece by path": read_tokenizer_by_path,
    "huggingface by path": read_tokenizer_by_path,
    "sources": read_sources,
    "run": read_run_records,
    "command": read_command,
}


def clear_outputs(folder: Path) -> None:
    """Remove what readers have written beside the folder."""
    for path in folder.parent.iterdir():
        if path != folder:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
