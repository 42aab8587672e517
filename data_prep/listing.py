"""The files of a source: those of a folder and of what is linked there, each once, and what is left out."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kraken_train.common.errors import DataError
from kraken_train.common.files import kind_of, require_regular

SHOWN = 3
HIDDEN, UNKNOWN, TWICE = "hidden", "of no kind that is read", "links to what is read under another name"


@dataclass
class Listing:
    """The files to read, in the order of their relative names, and by reason what is left out."""

    files: list[Path] = field(default_factory=list)
    left_out: defaultdict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))

    def notes(self) -> list[str]:
        """A line for each reason: how many, and the first few names."""
        return [
            f"left out {len(paths):,} {'entry' if len(paths) == 1 else 'entries'} of the source: {reason} "
            f"({', '.join(map(str, sorted(paths)[:SHOWN]))}{', ...' if len(paths) > SHOWN else ''})"
            for reason, paths in self.left_out.items()
        ]


def list_folder(folder: Path, suffixes: tuple[str, ...]) -> Listing:
    """What there is to read in `folder`; links are followed, and a file with several names is read once.

    Of these names, one without a link is taken, otherwise the first. Hidden entries and other kinds of files are left
    out. Raises DataError for a link that leads nowhere or around in a circle, and for what cannot be opened as a file
    or listed.
    """
    listing = Listing()
    found: defaultdict[str, list[Path]] = defaultdict(list)  # real path -> its names
    for path, real in _walk(folder, (os.path.realpath(folder),), listing.left_out[HIDDEN]):
        if path.name.endswith(suffixes):
            require_regular(path, "source", DataError)
            found[real].append(path)
        else:
            listing.left_out[UNKNOWN].append(path)
    for real, names in found.items():
        names.sort(key=lambda path: (str(path) != real, path.relative_to(folder).as_posix()))
        listing.files.append(names[0])
        listing.left_out[TWICE] += names[1:]
    listing.files.sort(key=lambda path: path.relative_to(folder).as_posix())
    listing.left_out = defaultdict(list, {reason: paths for reason, paths in listing.left_out.items() if paths})
    return listing


def _walk(folder: Path, above: tuple[str, ...], hidden: list[Path]) -> Iterator[tuple[Path, str]]:
    """All files below `folder`, each with its real path; `above` are the real paths from the source to here."""
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise DataError(f"source: {folder} cannot be listed: {error.strerror}; make it readable or move it") from error
    for entry in entries:
        path, real = folder / entry.name, os.path.join(above[-1], entry.name)
        if entry.name.startswith("."):
            hidden.append(path)
            continue
        if entry.is_symlink():
            real = os.path.realpath(path)
            if not os.path.exists(path):
                raise DataError(f"source: {path} is {kind_of(path)}; repair the link or remove it")
        if not entry.is_dir():
            yield path, real
        elif real in above:
            raise DataError(f"source: {path} is a link to {real}, which contains it; remove the link")
        else:
            yield from _walk(path, (*above, real), hidden)
