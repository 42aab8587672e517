"""SQuAD's exact match and F1 (Rajpurkar et al., arXiv 1606.05250), the metrics of ReCoRD.

lm-evaluation-harness imports them from `transformers.data.metrics`, which transformers 5 removed, so that its own
command cannot load ReCoRD with transformers 5.
"""

from __future__ import annotations

import importlib.util
import re
import string
import sys
from collections import Counter
from types import ModuleType


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation and articles."""
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def compute_exact(gold: str, predicted: str) -> int:
    """1 if the words are the same, else 0."""
    return int(words(gold) == words(predicted))


def compute_f1(gold: str, predicted: str) -> float:
    """The harmonic mean of precision and recall over words, in [0, 1]."""
    expected, found = words(gold), words(predicted)
    if not expected or not found:
        return float(expected == found)
    common = sum((Counter(expected) & Counter(found)).values())
    return 2 * common / (len(expected) + len(found))


def provide_squad_metrics() -> None:
    """Make `transformers.data.metrics.squad_metrics` importable if transformers does not have it."""
    import transformers.data  # noqa: F401, PLC0415 (takes seconds)

    package = "transformers.data.metrics"
    if package in sys.modules or importlib.util.find_spec(package) is not None:
        return
    module = ModuleType(f"{package}.squad_metrics")
    module.compute_exact, module.compute_f1 = compute_exact, compute_f1  # type: ignore[attr-defined]
    sys.modules[package] = ModuleType(package)
    sys.modules[module.__name__] = module
