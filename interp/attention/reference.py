"""The formulas of CausalMM's released code (The-Martyr/CausalMM), to compare with: not a do().

That code edits the attention of one layer of the image encoder, averages it over heads, resizes it to the grid of
patches and multiplies the features by it, where ours has the edited attention mix the values. It edits the attention of
the language model after the softmax, and hardly normalises it. Nothing here is a default.

Both branches of its decoder go on from the fact's key/value cache, and the image is in the first call alone; so from
the second token on its visual counterfactual equals its fact, and only the cut-off is left. `decoder` has that, too.
The call that would make the language branch was not released: here it is a world with a cache of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hooks import (
    Branch,
    Context,
    Inputs,
    Model,
    Moment,
    Plan,
    PlanError,
    SiteError,
    here,
    intervene,
    nearest,
    site,
    uniform,
)
from interp.attention.counterfactuals import layers_of
from interp.attention.decoding import Decoder, Term
from interp.attention.weighting import FORMS, Weighted, edited_attention, frames_of, weighted_features

__all__ = [
    "FORMS",
    "LANGUAGE_FORMS",
    "contrasted",
    "decoder",
    "edited_attention",
    "language",
    "visual",
    "weighted_features",
]

LANGUAGE_FORMS = ("random", "uniform", "reversed")


def contrasted(
    own: Tensor,
    visual: Tensor | None = None,
    language: Tensor | None = None,
    gamma: float = 0.5,
    epsilon: float = 0.1,
) -> Tensor:
    """(1 + n gamma) l - gamma l_v - gamma l_l over the n branches given, -inf where l < ln epsilon + max l.

    Args:
        own: [..., V]; `visual` and `language` alike.
        gamma, epsilon: with the defaults of the code.
    """
    z = own
    for branch in (visual, language):
        if branch is not None:
            z = z + gamma * (own - branch)
    return z.masked_fill(own < math.log(epsilon) + own.amax(-1, keepdim=True), -torch.inf)


def visual(model: Model, inputs: Inputs, form: str = "shuffle", *, seed: int = 0) -> Branch:
    """The world whose visual features are multiplied by the edited attention of the layer that they come from.

    The features are what the projector is given: of the layer that a LLaVA selects, else after the tower's last norm
    (before it, a factor for each patch would be divided out again). The released code knows square images alone, of a
    LLaVA; others are multiplied tile by tile and frame by frame, on their own grids. A class token is left alone.

    Args:
        model: the wrapped model, with a vision tower.
        inputs: of the prompts that will be decoded, with their images.
        form: see `edited_attention`.
        seed: of the draws, which are each image's own.

    Raises:
        InputsError: there are no images; in use, the call has other rows or images.
        PlanError: an unknown form.
        SiteError: no tower, or features of several layers.
    """
    if form not in FORMS:
        raise PlanError(f"unknown form {form!r}{nearest(str(form), FORMS)}; the code has {', '.join(FORMS)}")
    last = layers_of(model, "vision") - 1
    selected = getattr(model.module.config, "vision_feature_layer", None)
    if isinstance(selected, (list, tuple)) and len(selected) > 1:
        raise SiteError(f"the features are those of several layers of the tower, {list(selected)}; the code has one")
    normed = any(name == "ln_final" and stack == "vision" for name, _, stack in model.sizes)
    place = site("ln_final", stack="vision") if normed else site("resid_post", last, stack="vision")
    edit = Weighted(frames_of(model, inputs), form, seed)
    return Branch(Plan((intervene(place, edit, here(site("pattern", last, stack="vision")), ("pos",)),)))


def language(model: Model, form: str = "reversed", *, layers: range | list[int] | None = None, seed: int = 0) -> Branch:
    """The world whose language model attends as in the code, in all layers (or some): the rows do not sum to 1.

    Each query's weights become, on the keys j before it or at it, of the T of its call: ``"uniform"`` 1/T;
    ``"random"`` u_j over the sum of all T draws u; ``"reversed"`` the largest weight minus each. Windows are left out
    of account, as in the code. Its ``reverse_and_normalize`` is not offered: the first token has but itself to attend
    to, where it is 0/0, and every logit becomes nan.

    Args:
        model: the wrapped model.
        form: one of the three.
        layers: which; None for all.
        seed: of the draws.

    Raises:
        PlanError: an unknown form.
    """
    if form not in LANGUAGE_FORMS:
        if form == "reverse_and_normalize":
            raise PlanError(f"{form!r} is 0/0 at the first token, and nan at all others: take 'reversed', or a do()")
        raise PlanError(
            f"unknown form {form!r}{nearest(str(form), LANGUAGE_FORMS)}; there are {', '.join(LANGUAGE_FORMS)}"
        )
    edit = _Attending(form, seed)
    chosen = range(layers_of(model)) if layers is None else layers
    return Branch(Plan(tuple(intervene(site("pattern", layer), edit) for layer in chosen)))


def decoder(
    visual: Branch | None = None,
    language: Branch | None = None,
    *,
    gamma: float = 0.5,
    epsilon: float = 0.1,
    shared_cache: bool = True,
) -> Decoder:
    """The decoder of the code, for `debiased`: see `contrasted`.

    Args:
        visual, language: the worlds that are subtracted.
        gamma, epsilon: with the defaults of the code.
        shared_cache: whether the visual branch goes on from the fact's cache, as in the code, so that it says the same
            from the second token on; in a generation without a cache there is nothing to share.

    Raises:
        PlanError: no branch.
    """
    if visual is None and language is None:
        raise PlanError("the decoder of the code subtracts a visual branch, one of the language, or both")

    def first(own: Tensor, moment: Moment) -> float:
        return gamma if moment.step == 0 or moment.memory is None else 0.0

    terms = [] if visual is None else [Term((visual,), first if shared_cache else gamma)]
    terms += [] if language is None else [Term((language,), gamma)]
    return Decoder(tuple(terms), epsilon)


@dataclass(frozen=True, eq=False)
class _Attending:
    form: str
    seed: int

    def __call__(self, x: Tensor, *, ctx: Context) -> Tensor:
        assert ctx.key_pos is not None
        keys = ctx.key_pos.to(x.device)
        past = (keys[:, None] <= ctx.pos.to(x.device)[:, :, None])[:, None]  # [B, 1, T, K]
        total = keys.amax(-1) + 1
        if self.form == "uniform":
            made = (1 / total.to(x.dtype))[:, None, None, None].expand_as(x)
        elif self.form == "reversed":
            made = x.amax(-1, keepdim=True) - x
        else:
            where = list(ctx.counters(x.ndim))
            drawn = uniform(ctx.seed, self.seed, ctx.salt, *where)
            where[ctx.axes.index("key_pos")] = torch.arange(x.shape[-1], device=x.device).reshape(1, 1, 1, -1)
            every = uniform(ctx.seed, self.seed, ctx.salt, *where)
            among = torch.arange(x.shape[-1], device=x.device) < total[:, None]
            made = (drawn / torch.where(among[:, None, None], every, 0).sum(-1, keepdim=True)).to(x.dtype)
        return torch.where(past, made, 0)
