"""Runs random faults against the real commands; see docs/reliability.md.

python -m chaos --faults 100 --seed 1 [--only KIND] [--case SEED]
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
from pathlib import Path

from chaos.attempt import ForkedStart, Start
from chaos.harness import FAULTS, Harness, Result
from chaos.report import describe, table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("--faults", type=int, default=100, help="how many, over all kinds in turn; default: 100")
    parser.add_argument("--seed", type=int, default=0, help="decides all that is random; default: 0")
    kinds_help = "one or several of: " + ", ".join(sorted(FAULTS))
    parser.add_argument("--only", metavar="KIND", action="append", choices=sorted(FAULTS), help=kinds_help)
    parser.add_argument("--case", type=int, metavar="SEED", help="one case of the kind that --only names")
    parser.add_argument(
        "--forks", action="store_true", help="commands of one process as forks of a warm one: seconds faster each"
    )
    parser.add_argument("--folder", type=Path, default=Path("build/chaos"), help="default: build/chaos")
    options = parser.parse_args()
    if options.case is not None and len(options.only or ()) != 1:
        parser.error("--case needs one kind: --only KIND")
    kinds = options.only or sorted(FAULTS)
    impossible = {kind: reason for kind in kinds if (reason := FAULTS[kind].impossible()) is not None}
    kinds = [kind for kind in kinds if kind not in impossible]
    if options.case is not None:
        cases = [(kind, options.case) for kind in kinds]
    else:
        cases = draw_cases(kinds, options.faults, options.seed) if kinds else []
    # A shell lets what it starts in the background ignore SIGINT, and the commands would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    harness = Harness(options.folder, ForkedStart if options.forks else Start)
    results: list[Result] = []
    print(f"{len(cases)} faults with seed {options.seed}, in {harness.folder}", flush=True)
    for kind, seed in cases:
        results.append(harness.run_case(kind, seed))
        print(describe(results[-1]), flush=True)
    failed = [result for result in results if result.problems]
    print(f"\n{table(results, impossible)}\nseed {options.seed}")
    for result in failed:
        print(describe(result))
    sys.exit(bool(failed))


def draw_cases(kinds: list[str], faults: int, seed: int) -> list[tuple[str, int]]:
    """So many pairs of a kind and a seed: all kinds in a random order, again and again."""
    draw = random.Random(seed)
    cases: list[tuple[str, int]] = []
    while len(cases) < faults:
        cases += [(kind, draw.randrange(1_000_000)) for kind in draw.sample(kinds, len(kinds))]
    return cases[:faults]


if __name__ == "__main__":
    main()
