"""Training that also saves to object storage, here a folder, and goes on from it in an empty run folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import run_module, user_error

from integration.training import learned, overrides, records


@pytest.mark.slow
def test_a_new_machine_goes_on(data: Path, tmp_path: Path) -> None:
    """With a local disk too. Its steps are those of an uninterrupted run, bit for bit, and it is the same run."""
    remote, stage = f"checkpoint.remote_dir=file://{tmp_path}/remote", f"checkpoint.stage_dir={tmp_path / 'stage'}"
    runs = {name: tmp_path / name for name in ("whole", "first", "second", "third", "other")}

    def train(name: str, *settings: str) -> str:
        result = run_module("kraken_train.train", *overrides(data, runs[name], "schedule=constant", *settings))
        assert result.returncode == 0, result.stderr
        return result.stdout

    train("whole", "checkpoint.keep=1")
    train("first", "max_steps=6", "checkpoint.keep=1", remote, stage)
    assert [path.name for path in sorted((tmp_path / "remote").iterdir())] == ["step-00000006"]
    printed = train("second", "checkpoint.keep=1", remote, stage)
    assert f"copied the checkpoint of step 6 from file://{tmp_path}/remote" in printed
    assert "resumed from" in printed
    assert learned(runs["second"]) == learned(runs["whole"])[6:]
    assert [record["step"] for record in records(runs["second"])] == list(range(7, 13))
    ids = [(runs[name] / "run.json").read_text() for name in ("first", "second")]
    assert ids[0] == ids[1]
    assert [path.name for path in sorted((tmp_path / "remote").iterdir())] == ["step-00000012"]
    assert (tmp_path / "remote" / "step-00000012" / "manifest.json").is_file()
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "step-00000006").touch()  # where a folder is to be
    blocked = f"checkpoint.remote_dir=file://{tmp_path}/blocked"
    printed = train("third", "checkpoint.every=6", blocked)
    assert "step-00000006 is complete, but could not be copied: " in printed
    assert "training goes on, and the next checkpoint is copied" in printed
    events = [json.loads(line) for line in (runs["third"] / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "upload_failed"] == [6]
    assert (tmp_path / "blocked" / "step-00000012" / "manifest.json").is_file()
    result = run_module("kraken_train.train", *overrides(data, runs["other"], "resume=never", remote))
    assert "holds the checkpoints of run" in user_error(result)
    assert not (runs["other"] / "checkpoints").exists()
