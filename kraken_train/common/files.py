"""Files that must survive a crash or be recognised again."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

from kraken_train.common.errors import KrakenError

BLOCK_BYTES = 1 << 20
KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
WAIT_SECONDS = 0.05  # between two attempts to get a lock
LONGEST_NAME = 255  # bytes, on file systems of Linux


def real_path(path: str | Path) -> Path:
    """`path` without links and `~`; unchanged if its links form a circle or the user of `~` does not exist."""
    return Path(os.path.realpath(os.path.expanduser(path)))


def kind_of(path: Path) -> str | None:
    """In words what `path` leads to; None if nothing has that name."""
    try:
        return KINDS[stat.S_IFMT(path.stat().st_mode)]
    except OSError as error:
        if not path.is_symlink():
            return (
                None
                if isinstance(error, FileNotFoundError | NotADirectoryError)
                else f"out of reach ({error.strerror})"
            )
        missing = "leads around in a circle" if error.errno == errno.ELOOP else "does not exist"
        return f"a link to {os.readlink(path)}, which {missing}"


def require_regular(path: Path, name: str, kind: type[KrakenError]) -> None:
    """Raises an error of `kind`, about the setting `name`, unless `path` is a file.

    Opening a pipe or a socket would wait for ever, and a device may have no end.
    """
    found = kind_of(path)
    if found != "a file":
        raise kind(f"{name}={path} {f'is {found}, not a file' if found else 'does not exist'}; name a file")


def open_file(path: Path) -> BinaryIO:
    """A file to read. Raises OSError, also at once for a pipe, a socket or a device, which may have no end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"it is {kind_of(path)}, not a file", str(path))
    return open(descriptor, "rb")


def read_file(path: Path) -> bytes:
    """The content of a file. Raises OSError as `open_file` does."""
    with open_file(path) as file:
        return file.read()


def find_escape(folder: Path, path: Path) -> str | None:
    """Why `path`, a name in `folder` or a link there, leads out of the folder; None if it does not.

    A snapshot in a cache of Hugging Face is made of links to files beside it.
    """
    home = Path(os.path.realpath(folder))
    if home.parent.name == "snapshots":
        home = home.parent.parent
    real = Path(os.path.realpath(path))
    return None if real.is_relative_to(home) else f"{path} leads to {real}, which is outside of {folder}"


def is_plain_name(name: object) -> bool:
    """Whether it names a file in a folder and nothing else, in a list of such files."""
    if not isinstance(name, str) or name in ("", ".", "..") or "\0" in name:
        return False
    return Path(name).name == name and len(name.encode(errors="surrogateescape")) <= LONGEST_NAME


def write_synced(path: Path, text: str) -> None:
    """Write `text` and wait until the disk has it."""
    with path.open("w", encoding="utf-8") as file:
        write_through(file, text)


def write_through(file: IO[str], text: str) -> None:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())


def replace_synced(path: Path, text: str) -> None:
    """Write `text` so that `path` holds either its old content or all of the new one, even after a power cut.

    Several processes may do so at the same time; the last one's text remains.
    """
    with open_temporary(path) as file:
        try:
            write_through(file, text)
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


def open_temporary(path: Path) -> IO[str]:
    """A new file beside `path`, locked until it is closed.

    It has always the same name, so that one which a killed process has left is used again; another name only while
    another process writes to that one.
    """
    usual = path.with_name(f".{path.name}.tmp")
    file = usual.open("a", encoding="utf-8")
    if try_lock(file.fileno()) and is_still(usual, file.fileno()):
        file.truncate(0)
        return file
    file.close()
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp").open("x", encoding="utf-8")


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder with all that is in it; `target` is new. Raises the first OSError, unlike shutil.copytree.

    A link that leads out of the folder is one: what it leads to is not the folder's to give away.
    """
    target.mkdir(parents=True)
    for entry in sorted(source.iterdir()):
        if entry.is_symlink() and (escape := find_escape(source, entry)) is not None:
            raise OSError(errno.EPERM, escape, str(entry))
        if entry.is_dir():
            copy_folder(entry, target / entry.name)
        else:
            shutil.copyfile(entry, target / entry.name)


def try_lock(descriptor: int, shared: bool = False) -> bool:
    """Lock an open file or folder until it is closed; False if another process holds the lock.

    A `shared` lock is denied by a full one only. A file system without locks (some network ones) counts as free.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL):
            raise
    return True


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Exclude other processes that ask for the same; waits for one that has the lock of the folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        while not try_lock(descriptor):
            time.sleep(WAIT_SECONDS)
        yield
    finally:
        os.close(descriptor)


def is_still(path: Path, descriptor: int) -> bool:
    """Whether `path` still leads to what is open, which may have been renamed or removed before it was locked."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def file_sha256(path: Path) -> str:
    """Hex digest of a file of any size. Raises OSError as `open_file` does."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
