"""Random faults against the real commands: `make chaos`, or `python -m chaos` with tests/ in PYTHONPATH.

A case is one fault of one kind in one command (a victim). All of it follows from the kind and a seed:

    faults.py      the kinds of faults: where each strikes, and what else happens while the command runs
    damage.py      kinds that change files between two starts
    machine.py     kinds that need something of the machine: a small disk, a network of its own, a memory limit
    victims.py     the commands, their inputs, and how their results are compared with undisturbed ones
    plan.py        what a process of the command is told about its fault
    injection.py   in that process: counts its events and strikes at one of them
    attempt.py     starts a command, waits for all of its processes, and reads its messages
    harness.py     one case: fault, repetition of the same command, checks
    report.py      the table of faults and outcomes, and how to repeat a failure
"""
