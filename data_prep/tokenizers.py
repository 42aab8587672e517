"""Tokenizers behind one small interface; each keeps its own library's files and its native batch encoding.

    build_tokenizer(settings, texts) -> Tokenizer      from settings; `texts` is read only to train
    tokenizer.save(folder);  load_tokenizer(folder)    needs no network and nothing outside the folder

What is saved is self-contained: it travels with the shards.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import tiktoken
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from data_prep.gpt2_ranks import find_ranks, read_ranks, write_ranks
from data_prep.tokenizer_settings import KINDS, TokenizerSettings
from data_prep.train_tokenizer import train_sentencepiece
from data_prep.word_cache import GPT2_WORDS, SENTENCEPIECE_WORDS, exact_pattern
from kraken_train.common.errors import ConfigError, DataError
from kraken_train.common.files import read_file, require_regular
from kraken_train.common.parsing import parse_json

DESCRIPTION_NAME = "kraken_tokenizer.json"
VERSION = 1
END_OF_DOCUMENT = "<|endoftext|>"
MOST_IDS = 2**24  # the largest vocabularies have less than a million tokens


class Tokenizer(Protocol):
    kind: str
    vocab_size: int  # largest id + 1
    end_of_document: int  # the id that ends each document; not given for text, unless a foreign model has it as a piece
    words: re.Pattern[str] | None  # finds the parts of a text that are encoded independently, if that is known

    def encode_batch(self, texts: list[str]) -> Sequence[Sequence[int]]:
        """Token ids of each text, without begin, end or other added tokens; text that looks like such a token is text.

        All that becomes ids passes through here, or through `CachedTokenizer`, which gives the same.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def normalized(self, text: str) -> str:
        """What decoding the ids of `text` should give: `text` as the tokenizer itself sees it."""
        ...

    def save(self, folder: Path) -> None:
        """Write all that `load_tokenizer` needs into `folder`, which exists."""
        ...


def build_tokenizer(settings: TokenizerSettings, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """The tokenizer that `settings` describe; `texts()` is called only for one that is trained.

    Raises ConfigError or DataError.
    """
    if settings.kind == "sentencepiece":
        return SentencePieceTokenizer(train_sentencepiece(settings, texts()), "sentencepiece")
    if settings.kind == "gpt2":
        return GPT2Tokenizer.from_tiktoken()
    path = Path(os.path.expanduser(str(settings.path)))
    if not path.is_dir():
        require_regular(path, "tokenizer.path", DataError)
    if settings.kind == "sentencepiece_model":
        return SentencePieceTokenizer(_read(path), settings.kind, settings.end_of_document, str(path))
    return HuggingFaceTokenizer.from_path(path, settings.end_of_document)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that `save` wrote to `folder`. Raises DataError if files are missing or damaged."""
    folder = Path(folder)
    path = folder / DESCRIPTION_NAME
    try:
        description = parse_json(_read(path))
        kind, version, end = description["kind"], description["version"], description.get("end_of_document")
        if not isinstance(end, str | None):
            raise TypeError(f"end_of_document={end}")
    except (AttributeError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error!r}); copy the folder again or prepare the data again") from error
    if version != VERSION or kind not in KINDS:
        raise DataError(
            f"{path} describes a {kind} tokenizer in version {version}, but this program knows {', '.join(KINDS)} in "
            f"version {VERSION}; update the program or prepare the data again"
        )
    if kind == "gpt2":
        return GPT2Tokenizer.load(folder)
    if kind == "huggingface":
        if end is None:
            raise DataError(f"{path} does not say which token ends a document; copy the folder again")
        return HuggingFaceTokenizer.load(folder, end)
    path = folder / SentencePieceTokenizer.FILE
    return SentencePieceTokenizer(_read(path), kind, end, str(path))


def _save_description(folder: Path, kind: str, **details: Any) -> None:
    description = {"kind": kind, "version": VERSION} | details
    (folder / DESCRIPTION_NAME).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def _read(path: Path) -> bytes:
    try:
        return read_file(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; name a tokenizer's file") from error


class SentencePieceTokenizer:
    """A SentencePiece model: any, or one trained by us (kind "sentencepiece").

    `loses_nothing`: decode(encode(x)) == x, which holds for one trained by us with byte_fallback.
    """

    FILE = "tokenizer.model"
    SPACE_MARK = "\u2581"  # stands for a space inside SentencePiece, so as text it would come back as a space

    def __init__(
        self, model: bytes, kind: str, end_of_document: str | None = None, origin: str = "the trained model"
    ) -> None:
        self.kind = kind
        self.model = model
        self.end_piece = end_of_document
        try:
            self.processor = SentencePieceProcessor(model_proto=model)
            self.vocab_size: int = self.processor.vocab_size()
            for index in range(self.vocab_size):
                self.processor.id_to_piece(index)  # raises UnicodeDecodeError for one that is no text
        except (RuntimeError, TypeError, UnicodeDecodeError) as error:
            raise DataError(f"{origin} is no SentencePiece model; name another file") from error
        self.end_of_document: int = self._find_end(origin)
        mark = [f"<0x{byte:02X}>" for byte in self.SPACE_MARK.encode()]
        ids = [self.processor.piece_to_id(piece) for piece in mark]
        has_bytes = all(self.processor.is_byte(i) for i in ids)
        # Of our own training, and unknown characters become bytes.
        self.loses_nothing = kind == "sentencepiece" and has_bytes
        self._space_mark_ids = ids if self.loses_nothing else None
        self.words = self._find_words() if self.loses_nothing else None

    def _find_words(self) -> re.Pattern[str] | None:
        """Only of BPE: unigram's sums of scores are rounded differently in a part than in the whole.

        Without bytes a run of unknown characters is one token, and a space mark in the text is a space: both join what
        the patterns separate, so such a model encodes whole texts.
        """
        processor = self.processor
        ids = [i for i in range(self.vocab_size) if not (processor.is_byte(i) or processor.is_control(i))]
        if processor.unk_id() not in ids:
            return None
        ids.remove(processor.unk_id())
        if [processor.get_score(i) for i in ids] != [-float(rank) for rank in range(len(ids))]:
            return None  # a BPE's scores are the order of its merges
        return exact_pattern(SENTENCEPIECE_WORDS, (processor.id_to_piece(i).replace(self.SPACE_MARK, " ") for i in ids))

    def _find_end(self, origin: str) -> int:
        if self.end_piece is None:
            if self.processor.eos_id() < 0:
                raise ConfigError(
                    f"{origin} has no end-of-sentence piece; name one with tokenizer.end_of_document=PIECE"
                )
            return self.processor.eos_id()
        identifier: int = self.processor.piece_to_id(self.end_piece)
        if self.processor.id_to_piece(identifier) != self.end_piece:
            raise ConfigError(
                f"tokenizer.end_of_document={self.end_piece} is no piece of {origin}; leave it out or name another"
            )
        return identifier

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.processor.encode(texts, out_type=int, num_threads=1)
        if self._space_mark_ids:
            for i, text in enumerate(texts):
                if self.SPACE_MARK in text:
                    ids[i] = self._encode_with_marks(text)
        return ids

    def _encode_with_marks(self, text: str) -> list[int]:
        """Each space mark of the text as its three bytes, which decode to itself."""
        first, *rest = self.processor.encode(text.split(self.SPACE_MARK), out_type=int)
        return list(first) + [token for part in rest for token in (self._space_mark_ids or []) + part]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.processor.decode([int(i) for i in ids]))

    def normalized(self, text: str) -> str:
        if self.loses_nothing:
            return text
        plain = str(self.processor.normalize(text)).replace(self.SPACE_MARK, " ")
        adds_prefix = str(self.processor.normalize("a")).startswith(self.SPACE_MARK)
        return plain.removeprefix(" ") if adds_prefix else plain

    def save(self, folder: Path) -> None:
        (folder / self.FILE).write_bytes(self.model)
        _save_description(folder, self.kind, end_of_document=self.end_piece)


class GPT2Tokenizer:
    """GPT-2's byte-level BPE by tiktoken, saved as its ranks, which tiktoken would ask the network for."""

    FILE = "gpt2.tiktoken"
    kind = "gpt2"
    vocab_size = 50257
    end_of_document = 50256
    words: re.Pattern[str] | None = GPT2_WORDS
    # Public in tiktoken's sources; as a possessive pattern it matches the same as the one that OpenAI published.
    PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

    def __init__(self, ranks: dict[bytes, int]) -> None:
        self.ranks = ranks
        self.encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=self.PATTERN,
            mergeable_ranks=ranks,
            special_tokens={END_OF_DOCUMENT: self.end_of_document},
            explicit_n_vocab=self.vocab_size,
        )

    @classmethod
    def from_tiktoken(cls) -> GPT2Tokenizer:
        """From tiktoken's cache or the network. Raises DataError if neither has it."""
        return cls(find_ranks())

    @classmethod
    def load(cls, folder: Path) -> GPT2Tokenizer:
        return cls(read_ranks(folder / cls.FILE))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encoding.encode_ordinary(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self.encoding.decode([int(i) for i in ids])

    def normalized(self, text: str) -> str:
        return text

    def save(self, folder: Path) -> None:
        write_ranks(self.ranks, folder / self.FILE)
        _save_description(folder, self.kind)


class HuggingFaceTokenizer:
    """Any tokenizer of the `tokenizers` library."""

    FILE = "tokenizer.json"
    kind = "huggingface"

    def __init__(self, tokenizer_json: str, end_token: str, origin: str) -> None:
        try:
            self.backend = Backend.from_str(tokenizer_json)
        except BaseException as error:  # nothing more specific, and no Exception where the library's Rust code panics
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise DataError(f"{origin} is no Hugging Face tokenizer ({error}); name another file") from error
        end = self.backend.token_to_id(end_token)
        if end is None:
            raise ConfigError(f"tokenizer.end_of_document={end_token} is no token of {origin}; name another")
        # A file may ask for padding, truncation to its model's context, and merges left out at random (dropout).
        self.backend.no_padding()
        self.backend.no_truncation()
        if isinstance(self.backend.model, BPE):
            self.backend.model.dropout = None
        # Text that spells special tokens is text, and what ends a document is special, whatever the file says.
        self.backend.encode_special_tokens = True
        known = self.backend.get_added_tokens_decoder().get(end)
        if known is None or not known.special:
            self.backend.add_special_tokens([AddedToken(end_token, normalized=False, special=True)])
        self.vocab_size = _count_ids(self.backend, origin)
        self.end_token = end_token
        self.end_of_document: int = end
        self.words = GPT2_WORDS if _is_like_gpt2(json.loads(self.backend.to_str())) else None

    @classmethod
    def from_path(cls, path: Path, end_token: str | None) -> HuggingFaceTokenizer:
        folder = path if path.is_dir() else path.parent
        file = path / cls.FILE if path.is_dir() else path
        try:
            tokenizer_json = read_file(file).decode() if file.is_file() else _convert_slow_tokenizer(folder)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file} cannot be read ({error}); name a tokenizer.json or its folder") from error
        end_token = end_token or _configured_end(folder)
        if end_token is None:
            raise ConfigError(f"{folder} does not say which token ends a text; give tokenizer.end_of_document=TOKEN")
        return cls(tokenizer_json, end_token, str(file))

    @classmethod
    def load(cls, folder: Path, end_token: str) -> HuggingFaceTokenizer:
        return cls(_read(folder / cls.FILE).decode(errors="replace"), end_token, str(folder / cls.FILE))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.backend.decode([int(i) for i in ids], skip_special_tokens=False))

    def normalized(self, text: str) -> str:
        return str(self.backend.normalizer.normalize_str(text)) if self.backend.normalizer else text

    def save(self, folder: Path) -> None:
        (folder / self.FILE).write_text(self.backend.to_str(), encoding="utf-8")
        _save_description(folder, self.kind, end_of_document=self.end_token)


def _count_ids(backend: Backend, origin: str) -> int:
    """One more than the largest id. Raises DataError where tokens share an id, or an id is far too large."""
    ids = Counter(backend.get_vocab(with_added_tokens=True).values())
    shared, tokens = ids.most_common(1)[0]
    if tokens > 1:  # the library would save one of them, and not always the same
        raise DataError(f"{origin}: {tokens} tokens have the id {shared}; name a file in which each has its own")
    largest = max(ids)
    if largest >= MOST_IDS:  # the library would make a list of all ids that no token has
        raise DataError(f"{origin}: a token has the id {largest}, and ids are less than {MOST_IDS}; name another file")
    return largest + 1


def _is_like_gpt2(description: dict[str, Any]) -> bool:
    """Whether text is cut by GPT-2's pattern before anything else happens to it."""
    before, model = description["pre_tokenizer"] or {}, description["model"]
    return (
        description["normalizer"] is None
        and before.get("type") == "ByteLevel"
        and before.get("use_regex") is True
        and before.get("add_prefix_space") is False
        and model["type"] == "BPE"
        and not model.get("dropout")
        and all(token["special"] for token in description["added_tokens"])
    )


def _configured_end(folder: Path) -> str | None:
    """`eos_token` of the folder's tokenizer_config.json, which is a string or an object with its content."""
    path = folder / "tokenizer_config.json"
    try:
        token = parse_json(read_file(path))["eos_token"] if path.is_file() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _convert_slow_tokenizer(folder: Path) -> str:
    """tokenizer.json of a folder that holds only a tokenizer's older files. Raises DataError."""
    from transformers import AutoTokenizer  # noqa: PLC0415 (takes seconds)

    try:
        backend = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        ).backend_tokenizer
        return str(backend.to_str())
    except Exception as error:  # of many kinds, one for each file and library that may be missing
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"tokenizer.path={folder} holds no tokenizer that can be read ({reason}); name another"
        ) from error
