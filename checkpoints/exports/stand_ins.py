"""Replaces characters of a text so that it contains no special piece of a unigram model.

A unigram model of the `tokenizers` library encodes text that spells any piece as that piece. SentencePiece does so for
normal pieces only: it encodes text that spells <unk>, </s> or the byte <0x41> with other pieces. To get the same ids,
each character with which a special piece begins is replaced by a stand-in, a character of Unicode's private use area,
in the text and in the normal pieces. Special pieces keep their spelling, which then occurs in no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import decoders, normalizers

PRIVATE_USE = range(0xE000, 0xF900)


@dataclass(frozen=True)
class StandIns:
    """`characters` of a text -> their stand-ins; `marks` and `unknown` are in no piece either."""

    characters: dict[str, str]
    marks: tuple[str, str]
    unknown: str
    without_piece: frozenset[str]  # those of `characters` that are in no normal piece
    byte_fallback: bool

    @classmethod
    def choose(cls, normal: Sequence[str], special: Sequence[str], byte_fallback: bool) -> StandIns:
        used = set().union(*normal, *special)
        unknown, mark, other_mark, *free = (chr(code) for code in PRIVATE_USE if chr(code) not in used)
        singles, contained = set(normal), set().union(*normal)
        # A character that is only in longer pieces would, alone, become the bytes of its stand-in instead of its own.
        usable = [
            character
            for character in sorted({piece[0] for piece in special})
            if not byte_fallback or character in singles or character not in contained
        ]
        return cls(
            dict(zip(usable, free, strict=False)),
            (mark, other_mark),
            unknown,
            frozenset(usable) - contained,
            byte_fallback,
        )

    def spell(self, piece: str) -> str:
        """A normal piece as it is in the converted model."""
        return "".join(self.characters.get(character, character) for character in piece)

    def normalization(self) -> list[Any]:
        """Steps that put stand-ins into a text; a stand-in that the text already has becomes unknown, as before.

        Until all are replaced, a mark after each stand-in distinguishes the two cases.
        """
        own, put = self.marks
        replaced = [(stand_in, stand_in + own) for stand_in in self.characters.values()]
        replaced += [(character, stand_in + put) for character, stand_in in self.characters.items()]
        for character, stand_in in self.characters.items():
            replaced.append((stand_in + own, self._bytes(stand_in) if self.byte_fallback else self.unknown))
            has_bytes = self.byte_fallback and character in self.without_piece
            replaced.append((stand_in + put, self._bytes(character) if has_bytes else stand_in))
        return [normalizers.Replace(old, new) for old, new in replaced]

    def decoding(self) -> list[Any]:
        """Steps that undo `spell`."""
        return [decoders.Replace(stand_in, character) for character, stand_in in self.characters.items()]

    def _bytes(self, character: str) -> str:
        return "".join(f"<0x{byte:02X}>" for byte in character.encode())
