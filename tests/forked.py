"""Runs commands and ranks as forks of a process that has already imported PyTorch and DeepSpeed, which takes 4 s.

A fork differs from a new interpreter in its command line, its parent process, and variables that Python reads when it
starts (PYTHONUTF8, OMP_NUM_THREADS). Tests that depend on these start a new interpreter.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from unittest import mock

REPOSITORY = Path(__file__).parent.parent
# The environment of the fork server. Forks cannot change the effect of these variables.
SERVER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
IMPORTED = [
    "torch._dynamo", "torch.distributed.tensor", "torch.distributed.checkpoint", "hydra", "hydra.main", "pydantic",
    "rich.progress", "safetensors.torch", "sentencepiece", "tokenizers", "kraken_train.training.engine",
]  # fmt: skip

context = multiprocessing.get_context("forkserver")


def start_server() -> None:
    """Start the fork server if it is not running."""
    context.set_forkserver_preload(IMPORTED)
    with mock.patch.dict(os.environ, SERVER_ENVIRONMENT):
        multiprocessing.forkserver.ensure_running()


def run_forked(
    programs: Sequence[Sequence[str]], environments: Sequence[dict[str, str]]
) -> list[subprocess.CompletedProcess[str]]:
    """Run programs (a script, or -m and a module, and arguments) at the same time, with further environment variables.

    If one fails, the others are sent SIGTERM, as launchers do.
    """
    start_server()
    with tempfile.TemporaryDirectory() as folder:
        outputs = [(f"{folder}/{index}.out", f"{folder}/{index}.err") for index in range(len(programs))]
        processes = [
            context.Process(target=run_program, args=(list(program), {**os.environ, **added}, *files))
            for program, added, files in zip(programs, environments, outputs, strict=True)
        ]
        for process in processes:
            process.start()
        running = {process.sentinel: process for process in processes}
        while running:
            for sentinel in wait(list(running)):
                ended = running.pop(sentinel)  # type: ignore[index]
                ended.join()
                if ended.exitcode:
                    for process in running.values():
                        process.terminate()
        return [
            subprocess.CompletedProcess(
                list(program), process.exitcode or 0, *(Path(file).read_text(encoding="utf-8") for file in files)
            )
            for program, process, files in zip(programs, processes, outputs, strict=True)
        ]


def run_program(program: list[str], environment: dict[str, str], stdout: str, stderr: str) -> None:
    """In the fork: run PROGRAM as `python PROGRAM` would."""
    for stream, file in ((sys.stdout, stdout), (sys.stderr, stderr)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    code = execute(program)
    threading._shutdown()  # type: ignore[attr-defined]  # wait for threads, as the interpreter does at its end
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def execute(program: list[str]) -> int:
    warnings.simplefilter("default")
    warnings.simplefilter("ignore", DeprecationWarning)  # as in a new interpreter; DeepSpeed has some
    try:
        if program[0] == "-m":
            sys.argv = program[1:]
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = program
            sys.path.insert(0, str(Path(program[0]).parent))
            runpy.run_path(program[0], run_name="__main__")
    except SystemExit as exit_request:
        if isinstance(exit_request.code, str):
            print(exit_request.code, file=sys.stderr)
            return 1
        return exit_request.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
