"""What a user asks to be kept: sites, names of sites in every layer, or everything."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .models.catalogue import SiteInfo
from .models.network import Network
from .plan.sites import KINDS, Site, sites_of


def captured(model: Network, asked: Any) -> list[Site]:
    """The sites that are meant by what a user asks for, each once.

    Args:
        model: the wrapped model.
        asked: sites, in either spelling; a site's name without a layer or an entry of ``model.sites()``, for all
            layers that have it; ``"all"``, for every site of the model (of several stacks, the main one); or several
            of these.

    Raises:
        SiteError: one of them is no site of the model.
    """
    several = [asked] if isinstance(asked, (str, Site, SiteInfo)) or not isinstance(asked, Iterable) else list(asked)
    found: list[Site] = []
    for one in several:
        if isinstance(one, SiteInfo) and one.stack is not None:
            found += _everywhere(model, one.name, one.stack)
            continue
        word = one.name if isinstance(one, SiteInfo) else one
        if isinstance(word, str) and word == "all":
            found += [place for name in KINDS for place in _everywhere(model, name)]
        elif isinstance(word, str) and word in KINDS and KINDS[word].per_layer:
            # A model that has it in no layer says so of the first.
            found += _everywhere(model, word) or [Site(word, 0)]
        else:
            found += sites_of(word)
    # resid_pre of a layer is resid_post of the one before, and is kept once where everything is asked for.
    return list(dict.fromkeys(found)) if "all" in several else found


def _everywhere(model: Network, name: str, stack: str | None = None) -> list[Site]:
    layers = range(model.architecture.depth(stack)) if KINDS[name].per_layer else (None,)
    return [place for place in (Site(name, layer, stack) for layer in layers) if place.key in model.sizes]
