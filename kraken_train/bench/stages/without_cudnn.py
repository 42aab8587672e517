"""Runs a module without cuDNN's attention, which PyTorch has no environment variable for.

python -m kraken_train.bench.stages.without_cudnn MODULE ARGUMENT...
"""

from __future__ import annotations

import runpy
import sys

import torch


def main() -> None:
    torch.backends.cuda.enable_cudnn_sdp(False)
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
