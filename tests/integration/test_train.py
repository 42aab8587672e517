"""The training command, run as a user runs it: what it writes, resumes, refuses and survives."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import launch_ranks, run_here, run_module, user_error, wait_for_stop
from torch.nn.functional import cross_entropy

from checkpoints.training.manifest import content_sha256
from checkpoints.training.store import EMA_PREFIX, find_good_checkpoint, read_weights
from integration.training import STEPS, learned, overrides, records, start_stopping
from kraken_train.data.dataset import TrainingData
from kraken_train.data.validation_set import validation_sets
from kraken_train.model.registry import build_model


def bf16(data: Path, run: Path, *more: str) -> list[str]:
    """Settings of the runs here; those of test_faults.py are in fp32."""
    return overrides(data, run, "precision=bf16", *more)


def train(data: Path, run: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return run_module("kraken_train.train", *bf16(data, run, *more))


def state_of(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of the last change of a folder and all that is in it."""
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted([folder, *folder.rglob("*")])]


@pytest.fixture(scope="module")
def data_before(data: Path) -> list[tuple[str, int, int]]:
    return state_of(data)


@pytest.fixture(scope="module")
def reference(data: Path, data_before: list[tuple[str, int, int]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    run = tmp_path_factory.mktemp("reference") / "run"
    result = train(data, run, "checkpoint.every=2", "checkpoint.keep=6")
    assert result.returncode == 0, result.stderr
    return run


def test_metrics(reference: Path) -> None:
    found = records(reference)
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    assert {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "data_wait", "mfu"} <= found[0].keys()
    assert found[-1]["tokens"] == STEPS * 4 * 32
    assert [record["step"] for record in found if "validation_loss" in record] == [6, 12]
    assert found[-1]["loss"] < found[0]["loss"] - 0.1


def test_z_loss_is_logged_apart(data: Path, reference: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = train(data, run, "loss.z_loss=0.01", "max_steps=2")
    assert result.returncode == 0, result.stderr
    first, of_reference = records(run)[0], records(reference)[0]
    assert first["loss"] == of_reference["loss"]  # the initial weights are the same
    assert first["grad_norm"] != of_reference["grad_norm"]
    assert "z_loss" not in of_reference
    vocab_size = read_weights(run).model_config.vocab_size
    assert first["z_loss"] == pytest.approx(0.01 * math.log(vocab_size) ** 2, rel=0.01)  # small initial logits
    assert "z-loss" in result.stdout
    continued = train(data, run, "max_steps=3")
    assert "changed since the checkpoint: loss.z_loss: 0.01 -> 0" in continued.stdout


def test_an_average_of_the_weights(data: Path, tmp_path: Path) -> None:
    """Begun when a run continues, it starts from the weights of then; it is exact over a resumption."""
    run, resumed = tmp_path / "run", tmp_path / "resumed"
    settings = ("checkpoint.every=1", "checkpoint.keep=6", "schedule=constant", "validation.every=0")
    assert train(data, run, *settings, "max_steps=2").returncode == 0
    result = train(data, run, *settings, "max_steps=4", "ema_decay=0.9")
    assert result.returncode == 0, result.stderr
    shutil.copytree(run, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-00000004")
    result = train(data, resumed, *settings, "max_steps=4", "ema_decay=0.9")
    assert "resumed from" in result.stdout

    expected = read_weights(run, 2).weights
    for step in (3, 4):
        weights = read_weights(run, step).weights
        expected = {name: 0.9 * mean + 0.1 * weights[name] for name, mean in expected.items()}
        found = read_weights(run, step, prefix=EMA_PREFIX).weights
        assert all(torch.allclose(found[name], mean, rtol=0, atol=5e-7) for name, mean in expected.items())
    of_resumed = read_weights(resumed, prefix=EMA_PREFIX).weights
    assert all(torch.equal(of_resumed[name], tensor) for name, tensor in found.items())


def test_attention_within_documents(data: Path, tmp_path: Path) -> None:
    """Resumed to the bit, and validated as documents one by one."""
    run, resumed = tmp_path / "run", tmp_path / "resumed"
    settings = ("attention_within_documents=true", "precision=fp32", "max_steps=6", "checkpoint.every=3")
    result = train(data, run, *settings)
    assert result.returncode == 0, result.stderr
    shutil.copytree(run, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-00000006")
    result = train(data, resumed, *settings)
    assert "resumed from" in result.stdout
    assert learned(resumed) == learned(run)

    trained, end = read_weights(run), TrainingData({data: 1}).end_of_document
    model = build_model(trained.model_config)
    model.load_state_dict(trained.weights)
    nats = apart = 0.0
    (validated,) = validation_sets(TrainingData({data: 1}), {}, 5)
    for window in validated.windows(32, 1):
        tokens = torch.from_numpy(window)[0]
        nats += float(model.token_losses(tokens[None, :-1], tokens[None, 1:]).sum())
        starts = sorted({0, *(tokens[:-1] == end).nonzero().flatten().tolist()})
        for first, last in zip(starts, [*starts[1:], 32], strict=True):
            logits = model(tokens[None, first:last])[0]
            apart += cross_entropy(logits, tokens[first + 1 : last + 1], reduction="sum").item()
    assert records(run)[-1]["validation_loss"] == pytest.approx(apart / (5 * 32), rel=1e-6)
    assert abs(nats - apart) > 1e-4 * nats


def test_nothing_is_written_to_the_data(data: Path, data_before: list[tuple[str, int, int]], reference: Path) -> None:
    """Which may be on a disk that can only be read."""
    assert state_of(data) == data_before


def test_results_read_rarely(data: Path, reference: Path, tmp_path: Path) -> None:
    """Every 5 steps, at validations (6 and 12) and checkpoints (4, 8 and 12)."""
    run = tmp_path / "run"
    assert train(data, run, "log_every=5").returncode == 0
    assert learned(run) == [record for record in learned(reference) if record[0] in (5, 6, 10, 12)]


def test_checkpoints_and_folder(reference: Path) -> None:
    folders = sorted(path.name for path in (reference / "checkpoints").glob("step-*"))
    assert folders == [f"step-{step:08d}" for step in range(2, STEPS + 1, 2)]
    trained = read_weights(reference)
    assert trained.metadata["step"] == STEPS
    assert trained.metadata["consumed_samples"] == STEPS * 4
    assert sum(weight.numel() for weight in trained.weights.values()) == trained.model_config.num_parameters
    assert (reference / "tokenizer" / "tokenizer.model").is_file()


def test_a_finished_run_is_left_alone(data: Path, reference: Path, tmp_path: Path) -> None:
    """Also one of an older program, whose records lack settings that have come since."""
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    identity = json.loads((run / "run.json").read_text())
    del identity["model"]["ffn_multiplier"]
    (run / "run.json").write_text(json.dumps(identity))
    for manifest in (run / "checkpoints").glob("*/manifest.json"):
        content = json.loads(manifest.read_text())["content"]
        del content["metadata"]["model"]["ffn_multiplier"], content["metadata"]["config"]["optim"]["eps"]
        del content["metadata"]["config"]["health"], content["metadata"]["config"]["optim"]["name"]
        content["metadata"]["config"]["schedule"]["decay_steps"] = 1  # once recorded for schedules that ignore it
        manifest.write_text(json.dumps({"content": content, "sha256": content_sha256(content)}))
    result = train(data, run)
    assert result.returncode == 0, result.stderr
    assert "0 steps to go" in result.stdout
    assert "changed since" not in result.stdout
    assert learned(run) == learned(reference)


@pytest.mark.slow  # tests/parity has copies too
def test_two_copies(data: Path, reference: Path, tmp_path: Path) -> None:
    """The same samples, losses and validation over two data-parallel ranks."""
    run = tmp_path / "run"
    launch_ranks(2, "-m", "kraken_train.train", *bf16(data, run))
    assert read_weights(run).metadata["data_parallel_size"] == 2
    assert len(list((run / "checkpoints" / "step-00000012").glob("*.distcp"))) == 2
    for found, expected in zip(learned(run), learned(reference), strict=True):
        assert found == pytest.approx(expected, rel=1e-3)  # sums are in another order, and then rounded to bf16


def test_an_error_is_told_once(data: Path, tmp_path: Path) -> None:
    """Two ranks see the same mistake, before or after they have joined."""
    for setting, words in [
        ("parallel.sub_layer_parallel_size=4", "parallel.sub_layer_parallel_size=4 does not divide the 2 ranks"),
        ("resume=must", "no checkpoint in"),
    ]:
        command = overrides(data, tmp_path / "run", setting)
        with pytest.raises(AssertionError) as failure:
            launch_ranks(2, "-m", "kraken_train.train", *command)
        messages = [line for line in str(failure.value).splitlines() if "error: " in line]
        assert len(messages) == 1, messages
        assert words in messages[0]


def test_damaged_checkpoints_are_passed_over(data: Path, reference: Path, tmp_path: Path) -> None:
    """And the ten losses after that are those of the uninterrupted run, to the bit."""
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", str(reference), str(run)], check=True)
    for step in range(4, STEPS + 1, 2):
        file = next((run / "checkpoints" / f"step-{step:08d}").glob("*.distcp"))
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    result = train(data, run)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("passed over a damaged checkpoint") == 5
    assert len(list((run / "checkpoints").glob("step-*.damaged"))) == 5
    assert f"resumed from {run}/checkpoints/step-00000002" in result.stdout
    assert "the learning rate jumps" not in result.stdout
    assert learned(run) == learned(reference)

    for file in (run / "checkpoints").glob("*/manifest.json"):
        file.write_text("{}")
    error = user_error(train(data, run))
    assert error.startswith(f"every checkpoint in {run}/checkpoints is damaged"), "it must not start from scratch"


@pytest.mark.slow
def test_a_checkpoint_of_another_run(data: Path, reference: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(data, run, "max_steps=2").returncode == 0
    foreign = run / "checkpoints" / "step-00000012"
    subprocess.run(["cp", "-r", str(reference / "checkpoints" / foreign.name), str(foreign)], check=True)
    assert f"{foreign} is the checkpoint of another run" in user_error(train(data, run))
    export = [f"run_dir={run}", f"output_dir={tmp_path / 'export'}"]
    assert "step 12 in" in user_error(run_module("checkpoints.export", *export))
    result = run_module("checkpoints.export", *export, "step=2")
    assert result.returncode == 0, result.stderr


def test_output_that_nobody_reads(data: Path, tmp_path: Path) -> None:
    """`train | head` ends the printing, not the training; heads that no attention kernel takes are named before."""
    settings = overrides(data, tmp_path / "run", "model.hidden_size=18")
    process = start_stopping(3, settings, stdout=subprocess.PIPE)
    wait_for_stop(process)
    assert process.stdout is not None
    lines = [""]
    while not lines[-1].startswith("step 2 "):
        lines.append(process.stdout.readline())
    assert "".join(lines).count("makes heads of 9, and attention kernels take multiples of 8") == 1
    process.stdout.close()
    process.send_signal(signal.SIGCONT)
    assert process.wait() == 0
    assert [record["step"] for record in records(tmp_path / "run")] == list(range(1, STEPS + 1))


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(data, run, "max_steps=4").returncode == 0
    good = find_good_checkpoint(run / "checkpoints")[0].path
    diverging = ["optim.lr=1e30", "optim.max_grad_norm=0", "max_nonfinite_steps=2", "max_steps=50"]
    result = train(data, run, *diverging, "log_every=5")  # and so found when more steps have been taken
    error = user_error(result)
    assert "was not finite in steps" in error
    assert "max_nonfinite_steps=2" in error
    assert "note: the learning rate jumps at step 5: 0.0001 by the settings of the checkpoint, " in result.stdout
    assert find_good_checkpoint(run / "checkpoints")[0].path == good
    assert records(run)[-1]["loss"] is None


def test_refused_before_anything_starts(data: Path, reference: Path, tmp_path: Path) -> None:
    """Mistakes, each with the words that its message must hold. Nothing is left behind or changed."""
    other = tmp_path / "documents"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    before = learned(reference)
    for run, more, words in [
        (tmp_path / "a", ["checkpoint.evry=5"], "checkpoint.evry is not a setting (did you mean checkpoint.every?)"),
        (tmp_path / "a", ["model.heads_per_sub_layer=3"], "heads_per_sub_layer=3 does not divide model.hidden_size=16"),
        (tmp_path / "a", ["model.vocab_size=9999"], "model.vocab_size=9999 does not fit the data"),
        (tmp_path / "a", ["global_batch_size=5"], "global_batch_size=5 is not a multiple of micro_batch_size=2"),
        (tmp_path / "a", ["engine.zero_stage=0"], "engine.zero_stage=0 is not supported"),
        (tmp_path / "a", ["parallel.sub_layer_parallel_size=3"], "=3 does not divide model.num_sub_layers=4"),
        (tmp_path / "a", ["parallel.sub_layer_parallel_size=2"], "=2 does not divide the 1 rank of this run"),
        (tmp_path / "a", ["parallel.reduce_dtype=bf16"], "would round what precision=fp32 computes"),
        (tmp_path / "a", ["parallel.reduce_dtype=fp8"], "parallel.reduce_dtype=fp8 is not known; use bf16 or fp32"),
        (tmp_path / "a", ["resume=must"], "there is no checkpoint"),
        (tmp_path / "a", ["optim=null"], "a group of settings must be given by name"),
        (tmp_path / "a", ["data_dir=/nowhere"], "/nowhere does not exist"),
        (other, [], "is not empty and holds no run"),
        (reference, ["resume=never"], "holds another run"),
        (reference, ["model.num_layers=3"], "another model: model.num_layers is 2 there and 3 here"),
        (reference, ["optim.lr=0.5"], "with other settings (optim.lr: 0.001 -> 0.5)"),
        (reference, ["max_steps=8"], "holds a run that has done 12 steps, and max_steps=8"),
    ]:
        # What is refused before the ranks join can be tried in this process, which is faster.
        command = run_here if run == tmp_path / "a" and "resume=must" not in more else run_module
        composed = bf16(data, run, *more) if run == reference else overrides(data, run, *more)
        error = user_error(command("kraken_train.train", *composed))
        assert words in error, error
        assert not (tmp_path / "a").exists()
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]
    assert learned(reference) == before


def test_ranks_that_cannot_meet(data: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        with mock.patch.dict(os.environ, launched):
            ended = train(data, tmp_path / "run")
    assert ended.returncode == 1  # another start may find the machine well
    assert f"error: the ranks could not meet at MASTER_ADDR=127.0.0.1 MASTER_PORT={port}" in ended.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
def test_full_disk_while_saving(data: Path, reference: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(path.stat().st_size for path in (reference / "checkpoints").rglob("*") if path.is_file())
    # Room for two checkpoints and a half, of the six.
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size * 5 // 12}", "tmpfs", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        error = user_error(train(data, disk / "run"))
        assert "step 12 could not be written" in error
        assert "No space left on device" in error
        assert find_good_checkpoint(disk / "run" / "checkpoints")[0].step == 8
        subprocess.run(["mount", "-o", f"remount,size={size * 4}", str(disk)], check=True)
        assert train(data, disk / "run").returncode == 0
        assert learned(disk / "run") == learned(reference)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
