"""Stand-ins for characters, so that a text spells no special piece of a unigram model.

A unigram model of the `tokenizers` library takes text that spells any piece for that piece. SentencePiece does so for
normal pieces only: text that spells <unk>, </s> or the byte <0x41> is made of others. So the model's text gets another
character, of those that Unicode leaves to each program, where it has one that a special piece begins with, and so do
the normal pieces; special pieces keep their spelling, which no text has then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import decoders, normalizers

PRIVATE_USE = range(0xE000, 0xF900)


@dataclass(frozen=True)
class StandIns:
    """`characters` of a text -> what it has instead; `marks` and `unknown` are in no piece either."""

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
        # One that is only in longer pieces would become its stand-in's bytes and not its own where it is alone.
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
        """A normal piece as the model has it."""
        return "".join(self.characters.get(character, character) for character in piece)

    def normalization(self) -> list[Any]:
        """Steps that put stand-ins into a text. One that the text itself has becomes what it was before: unknown.

        Each is followed by a mark that says which of the two it is, until all are there.
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
