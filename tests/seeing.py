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


ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
SIGNS: dict[str, Any] = {
    "image_token_id": PLACE,
    "video_token_id": 101,
    "vision_start_token_id": 102,
    "vision_end_token_id": 103,
}
PACKED: dict[str, Any] = {"patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2, "num_heads": 4}


def _qwen2_vl() -> nn.Module:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = dict(PACKED, depth=2, embed_dim=32, hidden_size=32, mlp_ratio=2)
    text = dict(TEXT, rope_parameters=ROPE)
    config = Qwen2VLConfig(text_config=text, vision_config=vision, **SIGNS)
    return _widened(Qwen2VLForConditionalGeneration(config))


def _qwen2_5_vl() -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    more = {"out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [2]}
    vision = dict(PACKED, depth=3, hidden_size=32, intermediate_size=48, **more)
    text = dict(TEXT, rope_parameters=ROPE)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **SIGNS)
    return _widened(Qwen2_5_VLForConditionalGeneration(config))


def _llava_next() -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**EYE),
        text_config=LlamaConfig(**TEXT),
        image_token_id=PLACE,
        image_grid_pinpoints=GRID,
    )
    return LlavaNextForConditionalGeneration(config)


def _llava_onevision() -> nn.Module:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**EYE),
        text_config=Qwen2Config(**TEXT),
        image_token_id=PLACE,
        video_token_id=101,
        image_grid_pinpoints=GRID,
    )
    return LlavaOnevisionForConditionalGeneration(config)


def _smolvlm() -> nn.Module:
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    text = dict(TEXT, model_type="llama")
    config = SmolVLMConfig(text_config=text, vision_config=EYE, image_token_id=PLACE, scale_factor=2, pad_token_id=0)
    return SmolVLMForConditionalGeneration(config)


def _idefics3() -> nn.Module:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    text = dict(TEXT, model_type="llama")
    config = Idefics3Config(text_config=text, vision_config=EYE, image_token_id=PLACE, scale_factor=2, pad_token_id=0)
    return Idefics3ForConditionalGeneration(config)


def _gemma3() -> nn.Module:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    kinds = ["sliding_attention", "full_attention"]
    text = dict(TEXT, head_dim=8, sliding_window=8, layer_types=kinds, query_pre_attn_scalar=8)
    config = Gemma3Config(
        text_config=text,
        vision_config=dict(EYE, vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_id=PLACE,
        boi_token_id=104,
        eoi_token_id=105,
    )
    return Gemma3ForConditionalGeneration(config)


GRID = [[16, 16], [16, 32], [32, 16], [32, 32]]
MAKERS: dict[str, Callable[[], nn.Module]] = {
    "llava": _llava,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "smolvlm": _smolvlm,
    "idefics3": _idefics3,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "gemma3": _gemma3,
}
FAMILIES = list(MAKERS)


def _widened(model: nn.Module) -> nn.Module:
    """The same model, whose tower turns its queries and keys in their own dtype, and not in float32."""
    import sys

    module = sys.modules[type(model).__module__]

    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos.unsqueeze(-2) + torch.cat([-second, first], -1) * sin.unsqueeze(-2)

    module.apply_rotary_pos_emb_vision = lambda q, k, cos, sin: (turned(q, cos, sin), turned(k, cos, sin))
    return model


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


SIZES = {"qwen2_vl": [(1, 4, 6), (1, 6, 4), (1, 2, 4)], "qwen2_5_vl": [(1, 6, 10), (1, 4, 6), (1, 6, 6)]}
"""Patches of the images, one after another, in time, height and width."""
TILED: dict[tuple[int, int], tuple[int, int]] = {(16, 16): (36, 2), (16, 32): (52, 3), (32, 30): (88, 5)}
"""Height and width of images that are seen in tiles, how many tokens of the text each takes, and how many tiles."""
PLACES = {"llava": 16, "smolvlm": 4, "idefics3": 4, "gemma3": 4}


def batch(family: str, counts: list[int], side: str = "right", seed: int = 0) -> dict[str, Tensor]:
    """What a processor makes of rows with so many images each, of text of several lengths around them."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[list[int]] = []
    for number, count in enumerate(counts):
        row = [1, *_words(2 + number % 3, generator)]
        for at in range(count):
            row += [*_image(family, number + at), *_words(1 + number % 2, generator)]
        rows.append([*row, *_words(2, generator)])
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[number, where], mask[number, where] = torch.tensor(row), 1
    made = {"input_ids": ids, "attention_mask": mask}
    kinds = {"qwen2_vl": "mm_token_type_ids", "qwen2_5_vl": "mm_token_type_ids", "gemma3": "token_type_ids"}
    if family in kinds:
        made[kinds[family]] = (ids == PLACE).long()
    return made | _pixels(family, counts, generator)


def _words(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(2, 90, (count,), generator=generator).tolist()


def _size(family: str, number: int) -> tuple[int, int, int]:
    return SIZES[family][number % len(SIZES[family])]


def _image(family: str, number: int) -> list[int]:
    if packed(family):
        time, height, width = _size(family, number)
        return [102, *[PLACE] * (time * height * width // 4), 103]
    if tiled(family):
        return [PLACE] * TILED[_tiled_size(number)][0]
    return [104, *[PLACE] * PLACES[family], 105]


def _tiled_size(number: int) -> tuple[int, int]:
    return list(TILED)[number % len(TILED)]


def tiled(family: str) -> bool:
    """Whether images are seen in tiles."""
    return family in ("llava_next", "llava_onevision")


def _pixels(family: str, counts: list[int], generator: torch.Generator) -> dict[str, Tensor]:
    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    # Which of the sizes that a family has each image is of.
    kinds = [number + at for number, mine in enumerate(counts) for at in range(mine)]
    count = len(kinds)
    if not count:
        return {}
    if tiled(family):
        sizes = [_tiled_size(number) for number in kinds]
        most = max(TILED[size][1] for size in sizes)
        pixels = random(count, most, 3, 16, 16)
        for number, size in enumerate(sizes):
            pixels[number, TILED[size][1] :] = 0
        return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
    if family in ("smolvlm", "idefics3"):
        pixels = torch.zeros(len(counts), max(counts), 3, 16, 16, dtype=torch.float64)
        shown = torch.zeros(len(counts), max(counts), 16, 16, dtype=torch.int64)
        for number, mine in enumerate(counts):
            pixels[number, :mine] = random(mine, 3, 16, 16)
            # Pixels of a part of the second image are padding.
            for at in range(mine):
                shown[number, at, :, : 8 if at else 16] = 1
        return {"pixel_values": pixels, "pixel_attention_mask": shown}
    if packed(family):
        grid = torch.tensor([_size(family, number) for number in kinds])
        return {"pixel_values": random(int(grid.prod(-1).sum()), 96), "image_grid_thw": grid}
    return {"pixel_values": random(count, 3, 16, 16)}


def tower_tokens(family: str, counts: list[int], embedded: bool = False) -> list[list[list[int]]]:
    """For each row and each of its images, the tokens of the tower that are its own, by position.

    Args:
        embedded: as the tower's embedding returns them, and not as its blocks have them.
    """
    at, rows = 0, []
    for number, count in enumerate(counts):
        rows.append([])
        for image in range(count):
            places = _places(family, number + image, embedded)
            rows[-1].append([at + place for place in places])
            at += len(places)
    return rows


def _places(family: str, number: int, embedded: bool) -> list[int]:
    if not packed(family):
        tiles = TILED[_tiled_size(number)][1] if tiled(family) else 1
        return list(range(tiles * (17 if family in ("llava", "llava_next") else 16)))
    _, height, width = _size(family, number)
    # Patches are ordered by windows of blocks, then blocks of 2 x 2, then within one.
    cells = [(y, x) for y in range(height) for x in range(width)]
    if family == "qwen2_5_vl" and not embedded:
        ordered = sorted(cells, key=lambda c: (c[0] // 4, c[1] // 4, c[0] // 2, c[1] // 2, c[0], c[1]))
    else:
        ordered = sorted(cells, key=lambda c: (c[0] // 2, c[1] // 2, c[0], c[1]))
    return [ordered.index(cell) for cell in cells]


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
    mask = made["attention_mask"]
    keep = mask[number].bool()
    found = {name: value[number : number + 1, keep] for name, value in made.items() if value.shape == mask.shape}
    first, last = sum(counts[:number]), sum(counts[: number + 1])
    pixels = made["pixel_values"]
    if family in ("smolvlm", "idefics3"):
        mine = slice(number, number + 1), slice(counts[number])
        return found | {name: made[name][mine] for name in ("pixel_values", "pixel_attention_mask")}
    if not packed(family):
        return found | {name: made[name][first:last] for name in ("pixel_values", "image_sizes") if name in made}
    grid = made["image_grid_thw"]
    ends = [0, *grid.prod(-1).cumsum(0).tolist()]
    return found | {"pixel_values": pixels[ends[first] : ends[last]], "image_grid_thw": grid[first:last]}
