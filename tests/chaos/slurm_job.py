"""`python -m chaos.slurm_job MODULE ARGUMENT...` submits a training to Slurm and ends as its job ends.

The job has two nodes with a rank each. Where Slurm requeues it, this waits for the end of the last start.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from slurm.cluster import output, show, wait_for_end

from kraken_train.health.shutdown import INTERRUPTED_EXIT_CODE

OPTIONS = ("gpus_per_node=0", "ranks_per_node=1", "nodes=2", "time=60", "snapshot=false")


def main() -> None:
    settings = sys.argv[2:]
    submit = [sys.executable, "-m", "launch.submit", *OPTIONS, "--", *settings]
    submission = subprocess.run(submit, capture_output=True, text=True, check=False)
    if submission.returncode:
        sys.stderr.write(submission.stderr)
        sys.exit(submission.returncode)
    (job,) = re.findall(r"as job (\d+)", submission.stdout)
    state = wait_for_end(job)
    if state == "COMPLETED":
        return
    (run,) = (Path(setting.removeprefix("run_dir=")) for setting in settings if setting.startswith("run_dir="))
    print(output(run))
    code, _, _ = show(job)["ExitCode"].partition(":")
    sys.exit(INTERRUPTED_EXIT_CODE if state == "CANCELLED" else int(code) or 1)


if __name__ == "__main__":
    main()
