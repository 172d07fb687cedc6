"""A tokenizer that can be read: one token for each word and each punctuation sign, saved as plain JSON."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path

from hooks import InputsError, nearest

SCHEMA = "interp.words/1"
BEGIN = "<s>"
PIECE = re.compile(rf"{BEGIN}|\w+|[^\w\s]")


class WordTokenizer:
    """A fixed list of words and punctuation signs, each of them one token; case matters.

    As text a word brings the space before it (``" Mary"``) and a sign does not (``","``), so tokens written one after
    the other read as a sentence. Text is taken with or without that space: both are the one token of the word.

    >>> words = WordTokenizer(["Mary", "met", "John", "."])
    >>> words("Mary met John.")
    {'input_ids': [0, 1, 2, 3, 4]}
    >>> words.convert_ids_to_tokens([0, 1, 2, 3, 4])
    ['<s>', ' Mary', ' met', ' John', '.']

    Args:
        words: the words and signs in the order of their ids, which begin at 1: id 0 is the beginning of a sequence.

    Raises:
        InputsError: a ValueError; an entry that is not one word or one sign, or that is there twice.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self.words: tuple[str, ...] = (BEGIN, *words)
        self._ids = {word: i for i, word in enumerate(self.words)}
        for i, word in enumerate(self.words):
            if not PIECE.fullmatch(word):
                raise InputsError(f"a token is one word or one punctuation sign; got {word!r}")
            if self._ids[word] != i:
                raise InputsError(f"{word!r} is in the list of words twice")

    def __len__(self) -> int:
        """Number of tokens V."""
        return len(self.words)

    def __repr__(self) -> str:
        return f"WordTokenizer({len(self)} tokens)"

    @property
    def bos_token_id(self) -> int:
        """The id of the token that begins every sequence."""
        return 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """Encode a text.

        Args:
            text: words and signs; how many spaces are between them makes no difference.
            add_special_tokens: whether to begin with the token ``<s>``.

        Returns:
            The ids under ``"input_ids"``.

        Raises:
            InputsError: a word that is not a token; the message names the nearest one that is.
        """
        if not isinstance(text, str):
            raise InputsError(f"the tokenizer takes one text, not {type(text).__name__}")
        ids = [self._id(piece) for piece in PIECE.findall(text)]
        return {"input_ids": [self.bos_token_id, *ids] if add_special_tokens else ids}

    def token(self, text: str) -> int:
        """The id of the one word or sign that a text is, with or without spaces around it.

        Raises:
            InputsError: the text is no token, or not one.
        """
        ids = self(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise InputsError(f"{text!r} is {len(ids)} tokens, {self.convert_ids_to_tokens(ids)}, and not one")
        return ids[0]

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """The text of each token: a word with the space before it, a sign without.

        Raises:
            InputsError: an id that is not a token's.
        """
        bad = [i for i in ids if not 0 <= i < len(self)]
        if bad:
            raise InputsError(f"token id {bad[0]} is outside the vocabulary (0 .. {len(self) - 1})")
        words = [self.words[i] for i in ids]
        return [f" {word}" if re.match(r"\w", word) else word for word in words]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a sequence, without the token that begins it and without a space in front.

        Raises:
            InputsError: an id that is not a token's.
        """
        return "".join(self.convert_ids_to_tokens([i for i in ids if i != self.bos_token_id])).removeprefix(" ")

    def to_json(self) -> str:
        """The words as JSON, one a line."""
        return json.dumps({"schema": SCHEMA, "words": self.words[1:]}, indent=1) + "\n"

    def save(self, path: str | PathLike[str]) -> None:
        """Write the words as JSON; a file that was there stays whole until the new one replaces it."""
        target = Path(path)
        written = target.with_name(target.name + ".part")
        written.write_text(self.to_json(), encoding="utf-8")
        os.replace(written, target)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> WordTokenizer:
        """Read what `save` wrote.

        Raises:
            InputsError: the file is something else.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputsError(f"{path} is not JSON: {error}") from error
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise InputsError(f"{path} is not a saved WordTokenizer: its schema is not {SCHEMA!r}")
        words = data.get("words")
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise InputsError(f"{path} has no list of words")
        return cls(words)

    def _id(self, word: str) -> int:
        if word not in self._ids:
            raise InputsError(f"{word!r} is not a word of this model{nearest(word, self.words)}")
        return self._ids[word]
