"""Attention causality: counterfactual attention as a do(), what attention causes, and decoding without the priors.

CausalMM (Zhou et al. 2025, arXiv 2410.04780) and its neighbours, as compositions of worlds, plans and gates.
"""

from hooks import Branch, Moment
from interp.attention import evaluation, reference, relatives
from interp.attention.counterfactuals import attention, sampled
from interp.attention.decoding import Decoder, Term, debiased, plausible
from interp.attention.driving import driving_heads
from interp.attention.effects import attention_effect
from interp.attention.gates import Detector, Previous, ShareBelow, entropy, gated, open_where
from interp.attention.maps import image_map, overlay, said, token_map
from interp.attention.routes import Routes, route_effects

__all__ = [
    "Branch",
    "Decoder",
    "Detector",
    "Moment",
    "Previous",
    "Routes",
    "ShareBelow",
    "Term",
    "attention",
    "attention_effect",
    "debiased",
    "driving_heads",
    "entropy",
    "evaluation",
    "gated",
    "image_map",
    "open_where",
    "overlay",
    "plausible",
    "reference",
    "relatives",
    "route_effects",
    "said",
    "sampled",
    "token_map",
]
