"""One case: a command meets a fault, and is repeated until it is done; then all is checked."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from chaos.attempt import Attempt, ForkedStart, Start, Starter
from chaos.damage import DAMAGES
from chaos.faults import FINISHED, INJECTED, KILLED, MESSAGE, REFUSED, SAVED, Case, Fault
from chaos.machine import MACHINE
from chaos.on_slurm import ON_SLURM
from chaos.plan import STRUCK, Plan
from chaos.victims import VICTIMS, Undisturbed, Victim
from kraken_train.common.cli import USER_ERROR_EXIT_CODE
from kraken_train.health.shutdown import INTERRUPTED_EXIT_CODE

FAULTS = {fault.name: fault for fault in (*INJECTED, *DAMAGES, *MACHINE, *ON_SLURM)}
REPETITIONS = 3  # of a command until it is done
NOT_STRUCK = "did not strike"
PASSED_OVER = "passed over a damaged checkpoint"


@dataclass(frozen=True)
class Result:
    kind: str
    seed: int
    victim: str
    outcome: str  # how the start with the fault has ended
    story: list[str]
    problems: list[str]  # empty: all is as it must be


class Harness:
    """Runs cases in a folder. `starter` for victims of one process: in a new interpreter, or in a fork."""

    def __init__(self, folder: Path, starter: Starter = Start) -> None:
        self.folder, self.starter = folder.resolve(), starter
        self.undisturbed = Undisturbed(self.folder / "undisturbed", self.run_undisturbed)

    def run_undisturbed(self, victim: Victim, work: Path) -> None:
        """Run a victim without a fault, counting the events of each rank."""
        control = work.parent / "control"
        control.mkdir(exist_ok=True)
        plan = Plan(f"undisturbed-{victim.name}", str(work), str(control), victim.module, rank=None)
        attempt = self.start(victim, victim.command(work), plan).wait()
        assert attempt.code == 0, f"{victim.name} fails without a fault:\n{attempt.output}"

    def start(self, victim: Victim, command: list[str], plan: Plan) -> Start | ForkedStart:
        answer = None if victim.answer is None else Path(plan.watched) / victim.answer
        return (self.starter if victim.ranks == 1 else Start)(command, plan, Path(plan.control), answer)

    def run_case(self, kind: str, seed: int) -> Result:
        fault, draw = FAULTS[kind], random.Random(f"{kind} {seed}")
        victim = VICTIMS[draw.choice(fault.victims)]
        name = f"{kind}-{seed}"
        folder = self.folder / "cases" / name
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "control").mkdir(parents=True)
        undisturbed = self.undisturbed.of(victim)
        self.undisturbed.fill(folder / "work", victim)
        case = Case(
            name, victim, draw, folder, undisturbed,
            count=lambda rank, event: self.undisturbed.count(victim, rank, event),
            repeat=lambda: self.repeat(case),
        )  # fmt: skip
        outcome, problems = NOT_STRUCK, ["the harness itself failed"]
        try:
            outcome, problems = self.meet(fault, case)
        finally:
            fault.after(case)
        result = Result(kind, seed, victim.name, outcome, case.story, problems)
        if not problems:
            shutil.rmtree(folder)
        return result

    def repeat(self, case: Case) -> Attempt:
        """The same command without a fault, with an output of its own."""
        control = case.folder / f"repeat-{sum(1 for _ in case.folder.glob('repeat-*')) + 1}"
        control.mkdir()
        plan = Plan(f"{case.name}-{control.name}", str(case.work), str(control), module="none")
        return self.start(case.victim, case.victim.command(case.work), plan).wait()

    def meet(self, fault: Fault, case: Case) -> tuple[str, list[str]]:
        """How the start with the fault has ended, and what is wrong then or after the repetitions."""
        fault.before(case)
        strike = fault.strike(case)
        plan = Plan(case.name, str(case.work), str(case.control), module="none")
        if strike is not None:
            case.story.append(
                f"rank {strike.rank} before {strike.event} {strike.number}: {strike.action} {strike.arguments or ''}"
            )
            plan = Plan(
                case.name, str(case.work), str(case.control), case.victim.module, strike.rank, strike.event,
                strike.number, strike.action, strike.arguments,
            )  # fmt: skip
        start = self.start(case.victim, fault.wrapped(case.victim.command(case.work)), plan)
        problems = fault.during(case, start)
        attempt = start.wait()
        end, found = judge(attempt)
        problems += found
        if strike is not None and not case.has_struck:
            return NOT_STRUCK, [*problems, "the moment was never reached"]
        if case.has_struck:
            case.story.append(f"struck: {json.loads((case.control / STRUCK).read_text(encoding='utf-8'))}")
        case.story.append(f"the command ended with {attempt.code}: {'; '.join(attempt.errors)}")
        if end not in fault.ends:
            problems.append(f"the command ended with exit code {attempt.code} ({end}) after {fault.name}")
        fault.between(case)
        finish, found = self.finish(fault, case, attempt)
        return (REFUSED if finish == REFUSED else end), [*problems, *found]

    def finish(self, fault: Fault, case: Case, attempt: Attempt) -> tuple[str, list[str]]:
        """Repeat the command until it is done, and compare its results with the undisturbed ones."""
        outcome, problems = FINISHED, []
        compare = case.victim.compare
        refused = attempt.code == USER_ERROR_EXIT_CODE and fault.repair(case)
        if attempt.code == 0 and PASSED_OVER in attempt.output and case.victim.refuses_to_repeat:
            return FINISHED, []  # an export says that it is of an earlier checkpoint
        for _ in range(0 if attempt.code == 0 else REPETITIONS):
            again = self.repeat(case)
            end, found = judge(again)
            case.story.append(f"the same command ended with {again.code}: {'; '.join(again.errors)}")
            problems += [f"repeated: {problem}" for problem in found]
            if end == FINISHED:
                break
            if again.code == USER_ERROR_EXIT_CODE and fault.repair(case):
                refused = True
            elif case.victim.refuses_to_repeat and not compare(case.work, case.undisturbed):
                break  # its result is there, and whole
            else:
                problems.append(f"the same command does not continue, it ends with {again.code}: {again.errors}")
                break
        fault.restore_input(case)
        problems += compare(case.work, case.undisturbed)
        return (REFUSED if refused else outcome), problems


def judge(attempt: Attempt) -> tuple[str, list[str]]:
    """How a command has ended, and what is wrong about that whatever the fault was."""
    problems = [f"left over: {process}" for process in attempt.left]
    if attempt.has_traceback:
        problems.append("a traceback was printed")
    if attempt.code in (0, INTERRUPTED_EXIT_CODE):
        if attempt.errors:
            problems.append(f"exit code {attempt.code}, and error messages: {attempt.errors}")
        return (SAVED if attempt.code else FINISHED), problems
    if attempt.code < 0:
        return KILLED, problems
    if len(attempt.errors) != 1:
        problems.append(f"{len(attempt.errors)} error messages, not 1: {attempt.errors}")
    return MESSAGE, problems
