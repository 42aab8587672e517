"""The output folder: it appears complete, by one rename, or not at all.

All work happens in a hidden sibling, `.NAME.partial`. Its journal records the progress; see
data_prep/shard_builder.py. After an interruption the finished part stays there, and the same command continues from it.
An attempt that has finished nothing leaves nothing.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from data_prep.manifest import MANIFEST_NAME, Manifest, load_manifest, verify_quick
from kraken_train.common.errors import DataError
from kraken_train.common.files import is_still, kind_of, replace_synced, sync_folder, try_lock

JOURNAL_NAME = ".journal.json"
JOURNAL_VERSION = 1
HEAD = ("version", "request", "holder")  # of the journal; the rest is what an assembly has recorded
FORMER_MARK = ".kraken-partial"  # of folders that older versions have left


def finished_result(
    folder: Path, request: dict[str, Any], defaults: Mapping[str, Any] = MappingProxyType({})
) -> Manifest | None:
    """The manifest in `folder` if it holds the verified result of `request`, None if it is free to be written.

    `defaults` are the values of settings that older requests do not name. Raises DataError, and changes nothing, if
    the folder holds anything else.
    """
    if not folder.exists():
        if folder.is_symlink():
            raise DataError(f"output_dir={folder} is {kind_of(folder)}; name a folder that does not exist yet")
        return None
    if not folder.is_dir():
        raise DataError(f"output_dir={folder} is a file; name a folder that does not exist yet")
    names = sorted(os.listdir(folder))
    if not names:
        if os.path.ismount(folder):
            raise DataError(f"output_dir={folder} is a mount point, which cannot be replaced; name a folder inside it")
        if folder == Path.cwd():
            raise DataError(
                f"output_dir={folder} is the folder that the command runs in, which cannot be replaced; "
                "name a folder inside it"
            )
        return None
    if MANIFEST_NAME not in names:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise DataError(f"output_dir={folder} already holds {shown}; name a folder that is empty or does not exist yet")
    existing = load_manifest(folder)
    found = differences({**defaults, **existing.request}, request)
    if found:
        raise DataError(
            f"output_dir={folder} holds data prepared by another request ({'; '.join(found[:4])}); "
            "name another folder or remove that one"
        )
    manifest = verify_quick(folder)
    (folder / JOURNAL_NAME).unlink(missing_ok=True)  # of an attempt that was killed as it ended
    return manifest


def differences(there: Any, here: Any) -> list[str]:
    """Which settings of two requests differ, as text."""
    return _differences(there, json.loads(json.dumps(here)), "")


def _differences(there: Any, here: Any, name: str) -> list[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        keys = list(dict.fromkeys([*there, *here]))
        return [text for k in keys for text in _differences(there.get(k), here.get(k), f"{name}.{k}" if name else k)]
    return [] if there == here else [f"{name} is {there} there and {here} here"]


class Attempt:
    """The folder of an attempt, and its journal: what is finished, `None` before anything is."""

    def __init__(self, folder: Path, request: dict[str, Any], journal: dict[str, Any] | None) -> None:
        self.folder = folder
        self.request = request
        self.journal = journal

    def record(self, state: dict[str, Any]) -> None:
        """Replace the journal, when the disk has what `state` describes."""
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        journal = {"version": JOURNAL_VERSION, "request": self.request, "holder": holder} | state
        replace_synced(self.folder / JOURNAL_NAME, json.dumps(journal))
        self.journal = journal


@contextmanager
def attempt(folder: Path, request: dict[str, Any], resume: bool) -> Iterator[Attempt]:
    """A folder to work in, which becomes `folder` at the end of the block, with the journal of an earlier attempt.

    An earlier attempt with another request is refused, or removed without `resume`; if it has finished nothing it is
    removed in any case. A failure to write (a full disk, no permission) becomes a DataError.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    current = Attempt(partial, request, None)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _refuse_strangers(partial)
        partial.mkdir(exist_ok=True)
        lock = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise _write_error(current, folder, error) from error
    try:
        if not try_lock(lock):
            raise DataError(
                f"output_dir={folder} is being prepared by another process right now ({_holder(partial)}); "
                "wait for it, end it, or name another folder"
            )
        if not is_still(partial, lock) or (folder.exists() and any(folder.iterdir())):
            with suppress(OSError):  # not empty: somebody else's
                partial.rmdir()
            raise DataError(f"output_dir={folder} was being prepared by another process until now; repeat the command")
        current.journal = _journal(partial, request) if resume else None
        try:
            if current.journal is not None:
                current.record({name: state for name, state in current.journal.items() if name not in HEAD})
            else:
                current.record({})  # marks the folder as ours, and what is in it as nothing
                current.journal = None
                _remove_all_but_journal(partial)
            yield current
            sync_folder(partial)
            os.rename(partial, folder)  # replaces an empty folder, refuses a full one
            (folder / JOURNAL_NAME).unlink()
            sync_folder(folder.parent)
        except OSError as error:
            _remove_unfinished(current)
            raise _write_error(current, folder, error) from error
        finally:
            _remove_unfinished(current)
    finally:
        os.close(lock)


def _refuse_strangers(partial: Path) -> None:
    names = os.listdir(partial) if partial.exists() else []
    if names and not {JOURNAL_NAME, MANIFEST_NAME, FORMER_MARK, f".{JOURNAL_NAME}.tmp"}.intersection(names):
        raise DataError(f"{partial} is in the way and was not made by this command; move it or name another output_dir")


def _holder(partial: Path) -> str:
    """Which process is preparing, as its journal says."""
    try:
        return str(json.loads((partial / JOURNAL_NAME).read_bytes())["holder"])
    except (ValueError, KeyError, TypeError, OSError):  # it has just begun
        return "which has just begun"


def _journal(partial: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier attempt has finished, if anything. Raises DataError if its request was another."""
    try:
        journal: dict[str, Any] = json.loads((partial / JOURNAL_NAME).read_bytes())
        version, theirs, finished = journal["version"], journal["request"], "cursor" in journal
    except (ValueError, KeyError, TypeError, FileNotFoundError):
        return None
    if not finished:
        return None
    found = differences(theirs, request) if version == JOURNAL_VERSION else ["it is of another version of this program"]
    if found:
        raise DataError(
            f"an earlier attempt at this output_dir was interrupted and had another request ({'; '.join(found[:4])}); "
            "repeat that request to continue it, or delete its work with resume=false"
        )
    return journal


def _remove_unfinished(current: Attempt) -> None:
    """Remove an attempt that has finished nothing. What the disk does not let go, the next attempt removes."""
    if current.journal is None and current.folder.exists():
        with suppress(OSError):
            _remove_all_but_journal(current.folder)
            shutil.rmtree(current.folder)


def _remove_all_but_journal(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != JOURNAL_NAME:
            path.unlink(missing_ok=True)


def _write_error(current: Attempt, folder: Path, error: OSError) -> DataError:
    if current.journal:
        left = f"what is finished is kept in {current.folder}, and the same command continues from there"
    elif current.folder.exists():
        left = f"{current.folder} is left, for the same command to continue from or to remove"
    else:
        left = "nothing was left there"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(
            f"the disk of output_dir={folder} is full ({error.strerror}); {left}; "
            "free some space or name a folder on another disk"
        )
    return DataError(f"output_dir={folder} cannot be written: {error}; {left}; name another folder")
