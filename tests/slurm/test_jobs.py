"""Training under a real Slurm of two nodes with two ranks each: without faults, and with them.

`make test-slurm` runs all tests, in about 25 minutes on two cores; `make test` runs only the first one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import cluster
import pytest
from cluster import newest, submit, submit_slow, wait_for, wait_for_end
from helpers import run_module
from integration.training import learned, overrides

from kraken_train.run.events import read_events
from kraken_train.tracking.wandb_files import history, wandb_files

pytestmark = [*cluster.needs_slurm, pytest.mark.timeout(3600)]

STEPS, HOUR = 30, 3600.0
SECONDS_PER_STEP = 3.0  # while a test waits for an event: the whole run then takes more than a minute
OFFLINE = "tracking.mode=offline"


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, ...]]:
    """The metrics of a run without faults; srun starts all of its Python processes, as with a container."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    (job,) = submit("nodes=2", 'srun_options=["--export=ALL"]', "--", *settings(data, run))
    assert wait_for_end(job) == "COMPLETED", cluster.output(run)
    cluster.wait_for_no_processes(run)
    return learned(run)


def settings(data: Path, run: Path, *more: str) -> list[str]:
    return overrides(data, run, "parallel.sub_layer_parallel_size=2", f"max_steps={STEPS}", *more)


def saved(run: Path, at_least: int) -> bool:
    return any(event["event"] == "saved" and event["step"] >= at_least for event in read_events(run / "events.jsonl"))


def outcomes(run: Path) -> list[str]:
    return [event["outcome"] for event in read_events(run / "events.jsonl") if event["event"] == "ended"]


def requeued(run: Path) -> list[str]:
    """The reasons for which the batch script requeued the job."""
    return [event["reason"] for event in read_events(run / "events.jsonl") if event["event"] == "requeued"]


def curve(run: Path) -> list[tuple[float, float]]:
    """Step and loss as recorded for Weights & Biases, over all starts of the run."""
    run_id = json.loads((run / "run.json").read_text())["id"]
    return [(step, values["loss"]) for file in wandb_files(run, run_id) for step, values in history(file)]


def test_a_job_on_two_nodes(undisturbed: list[tuple[float, ...]]) -> None:
    assert [record[0] for record in undisturbed] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_time_limit(data: Path, tmp_path: Path, undisturbed: list[tuple[float, ...]]) -> None:
    run = tmp_path / "run"
    (job,) = submit_slow(run, 6, "nodes=2", "signal_seconds=55", "time=60", "--", *settings(data, run, OFFLINE))
    wait_for("a checkpoint", lambda: saved(run, 4))
    minutes = int(cluster.show(job)["RunTime"].split(":")[-2]) + 2  # soon; the signal comes 55 s earlier
    cluster.call("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
    wait_for("the time limit", lambda: requeued(run))
    cluster.set_step_seconds(run, 0)
    wait_for("the queue", lambda: cluster.state(job) == "PENDING" or cluster.restarts(job) == 1)
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    assert wait_for_end(job) == "COMPLETED", cluster.output(run)
    assert learned(run) == undisturbed
    assert curve(run) == [record[:2] for record in undisturbed]
    assert outcomes(run) == ["interrupted", "finished"]
    assert requeued(run) == ["the time limit is near"]
    cluster.wait_for_no_processes(run)


@pytest.fixture
def grace(request: pytest.FixtureRequest) -> Iterator[int]:
    """Slurm's GraceTime for preempted jobs, in seconds."""
    cluster.call("scontrol", "update", "PartitionName=debug", f"GraceTime={request.param}")
    yield request.param
    cluster.call("scontrol", "update", "PartitionName=debug", "GraceTime=0")


@pytest.mark.slow
@pytest.mark.parametrize("grace", [0, 60], indirect=True)
def test_preempted(data: Path, tmp_path: Path, undisturbed: list[tuple[float, ...]], grace: int) -> None:
    run = tmp_path / "run"
    (job,) = submit_slow(run, SECONDS_PER_STEP, "nodes=2", "--", *settings(data, run))
    wait_for("a checkpoint", lambda: saved(run, 4))
    cluster.call("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 5")
    wait_for("the preemption", lambda: cluster.restarts(job) == 1)
    cluster.set_step_seconds(run, 0)
    assert wait_for_end(job) == "COMPLETED", cluster.output(run)
    assert learned(run) == undisturbed
    assert outcomes(run) == ["interrupted", "finished"]
    assert len(requeued(run)) == (1 if grace else 0)  # 0: Slurm itself requeued it
    cluster.wait_for_no_processes(run)


@pytest.mark.slow
def test_killed_rank(data: Path, tmp_path: Path, undisturbed: list[tuple[float, ...]]) -> None:
    run = tmp_path / "run"
    (job,) = submit_slow(run, SECONDS_PER_STEP, "nodes=2", "--", *settings(data, run, OFFLINE))
    wait_for("a checkpoint", lambda: saved(run, 4))
    cluster.ranks(run)[-1].kill()
    wait_for("the restart", lambda: cluster.restarts(job) == 1)
    cluster.set_step_seconds(run, 0)
    assert wait_for_end(job) == "COMPLETED", cluster.output(run)
    assert learned(run) == undisturbed
    assert curve(run) == [record[:2] for record in undisturbed]
    assert outcomes(run)[-1] == "finished"
    assert len(requeued(run)) == 1
    cluster.wait_for_no_processes(run)


@pytest.mark.slow
def test_dead_node(data: Path, tmp_path: Path, undisturbed: list[tuple[float, ...]]) -> None:
    run = tmp_path / "run"
    (job,) = submit_slow(run, SECONDS_PER_STEP, "nodes=2", "--", *settings(data, run, "watchdog_seconds=15"))
    wait_for("a checkpoint", lambda: saved(run, 4))
    with cluster.dead_node("n2"):
        wait_for("the requeued job", lambda: cluster.state(job) == "PENDING")
        wait_for("the end of the ranks on the other node", lambda: not cluster.ranks(run))
        cluster.set_step_seconds(run, 0)
    assert wait_for_end(job) == "COMPLETED", cluster.output(run)
    # When the node returns, Slurm may still end the old job on it, which costs a second restart.
    assert cluster.restarts(job) >= 1
    assert learned(run) == undisturbed
    cluster.wait_for_no_processes(run)


@pytest.mark.slow
def test_permanent_fault(data: Path, tmp_path: Path) -> None:
    """The job ends after `max_restarts` restarts if the ranks die in every start."""
    run = tmp_path / "run"
    (job,) = submit_slow(run, HOUR, "nodes=1", "max_restarts=1", "--", *settings(data, run))
    for start in (1, 2):
        wait_for(f"start {start}", lambda count=start: len(list(run.glob("starts/*/environment.json"))) == count)
        wait_for("ranks", lambda: cluster.ranks(run))[0].kill()
        wait_for("their end", lambda: not cluster.ranks(run))
    assert wait_for_end(job) == "FAILED"
    assert cluster.restarts(job) == 1
    assert "error: 1 restarts in a row have saved no newer checkpoint" in cluster.output(run)
    cluster.wait_for_no_processes(run)


@pytest.mark.slow
def test_scancel_and_submit_again(data: Path, tmp_path: Path, undisturbed: list[tuple[float, ...]]) -> None:
    run = tmp_path / "run"
    (job,) = submit_slow(run, HOUR, "nodes=2", "--", *settings(data, run))
    again = run_module("launch.submit", "gpus_per_node=0", "ranks_per_node=2", "nodes=2", "--", *settings(data, run))
    assert again.returncode == 2
    assert f"has job {job}, which is still pending or running" in again.stderr
    cluster.set_step_seconds(run, SECONDS_PER_STEP)
    wait_for("a checkpoint", lambda: saved(run, 4))
    cluster.call("scancel", job)
    assert wait_for_end(job) == "CANCELLED"
    assert cluster.restarts(job) == 0
    cluster.wait_for_no_processes(run)
    assert outcomes(run) == ["interrupted"]
    assert requeued(run) == []
    (job,) = submit("nodes=2", "--", *settings(data, run))
    assert wait_for_end(job) == "COMPLETED", cluster.output(run)
    assert learned(run) == undisturbed


@pytest.mark.slow
def test_full_disk(data: Path, tmp_path: Path, undisturbed: list[tuple[float, ...]]) -> None:
    run = tmp_path / "run"
    (job,) = submit_slow(run, SECONDS_PER_STEP, "nodes=2", "--", *settings(data, run))
    wait_for("a checkpoint", lambda: saved(run, 4))
    cluster.fill_disk(run)
    assert wait_for_end(job) == "FAILED", cluster.output(run)
    assert cluster.restarts(job) == 0
    assert "a restart would not help" in cluster.output(run)
    cluster.wait_for_no_processes(run)
    newest_checkpoint = max(run.glob("checkpoints/step-*"))
    assert run_module("checkpoints.inspect", str(newest_checkpoint)).returncode == 0  # verifies it
    (job,) = submit("nodes=2", "--", *settings(data, run))
    assert wait_for_end(job) == "COMPLETED", cluster.output(run)
    assert learned(run) == undisturbed


@pytest.mark.slow
def test_chain(prepare_settings: list[str], tmp_path: Path, undisturbed: list[tuple[float, ...]]) -> None:
    """Data, training, export and evaluation by one command, with a time limit during the training."""
    data, run = tmp_path / "data", tmp_path / "run"
    training = [argument for argument in settings(data, run) if not argument.startswith("data_dir=")]
    jobs = submit_slow(
        run, SECONDS_PER_STEP, "nodes=2", "prepare.cpus_per_task=2", "evaluate.cpus_per_task=2",
        "--", "prepare", *prepare_settings, f"output_dir={data}", "--", "train", *training,
        "--", "evaluate", "device=cpu",
    )  # fmt: skip
    wait_for("a checkpoint", lambda: saved(run, 4))
    cluster.call("scancel", "--batch", "--signal=USR1", jobs[1])  # as Slurm does before the time limit
    wait_for("the restart", lambda: cluster.restarts(jobs[1]) == 1)
    cluster.set_step_seconds(run, 0)
    assert [wait_for_end(job) for job in jobs] == ["COMPLETED"] * 3, cluster.output(run)
    assert requeued(run) == ["the time limit is near"]
    assert learned(run) == undisturbed
    evaluation = next(newest(run).glob("evaluate-*.out")).read_text()
    export = run / "export"
    assert f"to {export}" in evaluation
    assert "perplexity" in evaluation
    assert (export / "model.safetensors").is_file()


@pytest.mark.slow
def test_chain_ends_with_its_first_failure(data: Path, tmp_path: Path) -> None:
    """Jobs after it are cancelled, since they could never run."""
    run = tmp_path / "run"
    jobs = submit(
        "nodes=1", "evaluate.cpus_per_task=2", 'setup=["exit 2"]',
        "--", "train", *settings(data, run), "--", "evaluate", "device=cpu",
    )  # fmt: skip
    assert wait_for_end(jobs[0]) == "FAILED"
    assert wait_for_end(jobs[1]) == "CANCELLED"


@pytest.mark.slow
def test_sweep(data: Path, tmp_path: Path) -> None:
    """A job array: only the run that gets the signal of the time limit is requeued."""
    parent = tmp_path / "runs"
    sweep = ("optim.lr=1e-3,2e-3", "max_steps=12")
    arguments = [argument for argument in settings(data, parent, *sweep) if argument != f"max_steps={STEPS}"]
    (job,) = submit_slow(parent, 3 * SECONDS_PER_STEP, "nodes=1", "--", *arguments)
    runs = [parent / "optim.lr=0.001", parent / "optim.lr=0.002"]
    wait_for("a checkpoint of both", lambda: all(saved(run, 4) for run in runs))
    cluster.call("scancel", "--batch", "--signal=USR1", f"{job}_1")  # as Slurm does before the time limit
    wait_for("both runs", lambda: all("finished" in outcomes(run) for run in runs))
    wait_for("both jobs", lambda: not cluster.call("squeue", "--noheader", "--jobs", job).strip())
    assert [outcomes(run) for run in runs] == [["finished"], ["interrupted", "finished"]]
    assert learned(runs[0])[-1] != learned(runs[1])[-1]
    cluster.wait_for_no_processes(parent)


@pytest.mark.slow
def test_refusals(data: Path, tmp_path: Path) -> None:
    """Jobs that Slurm would reject, or never start, are refused before anything is written."""
    run = tmp_path / "run"

    def refused(*options: str) -> str:
        result = run_module(
            "launch.submit", "gpus_per_node=0", "ranks_per_node=2", *options, "--", *settings(data, run)
        )
        assert result.returncode == 2, result.stdout
        assert not run.exists()
        return result.stderr

    assert "partition=debgu is not on this cluster; use debug or urgent (did you mean debug?)" in refused(
        "partition=debgu"
    )
    assert "nodes=3 is more than partition debug allows; use at most 2" in refused("nodes=3")
    assert "Requested node configuration is not available" in refused("mem=900G")
    assert "invalid" in refused('sbatch_options=["--constraint=none"]').lower()
    cluster.call("scontrol", "update", "PartitionName=debug", "AllowAccounts=others")
    try:
        assert "account=mine cannot use partition debug; use others" in refused("account=mine")
    finally:
        cluster.call("scontrol", "update", "PartitionName=debug", "AllowAccounts=ALL")
