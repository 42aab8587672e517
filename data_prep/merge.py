"""Join prepared folders into one: python -m data_prep.merge PART [PART ...] --output DATA

The parts are the slices of one preparation, made on several machines with `data_prep.prepare ... slice=I/N`, or any
folders prepared with the same tokenizer and settings. The result reads like one machine's preparation of all their
documents: the same documents in the same order, so the same tokens at the same positions of each split. Slices are
put in their order however they are named; other parts are taken in the order given.

Shards are hard links to the parts' files, which then are the same bytes on disk under two names: deleting the parts
afterwards is safe and frees no space, and no program may change them in place. Where a link is not possible (on
another file system) they are copied, and their checksums compared meanwhile.

The fingerprint covers the shards as files, so it is that of one machine's preparation only if shards happen to end
at the same documents; `data_prep.verify` prints a split's content, which is equal.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep import documents
from data_prep.documents import BadRecords
from data_prep.encoding import RoundTrips
from data_prep.indexed import bin_path, idx_path
from data_prep.manifest import (
    SPLITS,
    TOKENIZER_FOLDER,
    Manifest,
    ShardEntry,
    SplitEntry,
    require_same_content,
    verify_quick,
)
from data_prep.output import attempt, finished_result
from kraken_train.common.cli import user_errors
from kraken_train.common.errors import DataError
from kraken_train.common.files import BLOCK_BYTES, real_path
from kraken_train.common.help import make_parser

# In these parts may differ: shards may end anywhere, and the tokenizer is compared by its files.
FREE_SETTINGS = ("source", "slice", "shard_tokens", "tokenizer")
FREE_WITHOUT_SLICES = ("max_documents",)  # says, as the source does, which documents a whole preparation has
NO_LINK = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)


@dataclass(frozen=True)
class Part:
    path: Path
    manifest: Manifest

    @property
    def slice(self) -> tuple[int, int] | None:
        """(i, n) of the part made with slice=i/n, from 1 on; None for a whole preparation."""
        text = self.manifest.request.get("slice")
        if text is None:
            return None
        part = documents.Part.parse(text)
        return part.index, part.count


def merge(paths: Sequence[Path], output: Path) -> Manifest:
    """Join the prepared folders `paths` in the new folder `output`, unless it holds this very result already.

    `output` comes to exist complete or not at all. Raises DataError if a part is damaged, or the parts do not belong
    together.
    """
    parts = in_order([Part(path, verify_quick(path)) for path in paths])
    for part in parts[1:]:
        require_same_settings(parts[0], part)
    request = merged_request(parts)
    output = real_path(output)
    finished = finished_result(output, request, {})
    if finished:
        print(f"{output} already holds these parts, merged (fingerprint {finished.fingerprint})")
        return finished
    with attempt(output, request, resume=True) as current:  # True only to leave another command's unfinished work alone
        tokenizer = current.folder / TOKENIZER_FOLDER
        tokenizer.mkdir()
        for name, sha256 in parts[0].manifest.tokenizer.files.items():
            copy(parts[0].path / TOKENIZER_FOLDER / name, tokenizer / name, sha256)
        left_out = joined_left_out(parts)
        manifest = dataclasses.replace(
            parts[0].manifest,
            splits=join_splits(parts, current.folder),
            source=merged_source(parts),
            request=request,
            skipped=dict(left_out.counts),
            skipped_places=dict(left_out.places),
            round_trips=joined_round_trips(parts),
        )
        manifest.save(current.folder)
    print_summary(manifest, output)
    if request.get("drop_duplicates"):  # never of slices, which cannot be prepared with it
        print("note: duplicates were dropped within each part, not across parts")
    return manifest


# ---------------------------------------------------------------------------------------------------------------
# Do the parts belong together?
# ---------------------------------------------------------------------------------------------------------------


def in_order(parts: list[Part]) -> list[Part]:
    """The parts in the order of their documents. Raises DataError if some are missing, repeated or of another kind."""
    slices = [part.slice for part in parts]
    whole = [part for part in parts if part.slice is None]
    if len(whole) == len(parts):
        seen: dict[str, Part] = {}
        for part in parts:
            other = seen.setdefault(part.manifest.fingerprint, part)
            if other is not part:
                raise DataError(f"{part.path} holds the same data as {other.path}; name each part once")
        return parts
    if whole:
        sliced = next(part for part in parts if part.slice is not None)
        raise DataError(
            f"{whole[0].path} is a whole preparation, but {sliced.path} is {name_slice(sliced)} of one; merge the "
            "slices first"
        )
    by_index: dict[int, Part] = {}
    for part, (index, count) in zip(parts, [s for s in slices if s], strict=True):
        if (parts[0].slice or (0, 0))[1] != count:
            raise DataError(
                f"{part.path} is {name_slice(part)}, but {parts[0].path} is {name_slice(parts[0])}; merge slices of "
                "one preparation"
            )
        if index in by_index:
            raise DataError(f"{part.path} and {by_index[index].path} are both {name_slice(part)}; name one of them")
        by_index[index] = part
    missing = sorted(set(range(1, count + 1)) - set(by_index))
    if missing:
        shown = ", ".join(f"{index}/{count}" for index in missing[:8]) + (", ..." if len(missing) > 8 else "")
        raise DataError(f"{len(missing)} of {count} slices are missing: {shown}; prepare or name them as well")
    return [by_index[index] for index in sorted(by_index)]


def name_slice(part: Part) -> str:
    return f"slice {part.manifest.request['slice']}"


def require_same_settings(first: Part, other: Part) -> None:
    """Raises DataError unless one preparation could have made both."""
    for name in ("kind", "vocab_size", "end_of_document", "files"):
        here, there = (getattr(part.manifest.tokenizer, name) for part in (first, other))
        if here != there:
            what = "other files" if name == "files" else f"{name}={there} and not {here}"
            raise DataError(
                f"{other.path} was prepared with another tokenizer than {first.path} ({what}); prepare all parts with "
                f"one, such as tokenizer.path={first.path / TOKENIZER_FOLDER}"
            )
    here, there = first.manifest.request, other.manifest.request
    free = FREE_SETTINGS if first.slice else FREE_SETTINGS + FREE_WITHOUT_SLICES
    for name in sorted((here.keys() | there.keys()) - set(free)):
        if here.get(name) != there.get(name):
            raise DataError(
                f"{other.path} was prepared with {name}={there.get(name)}, but {first.path} with {here.get(name)}; "
                "prepare all parts with the same settings"
            )
    if first.slice and content_of(first.manifest.source) != content_of(other.manifest.source):
        raise DataError(
            f"{other.path} is a slice of another source than {first.path}: {other.manifest.source}, not "
            f"{first.manifest.source}; prepare all slices from the same files"
        )


def content_of(source: dict[str, Any]) -> dict[str, Any]:
    """A source may have another path on each machine."""
    return {name: value for name, value in source.items() if name != "location"}


def merged_request(parts: Sequence[Part]) -> dict[str, Any]:
    """What the result depends on; it names the parts by what they hold, so a repeated command finds it done."""
    settings = {name: value for name, value in parts[0].manifest.request.items() if name not in ("source", "slice")}
    return settings | {"merged": [part.manifest.fingerprint for part in parts]}


def merged_source(parts: Sequence[Part]) -> dict[str, Any]:
    if parts[0].slice:
        return parts[0].manifest.source
    return {"kind": "merged", "location": f"{len(parts)} parts", "parts": [part.manifest.source for part in parts]}


# ---------------------------------------------------------------------------------------------------------------
# Joining
# ---------------------------------------------------------------------------------------------------------------


def joined_left_out(parts: Sequence[Part]) -> BadRecords:
    left_out = BadRecords("skip")
    for part in parts:
        left_out.add(part.manifest.skipped, part.manifest.skipped_places)
    return left_out


def joined_round_trips(parts: Sequence[Part]) -> dict[str, Any]:
    total = RoundTrips()
    for part in parts:
        total.add(RoundTrips(**part.manifest.round_trips))
    return dataclasses.asdict(total)


def join_splits(parts: Sequence[Part], folder: Path) -> dict[str, SplitEntry]:
    """Bring the shards of all parts to `folder`, numbered through."""
    splits = {name: SplitEntry([], 0) for name in SPLITS}
    for part in parts:
        ways: Counter[str] = Counter()
        for name, split in part.manifest.splits.items():
            shards = splits[name].shards
            for entry in split.shards:
                renamed = dataclasses.replace(entry, name=f"{name}_{len(shards):05d}")
                ways[bring_shard(part.path, entry, folder, renamed.name)] += 1
                shards.append(renamed)
            splits[name] = SplitEntry(shards, splits[name].text_bytes + split.text_bytes)
        summary = ", ".join(f"{count} shard{'s' if count > 1 else ''} {way}" for way, count in ways.items())
        print(f"{part.path}: {summary}", flush=True)
    return {name: split for name, split in splits.items() if split.shards}


def bring_shard(source: Path, entry: ShardEntry, folder: Path, name: str) -> str:
    """Link or copy a shard's two files; says which of both."""
    files = [
        (bin_path(source / entry.name), bin_path(folder / name), entry.bin_sha256),
        (idx_path(source / entry.name), idx_path(folder / name), entry.idx_sha256),
    ]
    try:
        for there, here, _ in files:
            os.link(there.resolve(), here)  # resolved, since a part may hold symbolic links itself
    except OSError as error:
        if error.errno not in NO_LINK:
            raise
        for there, here, sha256 in files:
            here.unlink(missing_ok=True)
            copy(there, here, sha256)
        return f"copied ({(error.strerror or 'no link possible').lower()})"
    return "linked"


def copy(source: Path, target: Path, sha256: str) -> None:
    """Raises DataError if the content is not that of `sha256`."""
    digest = hashlib.sha256()
    with source.open("rb") as reader, target.open("wb") as writer:
        while block := reader.read(BLOCK_BYTES):
            digest.update(block)
            writer.write(block)
        writer.flush()
        os.fsync(writer.fileno())
    require_same_content(source, digest.hexdigest(), sha256)


def print_summary(manifest: Manifest, output: Path) -> None:
    for name, split in manifest.splits.items():
        print(f"{name}: {split.documents:,} documents, {split.tokens:,} tokens in {len(split.shards)} shard(s)")
    print(f"merged {output}, fingerprint {manifest.fingerprint}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("parts", nargs="+", type=Path, metavar="PART", help="folder that data_prep.prepare has written")
    parser.add_argument("--output", type=Path, required=True, metavar="DATA", help="folder to create")
    options = parser.parse_args(arguments)
    with user_errors(options.output):
        merge(options.parts, options.output)


if __name__ == "__main__":
    main()
