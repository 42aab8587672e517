"""The commands: what they need, how they run, and whether their results are those of an undisturbed one.

All run at the smallest size: a model of 2 layers, 12 steps, 150 short documents.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from integration.training import learned, overrides
from slurm.cluster import has_slurm

from chaos.plan import FILE, STEP, TOKEN
from checkpoints.training.store import find_good_checkpoint
from checkpoints.training.stored_tensors import StoredTensors
from kraken_train.common.errors import KrakenError

STEPS, SAVE_EVERY = 12, 3
WATCHDOG_SECONDS = 10
PROMPTS = "prompts.txt"
TRAIN, PREPARE, EXPORT = "kraken_train.train", "data_prep.prepare", "checkpoints.export"
EVALUATE, GENERATE = "kraken_train.evaluate", "kraken_train.generate"
DEEPSPEED, SLURM = "launch.deepspeed", "chaos.slurm_job"


@dataclass(frozen=True)
class Victim:
    """A command over a folder of its own, which holds copies of its inputs and then its results."""

    name: str
    module: str  # of the process, or of each rank, in which events are counted
    settings: Callable[[Path], list[str]]  # the command's arguments for such a folder
    compare: Callable[[Path, Path], list[str]]  # (folder, undisturbed folder) -> how the results differ
    ranks: int = 1
    launcher: tuple[str, ...] = ()  # module that starts the ranks, with its arguments; empty: there is one process
    needs: tuple[tuple[str, str], ...] = ()  # (victim, a result of it), copied into the folder; no victim: of WRITERS
    events: tuple[str, ...] = (FILE,)
    refuses_to_repeat: bool = False  # refuses where the whole of its result is there already
    answer: str | None = None  # file in the folder that takes the standard output, where that is the result

    def impossible(self) -> str | None:
        """Why this machine cannot run it."""
        return None if SLURM not in self.launcher or has_slurm() else "no Slurm controller answers"

    def command(self, work: Path, more: Sequence[str] = ()) -> list[str]:
        return [sys.executable, "-m", *self.launcher, self.module, *self.settings(work), *more]


# --------------------------------------------------------------------------------------------------------------
# Results
# --------------------------------------------------------------------------------------------------------------


def compare_runs(work: Path, undisturbed: Path) -> list[str]:
    """Losses, gradient norms and validation losses of all steps, and all tensors of the last checkpoint, bit by bit."""
    run, other = work / "run", undisturbed / "run"
    try:
        found, expected = learned(run), learned(other)
    except (OSError, ValueError) as error:
        return [f"metrics.jsonl cannot be read: {error}"]
    if found != expected:
        pairs = zip(found, expected, strict=False)
        first = next((f"{here} for {there}" for here, there in pairs if here != there), "another number of steps")
        return [f"other losses than the undisturbed run: {first}"]
    try:
        checkpoint, problems = find_good_checkpoint(run / "checkpoints")
    except KrakenError as error:
        return [f"no good checkpoint at the end: {error}"]
    of_other, _ = find_good_checkpoint(other / "checkpoints")
    saved, wanted = StoredTensors(checkpoint).read(), StoredTensors(of_other).read()
    problems = [f"a damaged checkpoint is left: {problem}" for problem in problems]
    if checkpoint.step != STEPS:
        problems.append(f"the last good checkpoint is of step {checkpoint.step}, not {STEPS}")
    elif saved.keys() != wanted.keys():
        problems.append("the last checkpoint has other tensors")
    else:
        different = [name for name in saved if not torch.equal(saved[name], wanted[name])]
        problems += [f"{len(different)} tensors of the last checkpoint differ, as {different[0]}"] if different else []
    return problems


def compare_trees(name: str, different: Sequence[str] = ()) -> Callable[[Path, Path], list[str]]:
    """The files of a result byte by byte, except those that differ between two undisturbed runs."""

    def compare(work: Path, undisturbed: Path) -> list[str]:
        here, there = files_of(work, name), files_of(undisturbed, name)
        problems = [f"{name}/{file} is missing" for file in sorted(there.keys() - here.keys())]
        problems += [f"{name}/{file} should not be there" for file in sorted(here.keys() - there.keys())]
        common = sorted(here.keys() & there.keys() - set(different))
        return problems + [f"{name}/{file} differs" for file in common if here[file] != there[file]]

    return compare


def compare_data(work: Path, undisturbed: Path) -> list[str]:
    """Shards and tokenizer byte by byte, and of the manifest all that does not name the source."""
    problems = compare_trees("data", ["manifest.json"])(work, undisturbed)
    if not problems:
        here, there = (json.loads((folder / "data" / "manifest.json").read_bytes()) for folder in (work, undisturbed))
        problems = [f"data/manifest.json has another {key}" for key in there
                    if key not in ("source", "request") and here.get(key) != there[key]]  # fmt: skip
    return problems


def files_of(work: Path, name: str) -> dict[str, bytes]:
    """The files of a result; where they name the folder of the command, the name is the same for all."""
    files = [path for path in (work / name).rglob("*") if path.is_file()]
    return {
        str(path.relative_to(work / name)): path.read_bytes().replace(str(work).encode(), b"WORK") for path in files
    }


# --------------------------------------------------------------------------------------------------------------
# Commands
# --------------------------------------------------------------------------------------------------------------


def training(*more: str) -> Callable[[Path], list[str]]:
    def settings(work: Path) -> list[str]:
        common = [f"max_steps={STEPS}", f"checkpoint.every={SAVE_EVERY}", "max_nonfinite_steps=1"]
        common += [f"watchdog_seconds={WATCHDOG_SECONDS}", "tracking.finish_seconds=20"]
        return overrides(work / "data", work / "run", *common, *more)

    return settings


def write_corpus(folder: Path) -> None:
    texts = [f"Chapter {i}: " + " ".join(f"word{(i * j) % 37}" for j in range(60)) for i in range(150)]
    folder.mkdir(parents=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "corpus.jsonl").write_text(lines, encoding="utf-8")


def write_prompts(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / PROMPTS).write_text("Chapter 1:\nword7 word12\nChapter\n", encoding="utf-8")


def preparing(workers: int) -> Callable[[Path], list[str]]:
    return lambda work: [
        f"source={work / 'corpus'}", "tokenizer.vocab_size=320", "validation_fraction=0.1", f"num_workers={workers}",
        f"output_dir={work / 'data'}",
    ]  # fmt: skip


def exporting(work: Path) -> list[str]:
    return [f"run_dir={work / 'run'}", f"output_dir={work / 'export'}"]


def evaluating(work: Path) -> list[str]:
    return [f"export_dir={work / 'export'}", f"data_dir={work / 'data'}", f"output={work / 'result.json'}"]


def generating(work: Path) -> list[str]:
    prompts = f"prompts_file={work / 'prompts' / PROMPTS}"
    return [f"export_dir={work / 'export'}", prompts, "max_new_tokens=8", "batch_size=2", "device=cpu"]


WRITERS = {"corpus": write_corpus, "prompts": write_prompts}
ON_TWO_RANKS = {"ranks": 2, "launcher": (DEEPSPEED, "--num_gpus", "2")}
CORPUS, DATA = (("", "corpus"),), (("prepare", "data"),)
TRAINING = {"module": TRAIN, "compare": compare_runs, "needs": DATA, "events": (STEP, FILE)}
VICTIMS = {
    victim.name: victim
    for victim in (
        Victim("train", settings=training(), **TRAINING),
        Victim("train-async", settings=training("checkpoint.asynchronous=true"), **TRAINING),
        Victim("train-wandb", settings=training("tracking=wandb", "tracking.mode=offline"), **TRAINING),
        Victim("train-tensorboard", settings=training("tracking=tensorboard"), **TRAINING),
        Victim("train-P2", settings=training("parallel.sub_layer_parallel_size=2"), **ON_TWO_RANKS, **TRAINING),
        Victim("train-DP2", settings=training("parallel.sub_layer_parallel_size=1"), **ON_TWO_RANKS, **TRAINING),
        Victim(
            "train-slurm", settings=training("parallel.sub_layer_parallel_size=2"), ranks=2, launcher=(SLURM,),
            **TRAINING,
        ),
        Victim("prepare", PREPARE, preparing(0), compare_data, needs=CORPUS),
        Victim("prepare-workers", PREPARE, preparing(2), compare_data, needs=CORPUS),
        Victim(
            "export", EXPORT, exporting, compare_trees("export"), needs=(("train", "run"),), refuses_to_repeat=True
        ),
        Victim(
            "evaluate", EVALUATE, evaluating, compare_trees("export"), needs=(("export", "export"), *DATA)
        ),
        Victim(
            "generate", GENERATE, generating, compare_trees("answer"), needs=(("export", "export"), ("", "prompts")),
            events=(TOKEN,), answer="answer/texts.jsonl",
        ),
    )
}  # fmt: skip


class Undisturbed:
    """Each victim's undisturbed run, made when it is first asked for: its results, and how many events it has."""

    def __init__(self, folder: Path, run: Callable[[Victim, Path], None]) -> None:
        self.folder, self.run = folder, run

    def of(self, victim: Victim) -> Path:
        """The folder of the results."""
        work = self.folder / victim.name / "work"
        if not (work.parent / "done").exists():
            shutil.rmtree(work.parent, ignore_errors=True)
            self.fill(work, victim)
            self.run(victim, work)
            (work.parent / "done").touch()
        return work

    def fill(self, work: Path, victim: Victim) -> None:
        """Copy the victim's inputs into its folder."""
        work.mkdir(parents=True, exist_ok=True)
        for maker, name in victim.needs:
            if maker == "":
                WRITERS[name](work / name)
            else:
                shutil.copytree(self.of(VICTIMS[maker]) / name, work / name)

    def count(self, victim: Victim, rank: int, event: str) -> int:
        """How many such events the rank has in the whole of a run."""
        control = self.of(victim).parent / "control"
        counts: dict[str, int] = json.loads((control / f"counts-{victim.module}-{rank}.json").read_text("utf-8"))
        return counts[event]
