"""Which tokenizer, and how it is trained: the settings under `tokenizer`."""

from __future__ import annotations

from dataclasses import dataclass

from kraken_train.common.errors import ConfigError
from kraken_train.common.free_text import FilePath, Text
from kraken_train.common.validation import require_choice, require_positive

KINDS = ("sentencepiece", "sentencepiece_model", "gpt2", "huggingface")


@dataclass(frozen=True)
class TokenizerSettings:
    """conf/tokenizer/KIND.yaml lists those that belong to a kind."""

    kind: str  # sentencepiece (trained on the source) | sentencepiece_model | gpt2 | huggingface
    path: FilePath | None = None  # sentencepiece_model: model file; huggingface: tokenizer.json or a folder with one
    end_of_document: Text | None = None  # token that ends a document; null: the tokenizer's end-of-sentence token
    vocab_size: int = 8000  # tokens, with end of document and bytes
    model_type: str = "bpe"  # bpe | unigram
    byte_fallback: bool = True  # encode unknown characters as UTF-8 bytes, so that nothing is lost
    character_coverage: float = 0.9995  # fraction of the text's characters that get a token of their own
    max_training_documents: int = 1_000_000  # documents to choose the training text from, from the first
    max_training_bytes: int = 30_000_000  # UTF-8 bytes of training text

    def __post_init__(self) -> None:
        require_choice("tokenizer.kind", self.kind, KINDS)
        require_choice("tokenizer.model_type", self.model_type, ("bpe", "unigram"))
        for name in ("vocab_size", "character_coverage", "max_training_documents", "max_training_bytes"):
            require_positive(f"tokenizer.{name}", getattr(self, name))
        if not 0.98 <= self.character_coverage <= 1:
            raise ConfigError(f"tokenizer.character_coverage={self.character_coverage} must be from 0.98 to 1")
        if self.kind in ("sentencepiece_model", "huggingface") and not self.path:
            raise ConfigError(f"tokenizer.path is not set, which tokenizer={self.kind} needs; give tokenizer.path=FILE")
