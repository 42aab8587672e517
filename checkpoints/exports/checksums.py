"""SHA256SUMS in an export, by which a reader notices a file that is no longer what was written.

The format is that of `sha256sum`, which can check a copy too: `sha256sum --check SHA256SUMS`. Exports of earlier
versions have no such file, and are read without.
"""

from __future__ import annotations

from pathlib import Path

from kraken_train.common.errors import CheckpointError
from kraken_train.common.files import file_sha256, is_plain_name, kind_of, read_file

SUMS_FILE = "SHA256SUMS"
CHANGING = ("README.md", "loss.png", "evaluation.json")  # by users, by evaluations
HEX_DIGITS = 64


def write_checksums(folder: Path) -> None:
    """Of all files in `folder` and below it that stay as they are."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in CHANGING)
    lines = [f"{file_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / SUMS_FILE).write_text("".join(lines), encoding="utf-8")


def read_checksums(folder: Path) -> dict[str, str]:
    """Hex digests by name; empty if the folder has no such file. Raises CheckpointError if it is damaged."""
    path = folder / SUMS_FILE
    if kind_of(path) is None:
        return {}
    try:
        lines = read_file(path).decode("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy it again, or remove it") from error
    sums = {}
    for line in lines:
        digest, _, name = line.partition("  ")
        if len(digest) != HEX_DIGITS or not all(is_plain_name(part) for part in name.split("/")):
            raise CheckpointError(
                f"{path} is damaged: {line[:100]!r} is not a hash and the name of a file; copy it again, or remove it"
            )
        sums[name] = digest
    return sums


def require_unchanged(folder: Path, *names: str) -> None:
    """Raises CheckpointError unless these files, and those in folders of these names, are the ones that were written.

    Without names that is asked of all files.
    """
    for known, digest in read_checksums(folder).items():
        if not names or any(known == name or known.startswith(f"{name}/") for name in names):
            require_sum(folder / known, digest)


def require_sum(path: Path, written: str) -> None:
    try:
        found = file_sha256(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); copy it again or export again") from error
    if found != written:
        raise CheckpointError(
            f"{path} is not the file that was written: its hash differs from that in {SUMS_FILE}. It is damaged, so "
            f"copy it again; or it was changed on purpose, then remove {SUMS_FILE}"
        )
