"""`python -m chaos.injected MODULE ARGUMENT...` runs a command with its fault where Python has started long before.

A fork (tests/forked.py) does not import sitecustomize. The plan is in the environment, as always.
"""

from __future__ import annotations

import runpy
import sys

from chaos.injection import install

if __name__ == "__main__":
    install(sys.argv[1])
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
