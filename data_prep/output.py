"""The output folder: it comes to exist complete, in one rename, or not at all.

All work happens in a hidden sibling, `.NAME.partial`. An error removes it; what a killed attempt left is removed by
the next one.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.manifest import MANIFEST_NAME, Manifest, load_manifest, verify_quick
from kraken_train.errors import DataError
from kraken_train.files import sync_folder, try_lock

MARK = ".kraken-partial"  # says that a folder is ours to remove


def finished_result(folder: Path, request: dict[str, Any]) -> Manifest | None:
    """The manifest in `folder` if it holds the verified result of `request`, None if it is free to be written.

    Raises DataError, and changes nothing, if it holds anything else.
    """
    if not folder.exists():
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
    differences = _differences(existing.request, json.loads(json.dumps(request)))
    if differences:
        raise DataError(
            f"output_dir={folder} holds data prepared by another request ({'; '.join(differences[:4])}); "
            "name another folder or remove that one"
        )
    return verify_quick(folder)


def _differences(there: Any, here: Any, name: str = "") -> list[str]:
    """Which settings differ, as text."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = list(dict.fromkeys([*there, *here]))
        return [text for k in keys for text in _differences(there.get(k), here.get(k), f"{name}.{k}" if name else k)]
    return [] if there == here else [f"{name} is {there} there and {here} here"]


@contextmanager
def partial_folder(folder: Path) -> Iterator[Path]:
    """A new empty folder to work in, which becomes `folder` at the end of the block.

    If the block raises, it is removed; a failure to write (a full disk, no permission) becomes a DataError.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftover(partial)
        partial.mkdir(exist_ok=True)
        lock = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise _write_error(folder, error) from error
    try:
        _lock(lock, folder)
        try:
            (partial / MARK).touch()
            yield partial
            (partial / MARK).unlink()
            sync_folder(partial)
            os.rename(partial, folder)  # replaces an empty folder, refuses a full one
            sync_folder(folder.parent)
        except OSError as error:
            raise _write_error(folder, error) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(lock)


def _remove_leftover(partial: Path) -> None:
    if not partial.exists():
        return
    names = os.listdir(partial)
    if names and MARK not in names and MANIFEST_NAME not in names:
        raise DataError(f"{partial} is in the way and was not made by this command; move it or name another output_dir")
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        _lock(descriptor, partial)
        shutil.rmtree(partial)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    if not try_lock(descriptor):
        raise DataError(f"another process is preparing {folder} right now; wait for it or end it")


def _write_error(folder: Path, error: OSError) -> DataError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(
            f"the disk of output_dir={folder} is full ({error.strerror}); nothing was left there; "
            "free some space or name a folder on another disk"
        )
    return DataError(f"output_dir={folder} cannot be written: {error}; nothing was left there; name another folder")
