"""File names and texts of all languages, whatever the locale of the machine."""

from __future__ import annotations

import codecs
import io
import locale
import os
import sys

PACKAGES = ("kraken_train", "data_prep", "checkpoints", "launch")


def use_unicode() -> None:
    """Take any file name and any text, whatever the locale.

    Where the locale's encoding is not UTF-8, this command is started again in Python's UTF-8 mode, since libraries open
    text files in that encoding (torch its own ones). What is printed stays in the terminal's encoding, and a character
    that this lacks becomes an escape.
    """
    encoding = locale.getpreferredencoding(False)
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    ours = spec is not None and spec.name.partition(".")[0] in PACKAGES
    if ours and codecs.lookup(encoding).name != "utf-8" and "utf8" not in sys._xoptions:
        os.environ["PYTHONUTF8"] = "1"  # for the processes that it starts
        os.environ.setdefault("PYTHONIOENCODING", f"{encoding}:backslashreplace")
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def prints_unicode() -> bool:
    """Whether standard output takes every character as it is."""
    return (sys.stdout.encoding or "utf-8").lower().replace("-", "") == "utf8"
