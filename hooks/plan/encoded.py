"""Inputs of models that decode what they encode: a text, and what has been decoded of it so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..errors import InputsError
from .inputs import Inputs
from .prompts import decode_ids, labelled, require_vocabulary


def start_of(module: Any) -> int:
    """The token with which a model begins to decode.

    Raises:
        InputsError: its config does not say.
    """
    configs = (getattr(module, "config", None), getattr(module, "generation_config", None))
    told = [getattr(config, "decoder_start_token_id", None) for config in configs]
    start = next((one for one in told if isinstance(one, int)), None)
    if start is None:
        raise InputsError(f"the config of this {type(module).__name__} names no decoder_start_token_id")
    return start


def after_source(source: Inputs, decoded: Any, start: int, padding: str, tokenizer: Any, vocabulary: int) -> Inputs:
    """What is decoded of texts, as inputs that begin with the start token.

    Args:
        source: the texts that are encoded.
        decoded: a text or a list of ids for each row, or None for nothing yet.
        start: the token that each begins with.
        padding: the side on which shorter rows are padded.
        tokenizer: of texts, which adds no special tokens to these.

    Raises:
        InputsError: not as many as there are texts, or what are no tokens.
    """
    given: Sequence[Any] = [[]] * len(source) if decoded is None else decoded
    if isinstance(given, str):
        given = [given]
    if isinstance(given, torch.Tensor):
        given = given.tolist()
    if len(given) != len(source):
        raise InputsError(f"{len(given)} rows are decoded, of {len(source)} that are encoded")
    rows = [[start, *_ids(row, tokenizer)] for row in given]
    width = max(map(len, rows))
    if padding not in ("left", "right"):
        raise InputsError(f"padding is 'left' or 'right', not {padding!r}")
    fill = [(start,) * (width - len(row)) for row in rows]
    real = [[False] * len(pad) + [True] * len(row) if padding == "left" else [True] * len(row) + [False] * len(pad)
            for pad, row in zip(fill, rows, strict=True)]  # fmt: skip
    ids = [[*pad, *row] if padding == "left" else [*row, *pad] for pad, row in zip(fill, rows, strict=True)]
    made = Inputs.of(torch.tensor(ids), torch.tensor(real), source.row_ids)
    require_vocabulary(made, vocabulary)
    made = replace(made, source=source)
    return made if tokenizer is None else labelled(made, lambda one: decode_ids(tokenizer, one))


def _ids(row: Any, tokenizer: Any) -> list[int]:
    if isinstance(row, str):
        if tokenizer is None:
            raise InputsError("text needs a tokenizer: wrap(model, tokenizer), or give token ids")
        row = tokenizer(row, add_special_tokens=False).input_ids
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in row):
        raise InputsError(f"what is decoded is a text or a list of token ids for each row, not {row!r}")
    return list(row)
