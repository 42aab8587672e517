"""`launch.submit` with shell scripts in place of Slurm's commands: what it submits and what it refuses."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from helpers import run_here, user_error
from integration.training import overrides

from launch.preflight import train_config
from launch.slurm.script import BEGIN_SETTINGS, END_SETTINGS

SINFO = """echo 'gpu*|2-00:00:00|4|gpu:a100:8(S:0-1)'
echo 'gpu*|2-00:00:00|2|gpu:4,nvme:1'
echo 'cpu|infinite|3|(null)'"""
SCONTROL = """echo 'PartitionName=gpu AllowAccounts=ALL AllowQos=ALL MaxNodes=5 State=UP'
echo 'PartitionName=cpu AllowAccounts=lab,class AllowQos=ALL MaxNodes=UNLIMITED State=UP'"""
SBATCH = """if [ "$1" = --test-only ]; then
    if grep -q 'qos=nope'; then echo 'Invalid qos' >&2; exit 1; fi
    exit 0
fi
echo "$@" >>"$CALLS"
echo $((100 + $(wc -l <"$CALLS")))"""
SQUEUE = "echo RUNNING"


@pytest.fixture
def cluster_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts the scripts in PATH; the file to which each submission appends the arguments of sbatch."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"sinfo": SINFO, "scontrol": SCONTROL, "sbatch": SBATCH, "squeue": SQUEUE}.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return tmp_path / "calls"


def option_lines(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


@pytest.mark.usefixtures("cluster_commands")
def test_dry_run(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = run_here(
        "launch.submit", "nodes=2", "time=1-00:00:00", "account=lab", "dry_run=true", 'setup=["module load cuda"]',
        'sbatch_options=["--exclusive","--gres=gpu:2"]', "gpus_per_node=2", "container=/images/k.sqsh",
        "--", *overrides(data, run, "global_batch_size=8", "parallel.sub_layer_parallel_size=4"),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert option_lines(result.stdout) == [
        "--job-name=kraken-train", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--time=1-00:00:00",
        "--signal=B:USR1@300", "--requeue", "--open-mode=append", f"--output={run}/submissions/0001/train-%j.out",
        "--account=lab", "--exclusive", "--gres=gpu:2",
    ]  # fmt: skip
    script = result.stdout[result.stdout.index("#!/bin/bash") : result.stdout.index("# arguments:")]
    assert "    module load cuda\n" in script
    assert "srun_options=(--container-image=/images/k.sqsh)" in script
    assert f"python=(python3 {run}/submissions/0001/code)" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    # 2 layers, forward and backward; 2 x 32 x 16 numbers of 4 bytes; 4 micro-batches
    printed = " ".join(result.stdout.split())
    assert "does not divide ranks_per_node=2" in printed
    assert "4 all-reduces of 0.0164 MB in all" in printed
    assert not run.exists()


@pytest.mark.usefixtures("cluster_commands")
@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        (["nodes=7"], [], "nodes=7 is more than partition gpu allows; use at most 5"),
        (["nodes=5"], [], "nodes=5 is more than the 4 nodes of partition gpu that have gpus_per_node=8"),
        (["gpus_per_node=16"], [], "gpus_per_node=16 is more than a node of partition gpu has; use at most 8"),
        (["time=3-00:00:00"], [], "time=3-00:00:00 is longer than partition gpu allows; use at most 2-00:00:00"),
        (["time=1:2:3:4"], [], "time=1:2:3:4 is not a time of Slurm"),
        (["time=5"], [], "that leaves 0 s to start and to train, and 240 s are needed; use time=9 (minutes) or longer"),
        (
            ["time=6:00"],
            [],
            "time=6:00 is 360 s, and the job gets the signal to save signal_seconds=300 before its end: that leaves "
            "60 s to start and to train, and 240 s are needed; use time=9 (minutes) or longer, or "
            "signal_seconds=120 at most",
        ),
        (["time=2", "signal_seconds=60"], [], "use time=5 (minutes) or longer"),
        (["ranks_per_node=1"], ["run_dir=a\\b"], "Slurm cannot write a job's output to a folder with a backslash"),
        (["partition=gpus"], [], "partition=gpus is not on this cluster; use gpu or cpu (did you mean gpu?)"),
        (["partition=cpu", "account=me"], [], "account=me cannot use partition cpu; use lab or class"),
        (["qos=nope"], ["global_batch_size=16"], "sbatch failed: Invalid qos"),
        (["nodez=7"], [], "nodez is not a setting (did you mean nodes?)"),
        ([], ["max_stps=3"], "max_stps is not a setting (did you mean max_steps?)"),
        ([], ["global_batch_size=4"], "global_batch_size=4 is not a multiple of micro_batch_size=2 times 8"),
        (["ranks_per_node=6"], ["parallel.sub_layer_parallel_size=4"], "does not divide the 6 ranks of this run"),
        (["ranks_per_node=3"], ["parallel.sub_layer_parallel_size=3", "global_batch_size=6"], "num_sub_layers=4"),
        (["ranks_per_node=1"], ["data_dir=/nowhere"], "/nowhere does not exist"),
        (["ranks_per_node=1"], ["--multirun"], "--multirun is neither a stage (prepare, train, evaluate) nor"),
    ],
)
def test_refusals(data: Path, tmp_path: Path, options: list[str], settings: list[str], message: str) -> None:
    run = tmp_path / "run"
    assert message in user_error(run_here("launch.submit", *options, "--", *overrides(data, run, *settings)))
    assert not run.exists()


def test_a_chain(tmp_path: Path, cluster_commands: Path) -> None:
    """Each stage depends on the job of the stage before it and gets its paths; the data need not exist yet."""
    data, run = tmp_path / "data", tmp_path / "run"
    training = [argument for argument in overrides(data, run) if not argument.startswith("data_dir=")]
    chain = ["--", "prepare", "source=embedded", f"output_dir={data}", "--", "train", *training, "--", "evaluate"]
    result = run_here("launch.submit", "ranks_per_node=1", "snapshot=false", *chain)
    assert result.returncode == 0, result.stderr
    folder = run / "submissions" / "0001"
    assert cluster_commands.read_text(encoding="utf-8").splitlines() == [
        f"--parsable {folder}/prepare.sbatch source=embedded output_dir={data}",
        f"--parsable --dependency=afterok:101 --kill-on-invalid-dep=yes {folder}/train.sbatch "
        f"{' '.join(training)} data_dir={data}",
        f"--parsable --dependency=afterok:102 --kill-on-invalid-dep=yes {folder}/evaluate.sbatch run_dir={run} "
        f"data_dir={data}",
    ]
    assert "job 102 (1 run)" in result.stdout
    assert '"job": "102"' in (run / "events.jsonl").read_text()
    again = run_here("launch.submit", "ranks_per_node=1", "snapshot=false", *chain)
    assert "has job 102, which is still pending or running" in user_error(again)


@pytest.mark.parametrize("sweep", [[], ["seed=1,2"]])
def test_special_characters_reach_the_job(data: Path, tmp_path: Path, cluster_commands: Path, sweep: list[str]) -> None:
    """A folder name that Hydra, the shell and Slurm would each change, and other free text."""
    run = tmp_path / "a=b,c {x} 70%j 'q' #1"
    text = ["tracking.name=me@lab#1", "tracking.group=a b, c", "tracking.notes=see 70% $HOME"]
    result = run_here("launch.submit", "ranks_per_node=1", "snapshot=false", "--", *overrides(data, run, *text), *sweep)
    assert result.returncode == 0, result.stderr
    folder = run / "submissions" / "0001"
    script = (folder / "train.sbatch").read_text()
    (output,) = (line for line in option_lines(script) if line.startswith("--output"))
    number = "%A_%a" if sweep else "%j"
    assert shlex.split(output) == [f"--output={str(folder).replace('%', '%%')}/train-{number}.out"]
    settings = script[script.index(BEGIN_SETTINGS) : script.index(END_SETTINGS)]
    arguments = subprocess.run(
        ["bash", "-c", f'{settings}\nprintf "%s\\n" "$@"', "script", *overrides(data, run, *text)],
        env={**os.environ, "SLURM_ARRAY_TASK_ID": "1"}, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    config = train_config(arguments)
    assert config.run_dir == str(run / "seed=2" if sweep else run)
    assert config.seed == (2 if sweep else 0)
    tracking = config.tracking
    assert (tracking.name, tracking.group, tracking.notes) == ("me@lab#1", "a b, c", "see 70% $HOME")
    if not sweep:
        assert (
            cluster_commands.read_text(encoding="utf-8") == f"--parsable {folder}/train.sbatch {' '.join(arguments)}\n"
        )
    assert f"kraken_train.status {shlex.quote(config.run_dir)}" in result.stdout
