"""Two ranks that share one model, under the deepspeed launcher, meet every fault; the run ends as if it had not."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from helpers import PATIENCE, REPOSITORY, wait_until

from checkpoints.training.store import find_good_checkpoint, read_weights
from integration.faulty_train import SAVE_PHASES, STAGE_PHASES
from integration.training import learned, overrides, records
from kraken_train.data.dataset import open_split, sequential
from kraken_train.evaluation.perplexity import token_losses
from kraken_train.model.registry import build_model
from kraken_train.parallel.ranks import free_port

STEPS = 18
Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def launch(data: Path) -> Launch:
    """`launch(run, [fault, rank, when], ...)`: the command over two ranks, one of them with a fault."""

    def start(run: Path, fault: list[str] | None, *more: str) -> subprocess.CompletedProcess[str]:
        launcher = Path(sys.executable).parent / "deepspeed"
        command = [str(launcher), "--num_gpus", "2", "--no_local_rank", "--master_port", str(free_port())]
        command += ["--module", "integration.faulty_train", *fault] if fault else ["--module", "kraken_train.train"]
        command += overrides(
            data, run, "parallel.sub_layer_parallel_size=2", f"max_steps={STEPS}", f"watchdog_seconds={PATIENCE}", *more
        )
        path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
        # The launcher's folder is on PATH, as in an environment that is activated.
        environment = {**os.environ, "PYTHONPATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        environment["PATH"] = os.pathsep.join([str(launcher.parent), os.environ["PATH"]])
        log = run.with_suffix(".log")
        with log.open("w") as output:  # a file, since orphans would keep a pipe open
            code = subprocess.run(
                command, env=environment, cwd=run.parent, stdout=output, stderr=subprocess.STDOUT, check=False
            ).returncode
        require_no_process(str(run))
        return subprocess.CompletedProcess(command, code, log.read_text())

    return start


def require_no_process(word: str) -> None:
    """Waits for the end of all processes with `word` among their arguments; fails if one stays."""

    def left() -> list[list[str]]:
        return [
            process.info["cmdline"]
            for process in psutil.process_iter(["cmdline", "status"])
            if process.info["status"] != psutil.STATUS_ZOMBIE and word in " ".join(process.info["cmdline"] or [])
        ]

    wait_until(lambda: not left(), left)


@pytest.fixture(scope="module")
def undisturbed(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    result = launch(run, None)
    assert result.returncode == 0, result.stdout
    return run


def test_the_weights_of_two_ranks_in_one_process(data: Path, undisturbed: Path) -> None:
    """What they have saved is the model whose validation loss they report; so it can be exported without them."""
    trained = read_weights(undisturbed)
    assert trained.metadata["sub_layer_parallel_size"] == 2
    model = build_model(trained.model_config)
    model.load_state_dict(trained.weights)
    windows = sequential(open_split(data, "validation"), trained.model_config.context_length, 1)
    parts = [token_losses(model, window) for window in itertools.islice(windows, 5)]  # validation.samples of them
    loss = sum(total for total, _ in parts) / sum(tokens for _, tokens in parts)
    assert loss == pytest.approx(records(undisturbed)[-1]["validation_loss"], rel=1e-5)


def good_step(run: Path) -> int:
    return find_good_checkpoint(run / "checkpoints")[0].step


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 16
    file.write_bytes(content)


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-????????"))


def test_some_faults(launch: Launch, undisturbed: Path, tmp_path: Path) -> None:
    """A death within a save, a flipped byte, and the end of the launcher during saves in the background."""
    run = tmp_path / "run"
    every = ["checkpoint.every=3"]
    result = launch(run, ["after the tensors", "1", "3"], *every)  # in the third save, that of step 9
    assert result.returncode != 0
    assert "another rank has ended" in result.stdout
    assert good_step(run) == 6
    flip_a_byte(max(newest(run).glob("*.distcp")))
    result = launch(run, ["its launcher is told to end", "0", "8"], *every, "checkpoint.asynchronous=true")
    assert "passed over a damaged checkpoint" in result.stdout
    assert "SHA-256" in result.stdout
    assert "stopped (its launcher has ended) after step" in result.stdout, result.stdout
    assert good_step(run) == 8, "SIGTERM to the launcher has not saved"
    result = launch(run, None, *every)
    assert result.returncode == 0
    assert "resumed from" in result.stdout
    assert learned(run) == learned(undisturbed)


@pytest.mark.slow
def test_every_fault(launch: Launch, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    every = ["checkpoint.every=3"]

    result = launch(run, ["after the tensors", "1", "2"], *every)  # it dies in the second save, that of step 6
    assert result.returncode != 0
    assert "another rank has ended" in result.stdout
    assert good_step(run) == 3

    in_background = [*every, "checkpoint.asynchronous=true"]
    result = launch(run, ["cannot write", "1", "6"], *in_background)
    assert result.returncode != 0
    messages = [line for line in result.stdout.splitlines() if "error: " in line and "could not be written" in line]
    assert len(messages) == 1, result.stdout
    assert "step 6 could not be written" in messages[0]
    assert "File too large" in messages[0]
    assert good_step(run) == 3
    assert records(run)[-1]["step"] < 9, "the save in the background has failed, and nobody said so until the next"

    result = launch(run, ["stops", "1", "8"], *every, "watchdog_seconds=8")
    assert result.returncode != 0
    assert "error: rank 1 (process" in result.stdout, result.stdout
    assert "has not answered for 8 s" in result.stdout
    assert good_step(run) == 6

    # A byte flips in what is newest.
    flip_a_byte(max(newest(run).glob("*.distcp")))
    result = launch(run, ["its launcher is told to end", "0", "8"], *in_background)
    assert "passed over a damaged checkpoint" in result.stdout
    assert "SHA-256" in result.stdout
    assert "resumed from" in result.stdout
    assert "step-00000003: step 3" in result.stdout
    assert "stopped (its launcher has ended) after step" in result.stdout, result.stdout
    stopped_at = good_step(run)
    assert stopped_at == 8, "SIGTERM to the launcher has not saved"

    result = launch(run, ["sees a NaN", "1", str(stopped_at + 2)], "checkpoint.every=1", "max_nonfinite_steps=1")
    assert result.returncode != 0
    assert f"was not finite in step {stopped_at + 2}" in result.stdout
    assert good_step(run) == stopped_at + 1

    # Found before anything is computed with it, and so by its name.
    result = launch(
        run, ["has a bit flipped", "1", str(stopped_at + 3)], "checkpoint.every=3", "parallel.verify_every=1"
    )
    assert result.returncode != 0
    assert "error: final_norm.weight is not the same on all ranks that hold it: rank 1 has" in result.stdout

    # One rank's file of another step, and no pointer.
    part = max(newest(run).glob("__1_*.distcp"))
    shutil.copy(run / "checkpoints" / f"step-{stopped_at:08d}" / part.name, part)
    (run / "checkpoints" / "latest").unlink()
    result = launch(run, None, *every)
    assert result.returncode == 0, result.stdout
    assert f"passed over a damaged checkpoint: {part}" in result.stdout
    assert f"step-{stopped_at:08d}: step {stopped_at}" in result.stdout

    assert learned(run) == learned(undisturbed)
    assert (run / "checkpoints" / "latest").read_text().strip() == newest(run).name


@pytest.mark.slow
def test_every_setting(launch: Launch, undisturbed: Path, tmp_path: Path) -> None:
    """They reach the engine, and together change nothing but roundings."""
    run = tmp_path / "run"
    settings = [
        "parallel.vocab_parallel=true", "parallel.reduce_dtype=fp32", "parallel.verify_every=1", "engine.zero_stage=2",
        "engine.activation_checkpointing=true", "engine.compile=true", "checkpoint.asynchronous=true",
    ]  # fmt: skip
    result = launch(run, ["tells", "0", "1"], *settings)
    assert result.returncode == 0, result.stdout
    told = json.loads(next(line for line in result.stdout.splitlines() if line.startswith("told: "))[6:])
    assert told == {
        "ranks of a copy": 2, "rows of the vocabulary": 160, "reduce dtype": "torch.float32", "recompute": True,
        "compiled": True, "zero stage": 2, "asynchronous": True,
    }  # fmt: skip
    for found, expected in zip(learned(run), learned(undisturbed), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    checkpoint, problems = find_good_checkpoint(run / "checkpoints")
    assert (checkpoint.step, problems) == (STEPS, [])


@pytest.mark.slow
def test_killed_in_phases_of_a_save(launch: Launch, undisturbed: Path, tmp_path: Path) -> None:
    """Each start dies in its second save; with what the earlier ones left, the run still ends as the reference."""
    run = tmp_path / "run"
    settings = ["checkpoint.every=1", "checkpoint.keep=2"]
    for phase, (_, rank, *_) in SAVE_PHASES.items():
        result = launch(run, [phase, str(rank), "2"], *settings)
        assert result.returncode != 0, phase
        checkpoint, problems = find_good_checkpoint(run / "checkpoints")
        assert not problems, phase
        # The first save of this start is complete; the second is, once it was renamed.
        assert learned(run)[: checkpoint.step] == learned(undisturbed)[: checkpoint.step], phase
    assert len(SAVE_PHASES) <= good_step(run) < STEPS
    result = launch(run, None, *settings)
    assert result.returncode == 0, result.stdout
    assert "resumed from" in result.stdout
    assert learned(run) == learned(undisturbed)
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == ["latest", f"step-{STEPS - 1:08d}", f"step-{STEPS:08d}"], "a save cut short has left something"


@pytest.mark.slow
def test_the_first_checkpoint_is_only_staged(launch: Launch, undisturbed: Path, tmp_path: Path) -> None:
    """`resume=must` continues from it, and refuses to begin anew where it is lost."""
    run, stage = tmp_path / "run", tmp_path / "stage"
    settings = ["checkpoint.every=1", f"checkpoint.stage_dir={stage}"]
    assert launch(run, ["before the copy", "1", "1"], *settings).returncode != 0
    assert not list((run / "checkpoints").glob("step-*"))
    lost = tmp_path / "lost"
    shutil.copytree(run, lost)
    result = launch(run, None, *settings, "resume=must")
    assert result.returncode == 0, result.stdout
    assert learned(run) == learned(undisturbed)
    result = launch(lost, None, *settings, "resume=must")
    assert result.returncode != 0
    assert "resume=must, but there is no checkpoint in" in result.stdout


@pytest.mark.slow
def test_killed_between_stage_and_copy(launch: Launch, undisturbed: Path, tmp_path: Path) -> None:
    """Each start dies in its second save; the next one takes up what is staged, and the run ends as the reference."""
    run, stage = tmp_path / "run", tmp_path / "stage"
    settings = ["checkpoint.every=1", "checkpoint.keep=2", f"checkpoint.stage_dir={stage}"]
    for phase, (_, rank, *_) in STAGE_PHASES.items():
        before = good_step(run) if run.exists() else 0
        result = launch(run, [phase, str(rank), "2"], *settings)
        assert result.returncode != 0, phase
        checkpoint, problems = find_good_checkpoint(run / "checkpoints")
        assert not problems, phase
        assert checkpoint.step > before, phase
        assert ("copied the checkpoint of step" in result.stdout) == (phase == "after the copy"), phase
    result = launch(run, None, *settings)
    assert result.returncode == 0, result.stdout
    assert "copied the checkpoint of step" in result.stdout
    assert learned(run) == learned(undisturbed)
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == ["latest", f"step-{STEPS - 1:08d}", f"step-{STEPS:08d}"]
    assert not [path for path in stage.rglob("*") if path.is_file()]
