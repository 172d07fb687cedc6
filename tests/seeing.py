"""Tiny vision-language models with random weights, their processors, and images, for tests in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tests.widening import widen_norms

TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
EYE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
PLACE = 100
"""The id that an image's features take the place of."""
LOOKS = ("pixel_values", "image_sizes", "image_grid_thw", "pixel_attention_mask")
"""What a tower is given."""


def _llava() -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision, text = CLIPVisionConfig(**EYE), LlamaConfig(**TEXT)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=PLACE))


MAKERS: dict[str, Callable[[], nn.Module]] = {"llava": _llava}
FAMILIES = list(MAKERS)


def make(family: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A fresh model with spread-out weights, in evaluation mode."""
    torch.manual_seed(0)
    model = MAKERS[family]().to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim > 1:
                parameter.copy_(noise * (0.5 if parameter.shape[-1] < 64 else 0.2))
            else:
                parameter.add_((0.2 * noise).to(dtype))
    widen_norms(model)
    return model


@cache
def shared(family: str) -> nn.Module:
    """A model that tests share, and do not change."""
    return make(family)


def batch(family: str, counts: list[int], side: str = "right", seed: int = 0) -> dict[str, Tensor]:
    """What a processor makes of rows with so many images each, of text of several lengths around them."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[list[int]] = []
    for number, count in enumerate(counts):
        row = [1, *_words(2 + number % 3, generator)]
        for _ in range(count):
            row += [*_image(family), *_words(1 + number % 2, generator)]
        rows.append([*row, *_words(2, generator)])
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[number, where], mask[number, where] = torch.tensor(row), 1
    made = {"input_ids": ids, "attention_mask": mask}
    return made | _pixels(family, counts, generator)


def _words(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(2, 90, (count,), generator=generator).tolist()


def _image(family: str) -> list[int]:
    return [PLACE] * {"llava": 16}[family]


def _pixels(family: str, counts: list[int], generator: torch.Generator) -> dict[str, Tensor]:
    count = sum(counts)
    if not count:
        return {}
    return {"pixel_values": torch.randn(count, 3, 16, 16, generator=generator, dtype=torch.float64)}


def tower_tokens(family: str, counts: list[int]) -> list[list[list[int]]]:
    """For each row and each of its images, the tokens of the tower that are its own, by position."""
    each, at, rows = {"llava": 17}[family], 0, []
    for count in counts:
        rows.append([list(range(at + n * each, at + (n + 1) * each)) for n in range(count)])
        at += count * each
    return rows


def packed(family: str) -> bool:
    """Whether a tower's values have no axis of images."""
    return family.startswith("qwen")


def called(family: str, made: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a processor made, as a careful user calls the model with it: positions count no padding."""
    if family.startswith("qwen"):
        return made
    return made | {"position_ids": (made["attention_mask"].cumsum(1) - 1).clamp_min(0)}


def longer(made: dict[str, Tensor], more: Tensor) -> dict[str, Tensor]:
    """What a processor made, with tokens [B, n] after each text."""
    ones = torch.ones_like(more)
    found = dict(made, input_ids=torch.cat([made["input_ids"], more], 1))
    found["attention_mask"] = torch.cat([made["attention_mask"], ones], 1)
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in made:
            found[name] = torch.cat([made[name], 0 * ones], 1)
    return found


def row(family: str, made: dict[str, Tensor], counts: list[int], number: int) -> dict[str, Tensor]:
    """One row of what a processor made, without padding."""
    keep = made["attention_mask"][number].bool()
    found = {
        name: value[number : number + 1, keep]
        for name, value in made.items()
        if value.ndim == 2 and len(value) == len(keep) * 0 + len(counts) and value.shape[1] == len(keep)
    }
    images = slice(sum(counts[:number]), sum(counts[: number + 1]))
    return found | {"pixel_values": made["pixel_values"][images]}
