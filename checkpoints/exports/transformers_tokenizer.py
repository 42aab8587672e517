"""Writes a tokenizer of ours as tokenizer.json and tokenizer_config.json, which AutoTokenizer of transformers reads.

Each of our kinds becomes a tokenizer of the `tokenizers` library. Its ids are compared with ours on prose, on difficult
texts, and on the spelling of each special piece.

Pieces of a SentencePiece model have a mark, U+2581, for each space. Here they have the space itself, so that the mark
in a text is encoded as text, as in our own encoding.

As is usual in transformers, text that spells a special token such as the end of a document becomes that token. In
training it was encoded as text, as with `split_special_tokens=True`; the comparison uses that.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Sequence
from functools import cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE, Unigram

from checkpoints.exports.stand_ins import StandIns
from data_prep.documents import BadRecords
from data_prep.embedded import EmbeddedSource
from data_prep.manifest import TOKENIZER_FOLDER
from data_prep.tokenizers import (
    END_OF_DOCUMENT,
    GPT2Tokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)
from kraken_train.common.errors import DataError

SPACE_MARK = SentencePieceTokenizer.SPACE_MARK
UNIGRAM_MODEL, BPE_MODEL = 1, 2  # SentencePiece's numbers of its models,
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # and of kinds of pieces
HARD_TEXTS = (
    "", " ", "  ", "a", " a ", "a  b   c    d", "\n", "\n\n\n", "\t\tx\t", "\r\n", "aaaaaaa", "-----------", "........",
    "=" * 33, " " * 17 + "x", "naïve café, Ångström", "e\u0301 \u00e9", "日本語のテキスト", "Привет, мир", "مرحبا",
    "🦑 and 👩‍👩‍👧", "\u2581 mark \u2581\u2581", "\u2585", "\u00a0non-breaking", "x\u200by", "\ufeffbyte order",
    "\x00\x01",
    "½ ﬁ Ⅳ", "½\u0301", "\ue000 \ue001\ue002\ue003\ue004\ue005",
    "don't DON'T we'll", "3.14159, 1,000,000 and 0x7fff", "def f(x):\n    return x**2\n", "http://a.b/?c=d&e#f",
    "<unk> <s> </s>", "<0x41>", "a < b > c", "<<<", "<0x4", "</",
)  # fmt: skip
EMBEDDED_DOCUMENTS = 40
CHUNK = 2000  # characters of a text that is compared


def write_transformers_tokenizer(tokenizer: Tokenizer, folder: Path, context_length: int) -> str | None:
    """Write the files into `folder`. Returns a note for the user, or None if the ids are the same."""
    try:
        backend = convert(tokenizer)
    except DataError as error:
        return f"{error}; AutoTokenizer finds none in this export"
    end = backend.id_to_token(tokenizer.end_of_document)
    (folder / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "pad_token": end,  # padding is masked
        "padding_side": "left",  # so that all rows of a batch end with their last token
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    texts = comparison_texts(tokenizer)
    differing = differences(tokenizer, Backend.from_file(str(folder / "tokenizer.json")), texts)
    if not differing:
        return None
    return (
        f"AutoTokenizer does not give the ids that the model was trained with on {len(differing)} of {len(texts)} test "
        f"texts, for example {min(differing, key=len)[:60]!r}; the tokenizer in the export's folder "
        f"{TOKENIZER_FOLDER}/, which this program's commands use, does"
    )


def convert(tokenizer: Tokenizer) -> Backend:
    """Raises DataError for a kind that cannot be converted."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return convert_sentencepiece(tokenizer)
    if isinstance(tokenizer, GPT2Tokenizer):
        return convert_gpt2(tokenizer)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        backend = Backend.from_str(tokenizer.backend.to_str())
        return with_special(without_added_ends(backend), tokenizer.end_token)
    raise DataError(f"a {tokenizer.kind} tokenizer cannot be written for transformers")


def with_special(backend: Backend, token: str) -> Backend:
    """Add the token that ends documents as a special one, so that decoding can omit it."""
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
    return backend


def without_added_ends(backend: Backend) -> Backend:
    """Without the post-processor that adds tokens such as a beginning: the model was trained on texts without them."""
    if backend.num_special_tokens_to_add(is_pair=False):
        description = json.loads(backend.to_str())
        backend = Backend.from_str(json.dumps({**description, "post_processor": None}))
    return backend


# ---------------------------------------------------------------------------------------------------------------
# SentencePiece
# ---------------------------------------------------------------------------------------------------------------


def convert_sentencepiece(tokenizer: SentencePieceTokenizer) -> Backend:
    """Raises DataError for a model of words or characters."""
    model = parse_sentencepiece(tokenizer)
    kind, unknown = model.trainer_spec.model_type, tokenizer.processor.unk_id()
    byte_fallback = model.trainer_spec.byte_fallback
    pieces = [piece.piece.replace(SPACE_MARK, " ") for piece in model.pieces]
    normal = [index for index, piece in enumerate(model.pieces) if piece.type == NORMAL]
    stand_ins = None
    if kind == BPE_MODEL:
        # Pieces of other kinds, such as bytes, are never merged from smaller ones.
        merged = {pieces[index]: model.pieces[index].score for index in normal}
        backend = Backend(
            BPE(
                {piece: index for index, piece in enumerate(pieces)},
                merges_of(merged),
                unk_token=pieces[unknown],
                fuse_unk=True,
                byte_fallback=byte_fallback,
            )
        )
    elif kind == UNIGRAM_MODEL:
        special = [pieces[i] for i, piece in enumerate(model.pieces) if piece.type not in (NORMAL, USER_DEFINED)]
        stand_ins = StandIns.choose([pieces[index] for index in normal], special, byte_fallback)
        scores = [(piece, 0.0) for piece in pieces]
        for index in normal:
            scores[index] = (stand_ins.spell(pieces[index]), model.pieces[index].score)
        backend = Backend(Unigram(scores, unk_id=unknown, byte_fallback=byte_fallback))
    else:
        raise DataError("a SentencePiece model of words or characters cannot be written for transformers")
    backend.add_tokens(
        [
            AddedToken(pieces[index], normalized=False, special=entry.type == CONTROL)
            for index, entry in enumerate(model.pieces)
            if entry.type in (CONTROL, USER_DEFINED)
        ]
    )
    marks_as_text = tokenizer.kind == "sentencepiece" and byte_fallback
    steps, prefixed = normalization(model.normalizer_spec, mark_is_space=not marks_as_text)
    undo: list[Any] = [decoders.ByteFallback(), decoders.Fuse()]
    if stand_ins:
        steps += stand_ins.normalization()
        undo = [*stand_ins.decoding(), *undo]
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence([*undo, decoders.Strip(" ", left=1, right=0)] if prefixed else undo)
    return with_special(backend, pieces[tokenizer.end_of_document])


def parse_sentencepiece(tokenizer: SentencePieceTokenizer) -> Any:
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(tokenizer.model)
    return model


def merges_of(scores: dict[str, float]) -> list[tuple[str, str]]:
    """All ways to make each piece from two others, the best piece first, as SentencePiece chooses."""
    merges = []
    for piece in sorted(scores, key=lambda p: -scores[p]):
        merges += [
            (piece[:cut], piece[cut:])
            for cut in range(1, len(piece))
            if piece[:cut] in scores and piece[cut:] in scores
        ]
    return merges


def normalization(spec: Any, mark_is_space: bool) -> tuple[list[Any], bool]:
    """SentencePiece's normalization as steps, and whether a space is put before a text."""
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(r"\A "), "")]
    if mark_is_space:
        steps.append(normalizers.Replace(SPACE_MARK, " "))
    if spec.remove_extra_whitespaces:  # at the end marks of the text as well
        steps.append(normalizers.Replace(Regex(r" +\z"), ""))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    return steps, bool(spec.add_dummy_prefix)


# ---------------------------------------------------------------------------------------------------------------
# GPT-2
# ---------------------------------------------------------------------------------------------------------------


def convert_gpt2(tokenizer: GPT2Tokenizer) -> Backend:
    letters = byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    ranks = tokenizer.ranks
    merges = [halves(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1]
    backend = Backend(
        BPE(
            {spell(token): rank for token, rank in ranks.items()},
            [(spell(left), spell(right)) for left, right in merges],
        )
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    return with_special(backend, END_OF_DOCUMENT)


def halves(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that `token` was merged from: those that the merges before its own lead to."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        best = min(range(len(pairs)), key=pairs.__getitem__)
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


def byte_letters() -> dict[int, str]:
    """The printable characters by which byte-level tokenizers write bytes (OpenAI's GPT-2, bytes_to_unicode)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


# ---------------------------------------------------------------------------------------------------------------
# Comparing
# ---------------------------------------------------------------------------------------------------------------


def differences(tokenizer: Tokenizer, backend: Backend, texts: Sequence[str]) -> list[str]:
    """The texts that the two encode differently."""
    backend.encode_special_tokens = True
    ours = tokenizer.encode_batch(list(texts))
    theirs = backend.encode_batch(list(texts))
    return [text for text, a, b in zip(texts, ours, theirs, strict=True) if list(a) != list(b.ids)]


def comparison_texts(tokenizer: Tokenizer) -> list[str]:
    """Difficult texts, spellings of special pieces, English prose, and pieces of the vocabulary in random order.

    Also a long text and long runs of a character: a unigram model adds scores, and libraries round sums differently.
    """
    generator = random.Random(0)
    pieces = [tokenizer.decode([index]) for index in range(tokenizer.vocab_size) if index != tokenizer.end_of_document]
    whole = [piece for piece in pieces if "\ufffd" not in piece]  # not a part of a character
    special = special_spellings(tokenizer)
    around = [text for piece in special for text in (piece, f"a{piece}b", f" {piece} ", piece + piece)]
    mixed = ["".join(generator.choices([*whole, *special], k=50)) for _ in range(100)]
    runs = [piece[0] * 300 for piece in whole if len(piece) > 1 and len(set(piece)) == 1]
    return [*HARD_TEXTS, *around, *dict.fromkeys(runs), *prose(), "".join(prose()), *mixed]


def special_spellings(tokenizer: Tokenizer) -> list[str]:
    """The spellings of special pieces: ends, unknown, padding, bytes, added tokens."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        model = parse_sentencepiece(tokenizer)
        return [piece.piece for piece in model.pieces if piece.type != NORMAL]
    if isinstance(tokenizer, HuggingFaceTokenizer):
        added = [token.content for token in tokenizer.backend.get_added_tokens_decoder().values()]
        return [*dict.fromkeys([*added, *filter(None, [getattr(tokenizer.backend.model, "unk_token", None)])])]
    return [END_OF_DOCUMENT]


@cache
def prose() -> tuple[str, ...]:
    """The documentation of some modules of this Python, in parts; empty for a Python without its sources."""
    with contextlib.suppress(DataError):
        documents = islice(EmbeddedSource().documents(BadRecords("skip")), EMBEDDED_DOCUMENTS)
        return tuple(
            document.text[start : start + CHUNK] for document in documents for start in range(0, 5 * CHUNK, CHUNK)
        )
    return ()
