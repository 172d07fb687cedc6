"""Every function that a saved plan may name. Adding one: its file, its test, a line here, and its builder's export."""

from __future__ import annotations

from ..operation import Op
from .attention import Attend, AttendBack, ForbidBack, Knockout
from .counterfactual import RandomPattern, ReversedPattern, ShuffledPattern, UniformPattern
from .moving import CopyScores, FromPositions
from .patching import Freeze, Patch, PatchConstant
from .references import Mean, Resample
from .subspaces import Interchange, ProjectOut
from .values import Clamp, Noise, Recompute, Scale, Steer, Zero

OPERATIONS: dict[str, type[Op]] = {
    op.name: op
    for op in (
        Patch, PatchConstant, Freeze, Clamp, Zero, Mean, Resample, Noise, Steer, Scale, ProjectOut, Interchange,
        Knockout, Recompute, Attend, AttendBack, ForbidBack, CopyScores, FromPositions,
        RandomPattern, UniformPattern, ReversedPattern, ShuffledPattern,
    )
}  # fmt: skip
"""The functions by name. A function of the user's own is not among them, because loading a plan runs no code."""
