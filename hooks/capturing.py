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
            layers that have it; ``"all"``, for every site of the model; or several of these.

    Raises:
        SiteError: one of them is no site of the model.
    """
    several = [asked] if isinstance(asked, (str, Site, SiteInfo)) or not isinstance(asked, Iterable) else list(asked)
    found: list[Site] = []
    for one in several:
        names = list(KINDS) if one == "all" else [one.name if isinstance(one, SiteInfo) else one]
        for name in names:
            everywhere = isinstance(name, str) and name in KINDS and KINDS[name].per_layer
            if everywhere or one == "all":
                layers = range(model.n_layers) if KINDS[name].per_layer else (None,)
                here = [place for place in (Site(name, layer) for layer in layers) if place.key in model.sizes]
                # A model that has it in no layer says so of the first.
                found += here if here or one == "all" else [Site(name, 0)]
            else:
                found += sites_of(name)
    # resid_pre of a layer is resid_post of the one before, and is kept once where everything is asked for.
    return list(dict.fromkeys(found)) if "all" in several else found
