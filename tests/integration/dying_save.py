"""The real training command, except that it is killed (SIGKILL) in a given phase of its second save.

Usage: dying_save.py PHASE OVERRIDE...
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from checkpoints import store
from kraken_train.train import main

PHASES = {  # phase: (function, whether it dies before it instead of after it, on which call)
    "before the tensors": ("write_tensors", True, 2),
    "after the tensors": ("write_tensors", False, 2),
    "before the manifest": ("write_synced", True, 2),
    "before the rename": ("sync_folder", True, 2),
    "before the pointer": ("replace_synced", True, 2),
    "after the pointer": ("replace_synced", False, 2),
}


def dying(function: Callable[..., Any], before: bool, fatal_call: int) -> Callable[..., Any]:
    calls = 0

    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fatal_call and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments, **keywords)
        if calls == fatal_call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return wrapper


if __name__ == "__main__":
    name, before, fatal_call = PHASES[sys.argv.pop(1)]
    setattr(store, name, dying(getattr(store, name), before, fatal_call))
    main()
