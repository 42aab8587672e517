"""Small models, tokenizers and exports, and functions that run commands and ranks, for all tests."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from unittest import mock

import numpy as np
import torch
from forked import REPOSITORY, run_forked

from checkpoints.exports.folder import write_export
from data_prep.tokenizers import Tokenizer, TokenizerSettings, build_tokenizer
from kraken_train.model.config import GPTConfig, KrakenConfig, ModelConfig
from kraken_train.model.fal_config import FALConfig
from kraken_train.model.ladder_config import LadderConfig
from kraken_train.model.language_model import LanguageModel
from kraken_train.model.registry import build_model
from kraken_train.model.track_config import TrackConfig
from kraken_train.parallel.ranks import free_port

PATIENCE = 900.0  # seconds; only a wait that hangs takes so long, even on the slowest machine
Result = TypeVar("Result")
TEXTS = [
    "The river bends where the old mill stood, and the wheel has long been still.",
    "Once upon a time a kraken slept below the ice; nobody had woken it.",
    "Numbers such as 3.14159, 2.71828 and 42 appear (sometimes) in the text!",
]


MODERN = {"norm": "rmsnorm", "ffn": "swiglu", "positions": "rope", "rope_theta": 500.0, "qk_norm": True}


def small_configs(vocab_size: int = 96, context_length: int = 24) -> dict[str, ModelConfig]:
    """A model of each architecture, some with grouped-query and multi-query attention, and some with today's recipe."""
    common = {"vocab_size": vocab_size, "context_length": context_length, "num_layers": 3}
    return {
        "kraken": KrakenConfig(num_sub_layers=3, hidden_size=16, heads_per_sub_layer=2, **common),
        "standard": GPTConfig(hidden_size=24, num_heads=3, **common),
        "parallel": GPTConfig(hidden_size=24, num_heads=3, architecture="parallel", **common),
        "kraken-gqa": KrakenConfig(3, hidden_size=32, heads_per_sub_layer=4, kv_heads_per_sub_layer=2, **common),
        "kraken-mqa": KrakenConfig(3, hidden_size=16, heads_per_sub_layer=2, kv_heads_per_sub_layer=1, **common),
        "standard-gqa": GPTConfig(hidden_size=24, num_heads=6, num_kv_heads=3, **common),
        "parallel-mqa": GPTConfig(hidden_size=24, num_heads=3, num_kv_heads=1, architecture="parallel", **common),
        "kraken-modern": KrakenConfig(
            3, hidden_size=20, heads_per_sub_layer=2, head_dim=8, ffn_hidden_size=28, tie_embeddings=False,
            ffn_reads_stream=True, embedding_size=26, **common, **MODERN,
        ),
        "standard-modern": GPTConfig(
            hidden_size=20, num_heads=6, num_kv_heads=3, head_dim=8, ffn_hidden_size=30, **common, **MODERN
        ),
        "parallel-modern": GPTConfig(
            architecture="parallel", hidden_size=24, num_heads=3, ffn_hidden_size=30, tie_embeddings=False,
            **common, **MODERN,
        ),
        "ladder": LadderConfig(hidden_size=24, num_heads=3, **common),
        "track": TrackConfig(3, hidden_size=16, heads_per_track=4, kv_heads_per_track=2, sync_every=2, **common),
        "track-modern": TrackConfig(
            3, hidden_size=20, heads_per_track=2, head_dim=8, ffn_hidden_size=28, sync_every=1, tie_embeddings=False,
            **common, **MODERN,
        ),
        "fal": FALConfig(hidden_size=24, num_heads=6, num_kv_heads=3, **common),
        "fal-modern": FALConfig(
            hidden_size=24, num_heads=3, ffn_hidden_size=30, tie_embeddings=False, **common, **MODERN
        ),
        "ladder-modern": LadderConfig(
            hidden_size=20, num_heads=6, num_kv_heads=3, head_dim=8, ffn_hidden_size=30, ladder_layers=2, **common,
            **MODERN,
        ),
    }  # fmt: skip


def shareable_configs() -> dict[str, ModelConfig]:
    """Models of each architecture that can be split over 2 and 4 ranks, or over 2, 3 and 6 ranks."""
    common = {"num_layers": 3, "vocab_size": 132, "context_length": 16}
    return {
        "kraken-4": KrakenConfig(num_sub_layers=4, hidden_size=32, heads_per_sub_layer=2, **common),
        "kraken-6": KrakenConfig(6, hidden_size=24, heads_per_sub_layer=2, kv_heads_per_sub_layer=1, **common),
        "standard": GPTConfig(hidden_size=48, num_heads=4, **common),
        "parallel": GPTConfig(hidden_size=48, num_heads=8, num_kv_heads=4, architecture="parallel", **common),
        "kraken-modern": KrakenConfig(
            4, hidden_size=28, heads_per_sub_layer=2, head_dim=8, ffn_reads_stream=True, embedding_size=36, **common,
            **MODERN,
        ),
        "standard-modern": GPTConfig(
            hidden_size=40, num_heads=8, num_kv_heads=4, head_dim=8, ffn_hidden_size=72, tie_embeddings=False,
            **common, **MODERN,
        ),
        "ladder": LadderConfig(hidden_size=48, num_heads=4, **common),
        "track": TrackConfig(4, hidden_size=24, heads_per_track=2, sync_every=2, **common),
        "track-modern": TrackConfig(4, hidden_size=28, heads_per_track=2, head_dim=8, sync_every=1, **common, **MODERN),
        "fal": FALConfig(hidden_size=48, num_heads=4, **common),
        "fal-modern": FALConfig(hidden_size=40, num_heads=4, head_dim=8, ffn_hidden_size=72, **common, **MODERN),
        "ladder-modern": LadderConfig(
            hidden_size=40, num_heads=8, num_kv_heads=4, head_dim=8, ffn_hidden_size=72, ladder_layers=2, **common,
            **MODERN,
        ),
    }  # fmt: skip


def rough_model(config: ModelConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> LanguageModel:
    """A model with weights so large that every part affects the output, and norms that are not all ones."""
    model = build_model(config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.25 * noise)
    return model.eval()


def split_qkv(weight: torch.Tensor, head_dim: int) -> list[torch.Tensor]:
    """A baseline's fused weight (G, rows, D) -> the weights of queries, keys and values, (outputs, D) each."""
    grouped = weight.unflatten(1, (-1, head_dim))
    return [grouped[:, :-2].flatten(0, 2), grouped[:, -2].flatten(0, 1), grouped[:, -1].flatten(0, 1)]


def random_ids(config: ModelConfig, batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, tokens), generator=generator)


def small_tokenizer() -> Tokenizer:
    settings = TokenizerSettings(kind="sentencepiece", vocab_size=320)
    return build_tokenizer(settings, lambda: iter(TEXTS * 20))


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> Path:
    folder.mkdir(parents=True)
    tokenizer.save(folder)
    return folder


def write_small_export(folder: Path, config: ModelConfig, tokenizer_dir: Path | None) -> LanguageModel:
    model = rough_model(config, torch.float32)
    write_export(
        folder, config, model.state_dict(), tokenizer_dir=tokenizer_dir, metadata={"step": 7}, dtype=torch.float32
    )
    return model


def run_module(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m module arguments` in a fork (see `forked`)."""
    environment = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}  # threads decide the last bits of a sum
    return run_forked([["-m", module, *arguments]], [environment])[0]


def run_process(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m module arguments` in a new interpreter."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def run_here(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m module arguments` in this process, which saves the seconds of importing torch."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", [module, *arguments]),
        mock.patch.dict(os.environ),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # runpy warns if the module was imported before
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as error:
            code = int(error.code or 0)
    return subprocess.CompletedProcess([module, *arguments], code, stdout.getvalue(), stderr.getvalue())


def wait_until(condition: Callable[[], Result], describe: Callable[[], object] = lambda: "") -> Result:
    """Wait until `condition` returns a true result, and return it; fails with `describe()` after PATIENCE."""
    deadline = time.monotonic() + PATIENCE
    while not (result := condition()):
        assert time.monotonic() < deadline, describe()
        time.sleep(0.05)
    return result


def wait_for_stop(process: subprocess.Popen[str]) -> None:
    """Wait until a process has stopped itself with SIGSTOP, so that a test can act at that moment of its work."""
    found = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    assert found is not None
    assert found.si_code == os.CLD_STOPPED, "the process ended before it stopped"


def launch_ranks(ranks: int, *program: str, device: str = "cpu") -> None:
    """Run a program (a script, or -m and a module) on `ranks` ranks of this machine; on failure prints its output."""
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    common = {"PYTHONPATH": path, "DS_ACCELERATOR": device}
    if device == "cpu":
        world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        common |= world | {"MASTER_PORT": str(free_port())}
        environments = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        results = run_forked([program] * ranks, environments)
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        environment = {**os.environ, **common}
        results = [subprocess.run([*command, *program], capture_output=True, text=True, env=environment, check=False)]
    output = "".join(f"{result.stdout[-2000:]}{result.stderr[-4000:]}" for result in results)
    assert all(result.returncode == 0 for result in results), output


def user_error(result: subprocess.CompletedProcess[str]) -> str:
    """The error message of a command that failed with exit code 2; it must be one line without a traceback."""
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: "), result.stderr
    return lines[0].removeprefix("error: ")


def random_windows(config: ModelConfig, batch: int, tokens: int) -> np.ndarray:
    return random_ids(config, batch, tokens + 1).numpy()
