"""Neighbours of counterfactual decoding, each a short composition of the same parts."""

from interp.attention.relatives.agla import agla, masked
from interp.attention.relatives.dola import dola, early_exit
from interp.attention.relatives.driving_heads import suppress
from interp.attention.relatives.icd import disturbance, icd
from interp.attention.relatives.no_image import attend_more, m3id, pai, text_alone, without_image
from interp.attention.relatives.route_gating import gate_routes
from interp.attention.relatives.vcd import diffused, vcd
from interp.attention.relatives.vti import shifts, vti

__all__ = [
    "agla",
    "attend_more",
    "diffused",
    "disturbance",
    "dola",
    "early_exit",
    "gate_routes",
    "icd",
    "m3id",
    "masked",
    "pai",
    "shifts",
    "suppress",
    "text_alone",
    "vcd",
    "vti",
    "without_image",
]
