"""Runs in phases: against plain PyTorch, interrupted around a border, with a phase added later, and refused changes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import REPOSITORY, launch_ranks, run_here, run_module
from torch import Tensor

from checkpoints.export import exported_metadata
from checkpoints.training.store import find_good_checkpoint
from data_prep.manifest import load_manifest
from integration.training import learned, overrides, records
from kraken_train.common.errors import CheckpointError
from kraken_train.data.blend import Blend
from kraken_train.data.dataset import open_split
from kraken_train.data.shuffle import ShuffledOrder
from kraken_train.model.config import parse_model
from kraken_train.model.registry import build_model
from kraken_train.training.optim import parameter_groups
from launch.preflight import check_training, train_config

# Steps of 4 and 8 samples of 32 tokens. The phases end with 512, 1024 and 1536 tokens. The second begins with its
# sample 1, since its samples count from 450 / 32, rounded up to 15, and the first takes 16.
COMMON = ["global_batch_size={0: 4, 700: 8}", "schedule=constant", "schedule.warmup_tokens=300",
          "checkpoint.every=1", "checkpoint.keep=20", "validation.every=4"]  # fmt: skip
ENDS = [128, 256, 384, 512, 640, 768, 1024, 1280, 1536]
PHASE = [0, 0, 0, 0, 1, 1, 1, 2, 2]


def phases_of(*parts: str) -> str:
    return f"phases=[{', '.join(f'{{{part}}}' for part in parts)}]"


def later(data: Path, books: Path) -> tuple[str, str]:
    """The second and the third phase."""
    return (
        f"until: 1k, data_dir: {{{data}: 0.5, {books}: 0.5}}",
        f"until: 1.5k, data_dir: {books}, schedule: decay",
    )


def settings(data: Path, books: Path, run: Path, *more: str) -> list[str]:
    return overrides(data, run, *COMMON, phases_of("until: 450", *later(data, books)), *more)


def train(*arguments: str) -> str:
    result = run_module("kraken_train.train", *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def cut(run: Path, copy: Path, step: int) -> Path:
    """A copy of a run as it was when it was killed after saving `step`."""
    shutil.copytree(run, copy)
    for folder in (copy / "checkpoints").glob("step-*"):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    return copy


@pytest.fixture(scope="module")
def phased(data: Path, books: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run in three phases."""
    run = tmp_path_factory.mktemp("phases") / "run"
    told = train(*settings(data, books, run))
    assert "9 steps to go of 4 in 6 steps, then 8 in 3 steps x 32 tokens" in told
    assert "phases[0]: 4 steps, to step 4: " in told
    assert f"phases[1]: 3 steps, to step 7: {told.split('phases[1]: 3 steps, to step 7: ')[1].split(' ')[0]}" in told
    assert f"(0.5 from {data}, 0.5 from {books})" in told
    assert "phases[2]: 2 steps, to step 9: " in told
    assert "learning rate decaying to 0" in told
    assert f"validation_loss is measured on the data of phases[0] in all phases: {data}" in told
    assert "phases[0].until=450: 512 (4 steps)" in told
    return run


def read_one_by_one(folder: Path, number: int, read: int) -> list[int]:
    """Sample `read` in the order of a folder, which is the run's number `number`."""
    stream = open_split(folder, "train")
    start = ShuffledOrder((len(stream) - 1) // 32, 0, number)[read] * 32
    return list(stream.read(start, start + 33))


def batches(data: Path, books: Path) -> Iterator[Tensor]:
    """(samples, 33) tokens of each step, as docs/training.md says."""
    half = Blend([1, 1])
    consumed, begin = 0, 0
    for end, phase in zip(ENDS, PHASE, strict=True):
        rows = []
        for k in range(consumed, consumed + (end - begin) // 32):
            if phase == 0:
                rows.append(read_one_by_one(data, 0, k))
            elif phase == 1:  # from sample 15 on; `data` has given 15 before
                before, number = half.counts(k - 15), int(half.locate(torch.tensor([k - 15]).numpy())[0][0])
                rows.append(read_one_by_one((data, books)[number], number, before[number] + (15, 0)[number]))
            else:  # from sample 1000 / 32 = 32 on; the 17 samples of the second phase have given 8 of `books`
                rows.append(read_one_by_one(books, 1, k - 32 + half.counts(17)[1]))
        yield torch.tensor(rows)
        consumed, begin = consumed + len(rows), end


def test_an_export_names_the_data_of_all_phases(phased: Path, data: Path, books: Path) -> None:
    checkpoint, _ = find_good_checkpoint(phased / "checkpoints")
    exported = exported_metadata(checkpoint.metadata, "last")
    first, blend, last = exported["phase_data_fingerprints"]
    assert [first, last] == [load_manifest(folder).fingerprint for folder in (data, books)]
    assert first == exported["data_fingerprint"]
    assert blend not in (first, last)


def rate(begin: int, end: int) -> float:
    """Linear over 300 tokens, then constant, and from 1000 to 1500 linear to 0."""
    if begin >= 1000:
        return 1e-3 * (1500 - begin) / 500
    return 1e-3 * min(1, end / 300)


def test_phases_are_plain_training(data: Path, books: Path, phased: Path) -> None:
    model = build_model(parse_model(json.loads((phased / "run.json").read_text())["model"]), seed=0)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), betas=(0.9, 0.95), eps=1e-8)
    begin = 0
    for end, phase, tokens, record in zip(ENDS, PHASE, batches(data, books), records(phased), strict=True):
        assert (record["tokens"], record["phase"], record["global_batch_size"]) == (end, phase, len(tokens))
        assert record["lr"] == pytest.approx(rate(begin, end) if end > 300 else 1e-3 * end / 300)
        for group in optimizer.param_groups:
            group["lr"] = record["lr"]
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        begin = end
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        measured = {"validation_loss", f"validation_loss/{books.name}"} & record.keys()
        assert len(measured) == (2 if record["step"] in (4, 8, 9) else 0)

    metadata = find_good_checkpoint(phased / "checkpoints")[0].metadata
    identity = json.loads((phased / "run.json").read_text())
    assert [part["until"] for part in metadata["phases"]] == [450, 1000, 1500]
    assert metadata["phases"][0]["data_fingerprint"] == metadata["data_fingerprint"] == identity["data_fingerprint"]
    status = run_here("kraken_train.status", str(phased)).stdout
    assert "step        9 of 9 (100.0%)" in status
    assert f"phase       3 of 3: {{until: 1.5k, data_dir: {books}, schedule: decay}}" in status
    assert run_here("kraken_train.report", str(phased)).returncode == 0
    shutil.copytree(books, phased.parent / "moved")  # a folder of a later phase is part of what the run needs
    config = phased / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace(str(books), str(phased.parent / "gone")))
    assert f"missing     data_dir={phased.parent / 'gone'}" in run_here("kraken_train.status", str(phased)).stdout
    config.write_text(text)


@pytest.mark.parametrize(
    "step", [pytest.param(3, marks=pytest.mark.slow), 4, pytest.param(5, marks=pytest.mark.slow)]
)  # before the first border, at it, and after it
def test_resumed_to_the_bit(data: Path, books: Path, phased: Path, tmp_path: Path, step: int) -> None:
    run = cut(phased, tmp_path / "run", step)
    told = train(*settings(data, books, run))
    assert f"step {step}, {ENDS[step - 1]:,} tokens" in told
    assert "changed since" not in told
    assert "the learning rate jumps" not in told
    assert learned(run) == learned(phased)


@pytest.mark.slow
def test_resumed_on_two_ranks(data: Path, books: Path, phased: Path, tmp_path: Path) -> None:
    """Two copies of the model, of which each reads its part of the steps of all phases."""
    run = cut(phased, tmp_path / "run", 3)
    launch_ranks(2, "-m", "kraken_train.train", *settings(data, books, run, "log_every=3"))
    found, expected = ({record[0]: record[1:5] for record in learned(one)} for one in (run, phased))
    for step in (6, 9):
        assert found[step] == pytest.approx(expected[step], rel=1e-4)


def test_phases_are_added_to_a_run_that_had_none(data: Path, books: Path, phased: Path, tmp_path: Path) -> None:
    """It has come to the end of its tokens; the first phase gets an end, and others follow."""
    run = tmp_path / "run"
    train(*overrides(data, run, *COMMON, "max_tokens=450"))
    assert learned(run)[-1][0] == 4
    told = train(*settings(data, books, run))
    assert "changed since the checkpoint: phases: null -> [{until: 450}, {until: 1k, data_dir: {" in told
    assert [record[:4] for record in learned(run)] == [record[:4] for record in learned(phased)]


def test_what_may_change(data: Path, books: Path, phased: Path, tmp_path: Path) -> None:
    """After 640 tokens, in the second phase. `launch.submit` checks the same before it submits."""
    run = cut(phased, tmp_path / "run", 5)
    second, third = later(data, books)

    def check(*parts: str, data_dir: Path = data) -> None:
        phases = [phases_of(*parts)] if parts else ["max_tokens=3k"]
        check_training(train_config(overrides(data_dir, run, *COMMON, *phases)), ranks=1)

    first = "until: 450"
    check(first, second)
    check(first, second.replace("1k", "640"), third)
    check(first, second.replace("1k", "900"), f"until: 1.2k, data_dir: {data}", f"until: 9k, data_dir: {books}")
    for parts, words in [
        ((first, second.replace("1k", "600"), third), "phases[1].until=600 is less than that now"),
        (("until: 449", second, third), "phases[0].until was 450 and is 449 now"),
        ((first, second.replace("0.5", "0.3"), third), None),  # equal weights again
        ((first, second.replace("0.5", "0.3", 1), third), "the data of phases[1] or their weights are others now"),
        ((first, third), "the data of phases[1] or their weights are others now"),
        ((first, f"{second}, schedule: decay", third), "phases[1].schedule was continue and is decay now"),
        (("until: 3k",), "phases[0].until was 450 and is 3k now"),
        ((), "phases[0].until was 450 and is 3k now"),
    ]:
        if words is None:
            check(*parts)
            continue
        with pytest.raises(CheckpointError) as refused:
            check(*parts)
        assert str(refused.value).startswith(
            f"run_dir={run} holds a run that has done 640 tokens and has begun phases[1], but "
        )
        assert words in str(refused.value)
    with pytest.raises(CheckpointError, match="holds a run on other data"):
        check(first, second, third, data_dir=books)


@pytest.mark.slow
def test_a_rollback_over_a_border(data: Path, books: Path, tmp_path: Path) -> None:
    """A spike in the second phase leads back into the first, which ends after the same tokens as without."""
    run = tmp_path / "run"
    more = ["global_batch_size=4", "checkpoint.every=7", "health.spike_window=4", "health.loss_spike=rollback",
            "phases=[{until: 900}, {until: 2.3k, data_dir: " + str(books) + "}]", "tracking.mode=off"]  # fmt: skip
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    environment = {**os.environ, **ranks, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = ["-m", "integration.faulty_train", "spikes", "0", "13", *overrides(data, run, *COMMON, *more)]
    subprocess.run([sys.executable, *command], env=environment, check=True, capture_output=True)
    rolled = [event for event in map(json.loads, (run / "events.jsonl").open()) if event["event"] == "rolled_back"]
    assert [event["to_step"] for event in rolled] == [7]
    assert rolled[0]["step"] == 15  # in the second phase, after the 4 losses by which a spike is recognized in it
    found = records(run)
    assert [record["phase"] for record in found] == [0] * 8 + [1] * 10  # 8 x 128 tokens reach 900
    assert found[-1]["tokens"] == 18 * 128 + rolled[0]["skipped_samples"] * 32
    assert Counter(record["step"] for record in found).most_common(1)[0][1] == 1
