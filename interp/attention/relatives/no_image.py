"""Against the text alone: M3ID (Favero et al. 2024, arXiv 2403.14003) and PAI (Liu et al. 2024, 2407.21771)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hooks import Branch, InputsError, Intervention, Model, Moment, Plan, intervene, site
from interp.attention.decoding import Decoder, Term, Weight


def text_alone(images: Tensor) -> Branch:
    """The world in which the prompt has no image, as if it had been written without one.

    Args:
        images: bool [B, P], the columns of the prompt that are image tokens (``input_ids == image_token_id``).

    Raises:
        InputsError: no row has an image.
    """
    if not bool(images.any()):
        raise InputsError("no column is an image's: there is nothing to leave out")
    return Branch(hide=images)


def without_image(images: Tensor, weight: Weight = 1.0, eps: float | None = 0.1) -> Decoder:
    """z = l + w (l - l(no image)).

    Args:
        images: bool [B, P], the image tokens; rows without any are decoded as they are.
        weight, eps: of the branch.
    """
    return Decoder((Term((text_alone(images),), weight),), eps)


def m3id(images: Tensor, decay: float = 0.02, confident: float = 0.3) -> Decoder:
    """z = l + (1 - exp(-decay t)) / exp(-decay t) (l - l(no image)), where no token is as likely as `confident`.

    The longer the answer, the more of the picture is forgotten and the more is given back.

    Args:
        images: bool [B, P], the image tokens.
        decay: lambda, by token; t counts the tokens of the answer.
        confident: alpha, the probability from which on nothing is done.
    """

    def weight(own: Tensor, moment: Moment) -> Tensor:
        unsure = own.softmax(-1).amax(-1) < confident
        return unsure.to(own.dtype) * math.expm1(decay * (moment.step + 1))

    return Decoder((Term((text_alone(images),), weight),), None)


def attend_more(model: Model, alpha: float = 0.5, *, layers: Sequence[int] | str = "all", keys: Any = "image") -> Plan:
    """PAI's amplified attention: scores of the last token on image keys s become s + alpha |s|, before the softmax.

    Args:
        model: the wrapped model.
        alpha: how much.
        layers: which.
        keys: which keys; ``"image"``, or positions.
    """
    chosen = range(model.n_layers) if layers == "all" else layers
    return Plan(tuple(_more(layer, alpha, keys, pos) for layer in chosen for pos in (-1, "new")))


def _more(layer: Any, alpha: float, keys: Any, pos: Any) -> Intervention:
    def louder(scores: Tensor, ctx: Any) -> Tensor:
        return scores + alpha * scores.abs()

    return intervene(site("scores", layer, pos=pos, key_pos=keys), louder)


def pai(
    model: Model, images: Tensor, gamma: float = 1.1, alpha: float = 0.5, eps: float | None = 0.1, keys: Any = "image"
) -> Decoder:
    """z = gamma l - (gamma - 1) l(no image), where l is of the model that attends more to the image.

    Args:
        model: the wrapped model.
        images: bool [B, P], the image tokens.
        gamma, alpha: of the branch, and of the attention (see `attend_more`).
        eps: cut-off.
        keys: the image's key positions.
    """
    more = Branch(attend_more(model, alpha, keys=keys))
    return Decoder((Term((text_alone(images),), gamma - 1),), eps, own=more)
