"""DoLa (Chuang et al. 2024, arXiv 2309.03883): against what an earlier layer would say."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hooks import Branch, Context, Model, Moment, Plan, SiteError, here, intervene, site
from interp.attention.decoding import Decoder, Term


def _taken(_x: Tensor, earlier: Tensor, ctx: Context) -> Tensor:
    return earlier


def early_exit(model: Model, layer: int) -> Branch:
    """The world in which the last block returns what `layer` did: its logits are that layer's read-out (a logit lens).

    Raises:
        SiteError: the layer is the last one or none.
    """
    last = model.n_layers - 1
    if not 0 <= layer < last:
        raise SiteError(f"an earlier layer is 0 to {last - 1}, not {layer}")
    earlier = here(site("resid_post", layer))
    return Branch(Plan((intervene(site("resid_post", last), _taken, earlier),)))


def dola(model: Model, layers: Sequence[int], eps: float | None = 0.1) -> Decoder:
    """z = log p - log q, where q is of the layer, among those given, that differs most from p (Jensen-Shannon).

    Args:
        model: the wrapped model.
        layers: the candidates; one makes DoLa-static.
        eps: cut-off.
    """

    def rule(worlds: Tensor, _moment: Moment) -> Tensor:
        logs = worlds.log_softmax(-1)
        own, early = logs[0], logs[1:]
        middle = torch.logaddexp(own, early) - torch.log(torch.tensor(2.0, device=own.device, dtype=own.dtype))
        divergence = 0.5 * ((own.exp() * (own - middle)) + (early.exp() * (early - middle))).sum(-1)  # [W - 1, B, T]
        chosen = divergence.argmax(0)[None, ..., None].expand(1, *own.shape)
        return own - early.gather(0, chosen)[0]

    return Decoder(tuple(Term((early_exit(model, layer),)) for layer in layers), eps, rule=rule)
