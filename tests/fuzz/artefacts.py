"""Small valid folders of each kind, made by our own commands or by the program that we read from."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import zstandard
from forked import REPOSITORY
from helpers import MODERN, TEXTS, rough_model, save_tokenizer, small_configs, small_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from checkpoints.exports.checksums import SUMS_FILE
from checkpoints.exports.folder import write_export
from checkpoints.training.manifest import content_sha256
from data_prep.files import SUFFIXES
from data_prep.gpt2_ranks import NUM_RANKS
from data_prep.indexed import ShardWriter, bin_path, idx_path
from data_prep.manifest import MANIFEST_NAME, _parse, probe_sha256
from data_prep.tokenizers import GPT2Tokenizer, HuggingFaceTokenizer
from kraken_train.common.files import file_sha256, is_plain_name
from kraken_train.evaluation.results import Score, SuiteResult, TaskResult, record_results
from kraken_train.model.config import GPTConfig, ModelConfig

WRITTEN = REPOSITORY / "tests" / "artefacts" / "written_by_9a2225f"
PERPLEXITY = {
    "data_fingerprint": "9879375ef90c4149f62f61c9740dc237", "split": "validation", "mode": "blocks", "stride": 32,
    "dtype": "fp32", "loss": 3.1, "perplexity": 22.2, "bits_per_byte": 1.9, "tokens": 2000,
}  # fmt: skip


def checkpoint(folder: Path) -> None:
    shutil.copytree(WRITTEN / "run", folder)


def export(folder: Path) -> None:
    config = small_configs(320)["kraken-gqa"]
    write_model(folder, config)
    task = TaskResult({"acc": Score(0.5, 0.1), "f1": Score(0.4)}, "acc", ["acc", "f1"], 90, "copa", "hub", "x", "1", 0)
    suite = SuiteResult("Suite", "mean", {"copa": task}, {"rte": "no file"})
    record_results(folder, PERPLEXITY, {"suite": suite})


def write_model(folder: Path, config: ModelConfig, native: bool = False, with_tokenizer: bool = True) -> None:
    """Without a tokenizer it is read much faster."""
    tokenizer = save_tokenizer(small_tokenizer(), folder.with_name("tokenizer of it")) if with_tokenizer else None
    weights = rough_model(config, torch.float32).state_dict()
    write_export(
        folder, config, weights, tokenizer_dir=tokenizer, metadata={"step": 7, "tokens": 900}, dtype=torch.float32,
        native=native,
    )  # fmt: skip


def transformers(folder: Path) -> None:
    """An export as transformers saves it again, in two files with an index."""
    write_model(folder, small_configs(320)["kraken"], with_tokenizer=False)
    description = json.loads((folder / "config.json").read_text())
    more = {"transformers_version": "5.23.0", "tie_word_embeddings": True, "head_dim": 8}
    (folder / "config.json").write_text(json.dumps(description | more))
    divide(folder)


def divide(folder: Path) -> None:
    """The weights in two files with an index, as large models have them."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {}
    for number, names in enumerate((list(weights)[::2], list(weights)[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in names}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def llama(folder: Path) -> None:
    sizes = {"num_layers": 2, "hidden_size": 24, "num_heads": 4, "vocab_size": 320, "context_length": 24}
    write_model(folder, GPTConfig(**sizes, ffn_hidden_size=40, **{**MODERN, "qk_norm": False}), native=True)


def qwen3(folder: Path) -> None:
    write_model(folder, small_configs(320)["standard-modern"], native=True, with_tokenizer=False)
    divide(folder)


def reference(folder: Path) -> None:
    """A file like those of the authors' training script."""
    golden = load_file(REPOSITORY / "tests" / "artefacts" / "kraken_4way.safetensors")
    weights = {f"_orig_mod.{n.removeprefix('weight/')}": t for n, t in golden.items() if n.startswith("weight/")}
    arguments = {
        "n_layer": 3, "n_head": 12, "n_embd": 24, "block_size": 32, "bias": False, "vocab_size": 96,
        "n_heads_in_split": 3, "ffn_expansion": 2,
    }  # fmt: skip
    folder.mkdir()
    torch.save({"model": weights, "model_args": arguments, "iter_num": 300}, folder / "ckpt.pt")


def data(folder: Path) -> None:
    shutil.copytree(WRITTEN / "data", folder)


def megatron(folder: Path) -> None:
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(small_tokenizer().model)  # type: ignore[attr-defined]
    for name in ("part", "valid"):
        with ShardWriter(folder / name, np.dtype("<u2")) as writer:
            for number in range(8):
                writer.append(np.arange(3 + number, 20 + 2 * number))


def nanogpt(folder: Path) -> None:
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(small_tokenizer().model)  # type: ignore[attr-defined]
    for name in ("train.bin", "val.bin"):
        (np.arange(900) % 300).astype("<u2").tofile(folder / name)


def sentencepiece(folder: Path) -> None:
    save_tokenizer(small_tokenizer(), folder)


def huggingface_backend() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def huggingface(folder: Path) -> None:
    save_tokenizer(HuggingFaceTokenizer(huggingface_backend().to_str(), "<|endoftext|>", "test"), folder)


def huggingface_by_path(folder: Path) -> None:
    folder.mkdir()
    (folder / "tokenizer.json").write_text(huggingface_backend().to_str(), encoding="utf-8")
    settings = {"eos_token": {"content": "<|endoftext|>"}, "model_max_length": 10**30}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def gpt2(folder: Path) -> None:
    """As many ranks as GPT-2 has: the bytes, then pairs of bytes."""
    tokens = [bytes([i]) for i in range(256)] + [bytes([i, j]) for i in range(256) for j in range(256)]
    save_tokenizer(GPT2Tokenizer({token: rank for rank, token in enumerate(tokens[:NUM_RANKS])}), folder)


def sources(folder: Path) -> None:
    folder.mkdir()
    texts = [f"{number}: {text}" for number in range(20) for text in TEXTS]
    lines = "".join(json.dumps({"text": text, "id": i, "meta": {"a": [1]}}) + "\n" for i, text in enumerate(texts))
    (folder / "a.txt").write_text(texts[0])
    (folder / "b.jsonl").write_text(lines)
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "d.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))
    pq.write_table(pa.table({"text": texts, "id": range(len(texts))}), folder / "e.parquet")
    assert {path.name[1:] for path in folder.iterdir()} == set(SUFFIXES)


def run(folder: Path) -> None:
    """With more events than the run of the earlier commit had."""
    shutil.copytree(WRITTEN / "run", folder)
    errors = folder / "starts" / "0001" / "errors"
    errors.mkdir()
    error = {
        "time": "2026-01-31T23:59:59.123+00:00", "rank": 0, "host": "a", "pid": 3, "message": "m", "traceback": None,
        "follows": False, "restart_helps": True,
    }  # fmt: skip
    (errors / "rank-0000.json").write_text(json.dumps(error))
    more = [
        {"event": "submitted", "job": 7}, {"event": "allocated", "job": 7, "requeues": 0, "nodes": ["a"]},
        {"event": "skipped", "step": 3}, {"event": "straggler", "step": 3, "rank": 1, "host": "a", "factor": 2.0},
        {"event": "rolled_back", "step": 90, "to_step": 80, "reason": "r", "skipped_samples": 8},
        {"event": "tracking", "note": "n"}, {"event": "requeued", "job": 7, "reason": "r"},
        {"event": "started", "start": 1, "step": 0, "world_size": 1, "last_step": 100, "last_tokens": 9000},
        {"event": "ended", "start": 1, "step": 100, "outcome": "failed", "reason": "r"},
    ]  # fmt: skip
    with (folder / "events.jsonl").open("a") as file:
        file.writelines(json.dumps({"time": error["time"], **event}) + "\n" for event in more)


def command(folder: Path) -> None:
    folder.mkdir()
    arguments = [
        "run_dir=RUN", "data_dir={a: 0.5, b: 0.5}", "model=kraken-tiny-2way", "model.num_layers=2", "max_steps=100",
        "global_batch_size=8", "micro_batch_size=8", "optim.lr=3e-2", "schedule.warmup_steps=2", "tracking.mode=off",
        "validation.sets={a: b}", "checkpoint.every_tokens=2B", "profile.steps=[1,2]", "seed=7", "ema_decay=0.9",
        "precision=fp32", "engine.zero_stage=1", "loss.z_loss=0", "parallel.vocab_parallel=null",
    ]  # fmt: skip
    (folder / "arguments.json").write_text(json.dumps(arguments))


ARTEFACTS: dict[str, Callable[[Path], None]] = {
    "checkpoint": checkpoint,
    "export": export,
    "transformers": transformers,
    "llama": llama,
    "qwen3": qwen3,
    "reference": reference,
    "data": data,
    "megatron": megatron,
    "nanogpt": nanogpt,
    "sentencepiece": sentencepiece,
    "huggingface": huggingface,
    "gpt2": gpt2,
    "sentencepiece by path": sentencepiece,
    "huggingface by path": huggingface_by_path,
    "sources": sources,
    "run": run,
    "command": command,
}


# ---------------------------------------------------------------------------------------------------------------
# Checksums, as a stranger who means harm would write them
# ---------------------------------------------------------------------------------------------------------------


def sign(folder: Path) -> None:
    """Make the checksums of a damaged folder right again, where what holds them can still be read."""
    for path in folder.rglob("manifest.json"):
        if path.is_symlink() or not path.is_file():  # a pipe would be waited for, and a link may lead elsewhere
            continue
        try:
            manifest = json.loads(path.read_bytes())
            if "content" in manifest:
                sign_checkpoint(path, manifest)
            else:
                sign_data(path, manifest)
        except Exception:  # of any kind: it is damaged in a way that leaves nothing to sign
            continue
    sums = folder / SUMS_FILE
    if sums.is_file() and not sums.is_symlink():
        sign_export(sums)


def sign_export(sums: Path) -> None:
    lines = []
    for line in sums.read_bytes().splitlines():
        digest, _, name = line.decode("utf-8", "surrogateescape").partition("  ")
        file = sums.with_name(name) if is_plain_name(name) else None
        if file is not None and file.is_file() and file.stat().st_size < 1 << 24:
            digest = file_sha256(file)
        lines.append(f"{digest}  {name}\n".encode("utf-8", "surrogateescape"))
    sums.write_bytes(b"".join(lines))


def sign_checkpoint(path: Path, manifest: dict) -> None:
    content = manifest["content"]
    for name, entry in content["files"].items():
        file = path.parent / name
        if file.is_file() and file.stat().st_size < 1 << 24:
            entry |= {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
    path.write_text(json.dumps({"content": content, "sha256": content_sha256(content)}), encoding="utf-8")


def sign_data(path: Path, manifest: dict) -> None:
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            prefix = path.parent / shard["name"]
            with_file = {"bin_sha256": bin_path(prefix), "idx_sha256": idx_path(prefix)}
            shard |= {name: file_sha256(file) for name, file in with_file.items() if file.is_file()}
            if bin_path(prefix).is_file():
                shard |= {
                    "bin_bytes": bin_path(prefix).stat().st_size,
                    "bin_probe_sha256": probe_sha256(bin_path(prefix)),
                }
    files = manifest["tokenizer"]["files"]
    for name in files:
        if (path.parent / "tokenizer" / name).is_file():
            files[name] = file_sha256(path.parent / "tokenizer" / name)
    manifest["fingerprint"] = _parse(manifest).fingerprint
    (path.parent / MANIFEST_NAME).write_text(json.dumps(manifest))
