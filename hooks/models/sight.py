"""Prompts with images, as a user has them or as a processor made them, made into inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..errors import InputsError
from ..plan.inputs import Inputs
from ..plan.prompts import labelled, require_vocabulary
from .architecture import Architecture
from .checks import check_pictures

_KNOWN = ("input_ids", "attention_mask")


def inputs_with_images(
    arch: Architecture,
    processor: Any,
    prompts: Any,
    images: Any,
    padding: str,
    row_ids: Tensor | None,
    decode: Callable[[Sequence[int]], str] | None,
) -> Inputs:
    """Make inputs of texts and images, or of what a processor made of them; see `Model.inputs`.

    Raises:
        InputsError: there is no processor, or what it made is not of this model.
    """
    tower = arch.tower
    if tower is None:
        raise InputsError(f"a {arch.family} takes texts or token ids, and no images")
    if isinstance(prompts, Mapping):
        if images is not None:
            raise InputsError("what a processor made has its images within: give it alone")
        made, counts = dict(prompts), None
    else:
        made, counts = _processed(processor, prompts, images, padding, tower.nested)
    ids, mask = made.get("input_ids"), made.get("attention_mask")
    if not isinstance(ids, Tensor):
        raise InputsError("what a processor makes holds input_ids as a tensor: call it with return_tensors='pt'")
    inputs = Inputs.of(ids, mask, row_ids)
    inputs = replace(inputs, ids=inputs.ids.masked_fill(~inputs.mask, 0))
    require_vocabulary(inputs, arch.token_ids)
    given = {name: value for name, value in made.items() if name not in _KNOWN and value is not None}
    pictures = tower.look(inputs.ids, inputs.mask, given)
    inputs = replace(inputs, pictures=pictures)
    check_pictures(tower, inputs)
    if counts is not None:
        _require_in_rows(counts, [] if pictures is None else pictures.row.tolist(), tower.nested)
    return inputs if decode is None else labelled(inputs, decode)


def _processed(
    processor: Any, prompts: Any, images: Any, padding: str, nested: bool
) -> tuple[dict[str, Any], list[int]]:
    """What the processor makes, and how many images each row was given."""
    if processor is None:
        raise InputsError(
            "texts with images need the model's processor: wrap(model, processor); or give what it made, as a dict"
        )
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not all(isinstance(text, str) for text in texts):
        raise InputsError("images go with texts that say where they are; give ids and pixels as a processor made them")
    if padding not in ("left", "right"):
        raise InputsError(f"padding is 'left' or 'right', not {padding!r}")
    rows = _rows(images, len(texts))
    given = rows if nested else [image for row in rows for image in row]
    # Ours are rows of one width, on the side that is asked for, whatever the processor's tokenizer is set to.
    tokenizer = processor.tokenizer
    before = tokenizer.padding_side
    tokenizer.padding_side = padding
    try:
        some = {"images": given} if any(rows) else {}
        made = processor(text=texts, **some, padding=True, return_tensors="pt")
    except Exception as error:
        raise InputsError(f"the processor does not take these texts and images: {error}") from error
    finally:
        tokenizer.padding_side = before
    return dict(made), [len(row) for row in rows]


def _require_in_rows(counts: list[int], rows: list[int], tiled: bool) -> None:
    """Check that images stand in the rows that they were given for; a processor may take them as one list.

    Raises:
        InputsError: they do not.
    """
    found = [rows.count(row) for row in range(len(counts))]
    fits = [n >= m and (n > 0) == (m > 0) if tiled else n == m for n, m in zip(found, counts, strict=True)]
    if not all(fits):
        raise InputsError(
            f"the rows are given {counts} images, and their texts have places for {found}: a text says where each of "
            "its images is, by the token that the processor replaces"
        )


def _rows(images: Any, count: int) -> list[list[Any]]:
    """Images as a list for each row, of one, of several, or of none.

    Raises:
        InputsError: there are images for another number of rows.
    """
    if _is_image(images):
        images = [images]
    images = list(images)
    if len(images) != count:
        raise InputsError(
            f"images for {len(images)} rows, and there are {count} texts: give one for each row, a list where it has "
            "several, None where it has none"
        )
    rows = [[] if row is None else [row] if _is_image(row) else list(row) for row in images]
    for row in rows:
        for image in row:
            if not _is_image(image):
                raise InputsError(f"an image is one of PIL's, an array or a tensor, not {type(image).__name__}")
    return rows


def _is_image(value: Any) -> bool:
    if isinstance(value, Tensor) or hasattr(value, "__array__"):
        return getattr(value, "ndim", 3) in (2, 3)
    return hasattr(value, "convert") and hasattr(value, "size")
