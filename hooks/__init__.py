"""The engine: sites, interventions, plans, worlds and the executors that run them on a user's model.

It knows models and tensors, and no method; `interp` is the package that users import.
"""

from .audit import Audit, Entry
from .context import Context
from .errors import InterpError
from .inputs import Alignment, Inputs, align
from .interventions import (
    clamp,
    freeze,
    here,
    interchange,
    intervene,
    knockout,
    mean,
    noise,
    patch,
    project_out,
    recompute,
    resample,
    scale,
    steer,
    zero,
)
from .job import Outcome
from .model import Model, Run, wrap
from .plan import Intervention, Plan, Read, World
from .sites import KINDS, Site, Span, site
from .tape import Tape
from .worlds import run_worlds

__all__ = [
    "KINDS",
    "Alignment",
    "Audit",
    "Context",
    "Entry",
    "Inputs",
    "InterpError",
    "Intervention",
    "Model",
    "Outcome",
    "Plan",
    "Read",
    "Run",
    "Site",
    "Span",
    "Tape",
    "World",
    "align",
    "clamp",
    "freeze",
    "here",
    "interchange",
    "intervene",
    "knockout",
    "mean",
    "noise",
    "patch",
    "project_out",
    "recompute",
    "resample",
    "run_worlds",
    "scale",
    "site",
    "steer",
    "wrap",
    "zero",
]
