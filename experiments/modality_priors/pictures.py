"""Pictures of one shape on a texture, with priors on its colour that are known: in words, in textures, in hints.

A colour c is drawn from pi_language(c | shape) * pi_vision(c | texture), normalised, and the pixels of the shape are c
plus a shift that they share plus noise. So the posterior of a picture is exactly proportional to
L(picture | c) * pi_language(c | word) * pi_vision(c | texture), and log L is known for every picture.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

SHAPES = ("disc", "square", "cross", "wedge")
COLOURS = ("cyan", "magenta", "yellow", "black")
TEXTURES = ("bars", "stripes", "checks", "dots")
RGB = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
"""Four corners of a cube that are equally far from one another."""
SIDE, SIZE = 24, 12
FAVOURITE_OF_SHAPE, FAVOURITE_OF_TEXTURE, HONEST = 0.7, 0.55, 0.7
"""How often a shape, alone, has its own colour (that of its number), a texture its own (that of its number plus 1,
around), and a hint is true."""
SHIFT, GRAIN = 0.5, 0.12
"""Deviations of the shift that all pixels of a shape share, and of every pixel, in the units of a colour."""
NONE = -1


@dataclass(frozen=True, eq=False)
class Scenes:
    """What pictures show, int64 [B] each; `NONE` where there is nothing of the kind.

    Attributes:
        shape: in `SHAPES`; it is asked for even where the picture shows none.
        texture: in `TEXTURES`; a plain grey picture has none.
        colour: the true one, in `COLOURS`.
        shown: bool, whether the shape is in the picture.
    """

    shape: Tensor
    texture: Tensor
    colour: Tensor
    shown: Tensor

    def __len__(self) -> int:
        return len(self.shape)

    def take(self, rows: Tensor | slice) -> Scenes:
        """Some of them."""
        return Scenes(self.shape[rows], self.texture[rows], self.colour[rows], self.shown[rows])


def log_language_prior(shape: Tensor, planted: bool = True) -> Tensor:
    """log pi_language(c | shape), [B, 4]; flat where no prior is planted."""
    return _favouring(shape, FAVOURITE_OF_SHAPE if planted else 0.25)


def log_visual_prior(texture: Tensor, planted: bool = True) -> Tensor:
    """log pi_vision(c | texture), [B, 4]; flat for a plain picture, and where no prior is planted."""
    known = _favouring((texture + 1) % len(COLOURS), FAVOURITE_OF_TEXTURE if planted else 0.25)
    return torch.where(texture[:, None] == NONE, torch.log(torch.tensor(0.25)), known)


def log_hint(hint: Tensor) -> Tensor:
    """log P(hint | c), [B, 4]; flat where there is none."""
    return torch.where(hint[:, None] == NONE, torch.log(torch.tensor(0.25)), _favouring(hint, HONEST))


def _favouring(favourite: Tensor, share: float) -> Tensor:
    same = torch.arange(len(COLOURS)) == favourite[:, None]
    return torch.where(same, torch.tensor(share), torch.tensor((1 - share) / (len(COLOURS) - 1))).log()


def log_prior(scenes: Scenes, planted: bool = True) -> Tensor:
    """Both priors together, normalised, [B, 4]."""
    both = log_language_prior(scenes.shape, planted) + log_visual_prior(scenes.texture, planted)
    return both.log_softmax(-1)


def draw_scenes(n: int, seed: int, planted: bool = True) -> Scenes:
    """Scenes as the world has them, every one with its shape in the picture."""
    draw = torch.Generator().manual_seed(seed)
    shape = torch.randint(len(SHAPES), (n,), generator=draw)
    texture = torch.randint(len(TEXTURES), (n,), generator=draw)
    found = Scenes(shape, texture, torch.zeros_like(shape), torch.ones(n, dtype=torch.bool))
    colour = torch.multinomial(log_prior(found, planted).exp(), 1, generator=draw)[:, 0]
    return replace(found, colour=colour)


def draw_hints(colour: Tensor, seed: int) -> Tensor:
    """What somebody says of the colours, int64 [B]: mostly the truth."""
    draw = torch.Generator().manual_seed(seed)
    return torch.multinomial(_favouring(colour, HONEST).exp(), 1, generator=draw)[:, 0]


def paint(scenes: Scenes, seed: int) -> tuple[Tensor, Tensor]:
    """Paint scenes.

    Args:
        scenes: what to show.
        seed: of places, phases and noise.

    Returns:
        Pictures [B, 3, 24, 24], about 0 to 1, and log L of each colour [B, 4]; flat where no shape is shown.
    """
    draw = torch.Generator().manual_seed(seed)
    n = len(scenes)
    at = torch.randint(1, SIDE - SIZE, (n, 2), generator=draw)
    phase = torch.randint(0, 6, (n, 2), generator=draw)
    ys, xs = (a[None].expand(n, -1, -1) for a in torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij"))
    grey = _texture(ys + phase[:, :1, None], xs + phase[:, 1:, None], scenes.texture)
    mask = _shape(ys - at[:, :1, None], xs - at[:, 1:, None], scenes.shape) & scenes.shown[:, None, None]
    colour = RGB[scenes.colour] + SHIFT * torch.randn(n, 3, generator=draw)
    picture = torch.where(mask[:, None], colour[:, :, None, None], grey[:, None])
    picture = picture + GRAIN * torch.randn(picture.shape, generator=draw)
    return picture, _log_likelihood(picture, mask)


def _log_likelihood(picture: Tensor, mask: Tensor) -> Tensor:
    """log L of each colour up to a constant, [B, 4]: the mean over the shape's pixels says all there is to know."""
    count = mask.sum((1, 2))
    mean = (picture * mask[:, None]).sum((2, 3)) / count.clamp_min(1)[:, None]
    squares = (mean[:, None] - RGB).square().sum(-1)
    return (-squares / (2 * (SHIFT**2 + GRAIN**2 / count.clamp_min(1)[:, None])) * (count > 0)[:, None]).log_softmax(-1)


def _texture(y: Tensor, x: Tensor, texture: Tensor) -> Tensor:
    """Light and dark grey, [B, 24, 24]."""
    kinds = torch.stack([x % 6 < 3, y % 6 < 3, (x % 6 < 3) ^ (y % 6 < 3), (x % 6 < 3) & (y % 6 < 3)], 1)
    light = kinds[torch.arange(len(texture)), texture.clamp_min(0)]
    return torch.where((texture == NONE)[:, None, None], 0.5, 0.4 + 0.2 * light)


def _shape(y: Tensor, x: Tensor, shape: Tensor) -> Tensor:
    """The pixels of a shape, bool [B, 24, 24], given their places within its box."""
    dy, dx, half = (y - (SIZE - 1) / 2).abs(), (x - (SIZE - 1) / 2).abs(), SIZE / 2
    box = (dy < half) & (dx < half)
    kinds = torch.stack(
        [dy**2 + dx**2 < half**2, box & (dy < 5) & (dx < 5), box & ((dy < 2) | (dx < 2)), box & (dx * 2 <= y)], 1
    )
    return kinds[torch.arange(len(shape)), shape]
