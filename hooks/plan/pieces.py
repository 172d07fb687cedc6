"""The text of tokens, as the tokenizer that made them decodes them: pieces of words, of characters, and special tokens.

Inside, what is left of a character that is split between tokens stands as surrogates, one a byte (PEP 383), so that it
is whole again where its tokens are joined; outside as ``<0xC3>``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

SPACE, BYTE = "▁", re.compile(r"<0x([0-9A-F]{2})>")


def decode_pieces(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of token ids; a piece that begins a word keeps its space, whatever sign the tokenizer has for it.

    A piece that continues a word has no mark of that, unless it is the first; special and added tokens have their
    names. Bytes that are no whole character are written as ``<0xC3>``.
    """
    pieces = [str(piece) for piece in tokenizer.convert_ids_to_tokens(list(ids))]
    if not callable(getattr(tokenizer, "convert_tokens_to_string", None)):
        return "".join(pieces).replace("Ġ", " ").replace(SPACE, " ").replace("Ċ", "\n")
    try:
        how = _spelling(tokenizer, len(tokenizer))
    except TypeError:  # it has no length, or cannot be a key
        how = _spelling.__wrapped__(tokenizer, 0)
    before = [None, *pieces]
    return _shown("".join(how.text(i, piece, last) for i, piece, last in zip(ids, pieces, before, strict=False)))


def joined(labels: Sequence[str]) -> str:
    """The text of the labels of a row, in which a character that is split between tokens is one."""
    return re.sub(rf"(?:{BYTE.pattern})+", lambda found: _shown(BYTE.sub(_escaped, found[0])), "".join(labels))


def _escaped(found: re.Match[str]) -> str:
    byte = int(found[1], 16)
    return found[0] if byte < 0x80 else chr(0xDC00 + byte)


def _shown(text: str) -> str:
    whole = text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    return re.sub("[\udc80-\udcff]", lambda found: f"<0x{ord(found[0]) - 0xDC00:02X}>", whole)


@dataclass(frozen=True, eq=False)
class _Spelling:
    """How a tokenizer writes pieces.

    Attributes:
        spelled: from pieces to their text, the tokenizer's own.
        named: ids of special and added tokens, which stand for themselves.
        alphabet: from a character to the byte that it stands for, of byte-level pieces; else empty.
        fallback: whether ``<0xC3>`` is a byte.
        spaced: whether a space is written as `SPACE`.
    """

    spelled: Callable[[list[str]], str]
    named: frozenset[int]
    alphabet: dict[str, int]
    fallback: bool
    spaced: bool

    def text(self, i: int, piece: str, before: str | None) -> str:
        """The text of a piece after another one."""
        if i in self.named:
            return piece
        if self.alphabet:
            known = all(c in self.alphabet for c in piece)
            raw = bytes(self.alphabet[c] for c in piece) if known else piece.encode()
            return raw.decode("utf-8", "surrogateescape")
        byte = BYTE.fullmatch(piece) if self.fallback else None
        if byte is not None:
            return bytes([int(byte[1], 16)]).decode("utf-8", "surrogateescape")
        if self.spaced:
            return piece.replace(SPACE, " ")
        # Of words joined by spaces, and of marks of what continues a word, only the tokenizer knows.
        alone = self.spelled([piece])
        if before is None:
            return alone
        start, both = self.spelled([before]), self.spelled([before, piece])
        return both[len(start) :] if both.startswith(start) else alone


@lru_cache(maxsize=8)
def _spelling(tokenizer: Any, size: int) -> _Spelling:
    """How a tokenizer of some number of tokens writes pieces: found out by trying."""

    def gives(pieces: list[str], text: str) -> bool:
        try:
            return tokenizer.convert_tokens_to_string(pieces).strip() == text
        except Exception:  # a tokenizer may know its own pieces only
            return False

    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    named = frozenset(getattr(tokenizer, "all_special_ids", None) or ()) | frozenset(added)
    return _Spelling(
        tokenizer.convert_tokens_to_string,
        named,
        _bytes() if gives(["Ã", "«"], "ë") else {},
        gives(["<0xC3>", "<0xAB>"], "ë"),
        gives([f"{SPACE}a", f"{SPACE}b"], "a b"),
    )


def _bytes() -> dict[str, int]:
    """From a character of byte-level pieces to its byte (Radford et al. 2019): what prints stands for itself."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
