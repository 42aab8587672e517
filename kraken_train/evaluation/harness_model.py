"""A model as lm-evaluation-harness sees one. The harness is an optional dependency, so import this where it is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM

from data_prep.tokenizers import Tokenizer
from kraken_train.common.errors import DataError
from kraken_train.evaluation.likelihoods import Likelihood, Request

Answer = Callable[[Sequence[Request]], Sequence[Likelihood]]


class HarnessModel(TemplateLM):
    """Answers the requests of tasks that compare continuations, by `answer`. Others raise DataError."""

    def __init__(self, answer: Answer, tokenizer: Tokenizer, context_length: int) -> None:
        super().__init__()
        self.answer = answer
        self.texts = tokenizer
        self.context_length = context_length

    @property
    def eot_token_id(self) -> int:
        return self.texts.end_of_document

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """As the tokenizer of an export does it: nothing is added."""
        return list(self.texts.encode_batch([string])[0])

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.context_length:
            raise DataError(
                f"a task has an answer of {longest} tokens, but the model's context_length is {self.context_length}; "
                "choose other validation.suites, or a model with a longer context"
            )
        found = self.answer([Request(context, continuation) for _, context, continuation in requests])
        return [(likelihood.logarithm, likelihood.greedy) for likelihood in found]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise DataError("a task wants the likelihood of whole texts; choose other validation.suites")

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        raise DataError("a task wants generated text; choose other validation.suites")
