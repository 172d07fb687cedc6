"""Prompts as a user has them, texts or token ids of any lengths, made into inputs; and texts into tokens and back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any
from unicodedata import combining

import torch
from torch import Tensor

from ..errors import InputsError, InterpError
from .inputs import Inputs
from .pieces import decode_pieces


def prepare(
    prompts: Any,
    mask: Tensor | None,
    row_ids: Tensor | None,
    padding: str,
    *,
    encode: Callable[[str], Sequence[int]],
    vocabulary: int,
    decode: Callable[[Sequence[int]], str] | None = None,
    bos_id: int | None = None,
) -> Inputs:
    """Make inputs of prompts; see `Model.inputs`.

    Args:
        prompts: texts, lists of token ids, or a tensor or array of ids [B, T].
        mask: [B, T], nonzero at real tokens, with a tensor of ids.
        row_ids: int [B].
        padding: the side on which ragged rows are padded.
        encode: from a text to token ids.
        vocabulary: V.
        decode: from token ids to their text; None where nobody knows it.
        bos_id: the token that texts begin with.

    Raises:
        InputsError: no prompt or an empty one, or ids outside the vocabulary.
    """
    if padding not in ("left", "right"):
        raise InputsError(f"padding is 'left' or 'right', not {padding!r}")
    if not isinstance(prompts, Tensor):
        prompts = _plain(prompts)
    if not isinstance(prompts, Tensor):
        rows = [encode(row) if isinstance(row, str) else row for row in _rows(prompts)]
        if mask is not None:
            raise InputsError("a mask goes with a tensor of ids; lists of ids are padded by themselves")
        empty = [i for i, row in enumerate(rows) if len(row) == 0]
        if empty:
            raise InputsError(f"rows {empty} have no token: an empty prompt cannot be run")
        prompts, mask = pad_rows(rows, padding)
    made = Inputs.of(prompts, mask, row_ids)
    # What stands at padding does not matter, but the embedding has to know it.
    made = replace(made, ids=made.ids.masked_fill(~made.mask, 0), bos_id=bos_id)
    require_vocabulary(made, vocabulary)
    return made if decode is None else labelled(made, decode)


def labelled(inputs: Inputs, decode: Callable[[Sequence[int]], str]) -> Inputs:
    """The inputs with the text of each token."""
    rows = [row[m].tolist() for row, m in zip(inputs.ids, inputs.mask, strict=True)]
    return replace(inputs, tokens=_labels(rows, decode))


def _labels(rows: Sequence[Sequence[int]], decode: Callable[[Sequence[int]], str]) -> tuple[tuple[str, ...], ...]:
    """The text of each token: what it adds to that of the token before it."""
    alone = cache(lambda i: decode([i]))

    @cache
    def after(before: int, i: int) -> str:
        both = decode([before, i])
        # Two parts of one character are more than the one after the other.
        return both[len(alone(before)) :] if both.startswith(alone(before)) else alone(i)

    return tuple(tuple(after(row[at - 1], i) if at else alone(i) for at, i in enumerate(row)) for row in rows)


def require_vocabulary(inputs: Inputs, vocabulary: int) -> None:
    """Check that token ids are from 0 to V - 1.

    Raises:
        InputsError: one is not.
    """
    low, high = inputs.id_range
    if low < 0 or high >= vocabulary:
        raise InputsError(f"token id {low if low < 0 else high} is outside the vocabulary (0 .. {vocabulary - 1})")


def pad_rows(rows: Sequence[Sequence[int]], padding: str) -> tuple[Tensor, Tensor]:
    """Pad ragged lists of ids on one side, with id 0.

    Returns:
        ids int64 [B, T] and mask bool [B, T].
    """
    width = max((len(row) for row in rows), default=0)
    ids = torch.zeros((len(rows), width), dtype=torch.int64)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if padding == "right" else slice(width - len(row), width)
        ids[i, where] = torch.tensor(list(row), dtype=torch.int64)
        mask[i, where] = True
    return ids, mask


def encode_text(tokenizer: Any, text: str, bos: bool | None = None) -> list[int]:
    """Token ids of a text, with the special tokens that the tokenizer adds by itself.

    Args:
        tokenizer: what encodes it.
        text: the text, which may begin with the text of BOS, as that of a chat template does.
        bos: True for exactly one BOS at the beginning, False for none but those that the text has; None for what the
            tokenizer does, with a warning where that makes two of one.

    Raises:
        InputsError: there is no tokenizer, or it has no BOS.
    """
    if tokenizer is None:
        raise InputsError("a text needs a tokenizer: wrap(model, tokenizer), or give token ids")
    known = bos_of(tokenizer)
    if bos is False:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = list(tokenizer(text)["input_ids"])
    if bos and known is None:
        raise InputsError("bos=True, and this tokenizer has no BOS token")
    while bos and ids[:2] == [known, known]:
        ids = ids[1:]
    if bos and ids[:1] != [known]:
        ids = [known, *ids]
    if bos is None and known is not None and ids[:2] == [known, known]:
        name = getattr(tokenizer, "bos_token", "BOS")
        warnings.warn(
            f"a text begins with {name!r}, and the tokenizer puts another one in front, so the model sees two: give "
            "inputs(..., bos=True) for one, bos=False for what the text has",
            stacklevel=5,
        )
    return ids


def bos_of(tokenizer: Any) -> int | None:
    """The id of the token that texts begin with, or None where there is none."""
    found = getattr(tokenizer, "bos_token_id", None)
    return found if isinstance(found, int) else None


def decode_ids(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of token ids; see `decode_pieces`.

    Raises:
        InputsError: there is no tokenizer.
    """
    if tokenizer is None:
        raise InputsError(f"the text of token ids {list(ids)} needs a tokenizer: wrap(model, tokenizer)")
    return decode_pieces(tokenizer, ids)


def one_token(tokenizer: Any, text: str) -> int:
    """The id of a text that is one token.

    Raises:
        InputsError: it is not, and the message shows its pieces; or the tokenizer does not know it.
    """
    ids = _encoded(tokenizer, text)
    if len(ids) == 1:
        _require_known(tokenizer, text, ids)
        return ids[0]
    pieces = [decode_ids(tokenizer, [i]) for i in ids]
    other = text.strip() if text != text.strip() else " " + text
    alternative = list(tokenizer(other, add_special_tokens=False)["input_ids"])
    hint = f"; {other!r} is one token here" if len(alternative) == 1 else ""
    raise InputsError(
        f"{text!r} is {len(ids)} tokens, {pieces}: an answer is one token{hint}; one of several stands at the "
        "end of the text, for metrics with pos='answer'"
    )


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text that stands within another one, without special tokens.

    Raises:
        InputsError: there are none, or the tokenizer does not know a part of it.
    """
    ids = _encoded(tokenizer, text)
    if not ids:
        raise InputsError(f"{text!r} is no token of this tokenizer")
    _require_known(tokenizer, text, ids)
    return ids


def _encoded(tokenizer: Any, text: str) -> list[int]:
    if tokenizer is None:
        raise InputsError(f"{text!r} needs a tokenizer: wrap(model, tokenizer), or give a token id")
    try:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    except InterpError:
        raise
    except Exception as error:  # whatever a tokenizer raises of a word that it does not have
        raise InputsError(f"the tokenizer does not know {text!r}: {error}") from error


def _require_known(tokenizer: Any, text: str, ids: Sequence[int]) -> None:
    """Raise InputsError where one of a text's tokens stands for any text that is not known, or they leave some out."""
    pieces = [str(piece) for piece in tokenizer.convert_ids_to_tokens(list(ids))]
    if text.strip() == "".join(pieces).strip():
        return
    core = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    unknown = {getattr(tokenizer, "unk_token", None), getattr(core, "unk_token", None), "<unk>", "[UNK]"} - {None}
    for token, piece in zip(ids, pieces, strict=True):
        if token == getattr(tokenizer, "unk_token_id", None) or piece in map(str, unknown):
            what = "that" if len(ids) == 1 else "a part of that"
            raise InputsError(
                f"the tokenizer does not know {text!r}: to it {what} is {piece!r}, as any unknown word is"
            )
    if not getattr(tokenizer, "is_fast", False):
        return
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    seen = {at for start, stop in spans for at in range(start, stop)}
    # Accents may be taken off on purpose.
    lost = [
        c for at, c in enumerate(text) if at not in seen and c.isprintable() and not c.isspace() and not combining(c)
    ]
    if lost:
        raise InputsError(f"the tokenizer does not know all of {text!r}: it leaves out {''.join(lost)!r}")


def _plain(prompts: Any) -> list[Any] | Tensor:
    """A list of prompts, or a tensor for an array of ids."""
    if isinstance(prompts, Inputs):
        raise InputsError("these are Inputs already")
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Mapping):
        raise InputsError(
            f"prompts are texts or token ids, not a {type(prompts).__name__} of {', '.join(map(repr, prompts))}; "
            "of what a tokenizer returns, give batch['input_ids'] and batch['attention_mask']"
        )
    if hasattr(prompts, "dtype") and hasattr(prompts, "tolist"):
        if getattr(prompts.dtype, "kind", "") in "biuf":
            return torch.as_tensor(prompts)
        texts = prompts.tolist()
        return texts if isinstance(texts, list) else [texts]
    if isinstance(prompts, (bytes, set, frozenset)) or not hasattr(prompts, "__iter__"):
        raise InputsError(f"prompts are texts, lists of token ids, or a tensor of ids, not {type(prompts).__name__}")
    return list(prompts)


def _rows(prompts: list[Any]) -> list[Any]:
    """Prompts as texts, or as lists of ids: ids without a list around them are one prompt.

    Raises:
        InputsError: no prompt, texts and ids together, or an id that is not an integer.
    """
    if not prompts:
        raise InputsError("no prompt is given")
    texts = [isinstance(p, str) for p in prompts]
    if all(texts):
        return prompts
    if any(texts):
        raise InputsError("prompts are texts or lists of token ids, not both in one list")
    listed = [p.tolist() if hasattr(p, "tolist") else p for p in prompts]
    rows = listed if all(isinstance(p, Sequence) for p in listed) else [listed]
    odd = [i for row in rows for i in row if not isinstance(i, int) or isinstance(i, bool)]
    if odd:
        raise InputsError(f"token ids are integers, not {odd[0]!r}")
    return rows
