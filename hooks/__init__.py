"""The engine: sites, interventions, plans, worlds and the executors that run them on a user's model.

It knows models and tensors, and no method; `interp` is the package that users import.
"""

from .audit import Audit, Entry
from .backends.job import Outcome
from .errors import InterpError
from .model import Model, Run, wrap
from .plan.context import Context
from .plan.inputs import Alignment, Inputs, align
from .plan.interventions import (
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
from .plan.plan import Intervention, Plan, Read, World
from .plan.sites import KINDS, Site, Span, site
from .plan.tape import Tape
from .record import Edits, record, run_worlds

__all__ = [
    "KINDS",
    "Alignment",
    "Audit",
    "Context",
    "Edits",
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
    "record",
    "resample",
    "run_worlds",
    "scale",
    "site",
    "steer",
    "wrap",
    "zero",
]
