"""The data of a run whose sources or shares change at given tokens.

A phase begins after so many tokens of training, and reads its samples by their numbers from there on: sample k of the
run is sample k - ceil(tokens / context_length) of the phase. So what a step reads is a function of the settings, of
the tokens trained before and of the samples consumed before, and never of how the run has come there.

Each prepared folder is read on where the phases before would stop if they ended at exactly their tokens, so that data
that two phases share is not read twice before all of it was read once. Since phases end with whole steps, less than a
step's samples may still be read twice, or left out, at a border.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from data_prep.manifest import Manifest
from kraken_train.data.dataset import Samples, TrainingData, open_split

Source = tuple[str, int]  # fingerprint of a folder, and how many with the same stand before it in the same phase


@dataclass(frozen=True)
class PhaseSamples:
    """The samples of a phase, which begins with sample `first` of the run."""

    first: int
    samples: Samples

    def numbers(self, numbers: range) -> range:
        """Samples by their numbers in the run -> by their numbers in the phase."""
        return range(numbers.start - self.first, numbers.stop - self.first)


class RunData:
    """The data of all phases of a run, opened and checked; a run without phases has one.

    `phases` are the shares of each, by the tokens of training after which it begins. Raises DataError if a folder is
    damaged, or if the tokens of two do not mean the same.
    """

    def __init__(self, phases: Mapping[int, Mapping[Path, int]]) -> None:
        self.begins = list(phases)
        self.manifests: dict[Path, Manifest] = {}  # of all folders
        self.phases: list[TrainingData] = []
        for shares in phases.values():
            self.phases.append(TrainingData(shares, self.manifests))
            self.manifests |= self.phases[-1].manifests
        for number, data in enumerate(self.phases):
            for folder, manifest in data.manifests.items():
                self.first.require_same_tokenizer(f"phases[{number}].data_dir", folder, manifest)

    @property
    def first(self) -> TrainingData:
        """That of the first phase, whose tokenizer is that of all, and by which a run is known."""
        return self.phases[0]

    @property
    def fingerprints(self) -> list[str]:
        """Of the data of each phase."""
        return [data.fingerprint for data in self.phases]

    @property
    def later_manifests(self) -> dict[Path, Manifest]:
        """Of the folders that only later phases read."""
        return {folder: manifest for folder, manifest in self.manifests.items() if folder not in self.first.manifests}

    def require_ends_of_documents(self) -> None:
        """Raises DataError as `TrainingData` does."""
        for data in self.phases:
            data.require_ends_of_documents()

    def repetitions(self) -> list[str]:
        """Notes, as `TrainingData` has them."""
        return list(dict.fromkeys(note for data in self.phases for note in data.repetitions()))

    def samples(self, context_length: int, seed: int) -> list[PhaseSamples]:
        """Those of the training splits, by phase. Raises DataError if one is too short."""
        streams = {folder: open_split(folder, "train", manifest) for folder, manifest in self.manifests.items()}
        firsts = [-(-begin // context_length) for begin in self.begins]
        numbers: dict[Source, int] = {}  # in the order of their first use
        read: Counter[Source] = Counter()  # samples, in the phases before
        found = []
        for data, first, (_, last) in zip(self.phases, firsts, [*pairwise(firsts), (0, firsts[-1])], strict=True):
            sources = sources_of(data)
            for source in sources:
                numbers.setdefault(source, len(numbers))
            samples = Samples(
                [streams[folder] for folder in data.shares],
                context_length,
                seed,
                list(data.shares.values()),
                [numbers[source] for source in sources],
                [read[source] for source in sources],
            )
            found.append(PhaseSamples(first, samples))
            read.update(dict(zip(sources, samples.blend.counts(last - first), strict=True)))
        return found


def sources_of(data: TrainingData) -> list[Source]:
    """The folders of a phase by their content, so that it does not matter where they are."""
    seen: Counter[str] = Counter()
    sources = []
    for manifest in data.manifests.values():
        sources.append((manifest.fingerprint, seen[manifest.fingerprint]))
        seen[manifest.fingerprint] += 1
    return sources
