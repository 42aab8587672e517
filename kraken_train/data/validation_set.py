"""What a run is validated on: the validation splits of its sources, and of further sets that its settings name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from data_prep.manifest import Manifest, verify_quick
from kraken_train.common.errors import ConfigError, DataError
from kraken_train.data.blend import Blend
from kraken_train.data.dataset import TrainingData, open_split, sequential

VALIDATION = "validation"  # the name of the split


@dataclass(frozen=True)
class ValidationSet:
    """The first `samples` windows of a prepared folder's validation split."""

    name: str  # in the names of metrics
    folder: Path
    manifest: Manifest
    samples: int
    is_source: bool  # of the first phase, and so part of the run's own validation loss

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text, in the mean over the split."""
        split = self.manifest.splits[VALIDATION]
        return split.text_bytes / split.tokens

    def windows(self, context_length: int, batch_size: int) -> Iterator[NDArray[np.int64]]:
        """As `sequential` gives them. Raises DataError as `open_split` does."""
        stream = open_split(self.folder, VALIDATION, self.manifest)
        batches = sequential(stream, context_length, batch_size)
        for first, windows in zip(range(0, self.samples, batch_size), batches, strict=False):
            yield windows[: self.samples - first]


def validation_sets(
    data: TrainingData,
    further: Mapping[str, Path],
    samples: int,
    later: Mapping[Path, Manifest] = MappingProxyType({}),
) -> list[ValidationSet]:
    """The sources of a run that have a validation split, and the `further` sets, each opened and checked.

    The sources are the `data` of the first phase. They have `samples` windows in all, by their shares in the training;
    each further set, and each folder that only `later` phases read, has as many. So the run's own loss means the same
    in all phases. Raises DataError for a folder that is damaged, has no such split or another tokenizer, and
    ConfigError for a name that two sets have.
    """
    folders = [*data.manifests, *later]
    names = dict(zip(folders, names_of(folders), strict=True))
    sources = [folder for folder, manifest in data.manifests.items() if VALIDATION in manifest.splits]
    counts = Blend([data.shares[folder] for folder in sources]).counts(samples) if sources else []
    sets = [
        ValidationSet(names[folder], folder, data.manifests[folder], count, is_source=True)
        for folder, count in zip(sources, counts, strict=True)
    ]
    sets += [
        ValidationSet(names[folder], folder, manifest, samples, is_source=False)
        for folder, manifest in later.items()
        if VALIDATION in manifest.splits
    ]
    for name, folder in further.items():
        if name in names.values():
            raise ConfigError(
                f"validation.sets.{name} has the name of a folder that the run trains on; give it another name"
            )
        manifest = verify_quick(folder)
        if VALIDATION not in manifest.splits:
            raise DataError(
                f"validation.sets.{name}={folder} has no validation split; prepare it with validation_fraction above 0"
            )
        data.require_same_tokenizer(f"validation.sets.{name}", folder, manifest)
        sets.append(ValidationSet(name, folder, manifest, samples, is_source=False))
    return sets


def names_of(folders: Sequence[Path]) -> list[str]:
    """A name for each: its last part, or all of it where two end with the same."""
    counts = Counter(folder.name for folder in folders)
    return [folder.name if counts[folder.name] == 1 else str(folder) for folder in folders]
