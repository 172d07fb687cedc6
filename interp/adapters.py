"""What a description of a model's parts is made of, for a family that is not known: see `interp.wrap`."""

from hooks import (
    Architecture,
    Attention,
    Block,
    Experts,
    Mlp,
    Outputs,
    Projection,
    Rotary,
    Sublayer,
    register,
    swap_method,
)

__all__ = [
    "Architecture",
    "Attention",
    "Block",
    "Experts",
    "Mlp",
    "Outputs",
    "Projection",
    "Rotary",
    "Sublayer",
    "register",
    "swap_method",
]
