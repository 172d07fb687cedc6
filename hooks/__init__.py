"""The engine: sites, interventions, plans, worlds and the executors that run them on a user's model.

It knows models and tensors, and no method; `interp` is the package that users import.
"""

from .audit import PRUNED, Audit, Entry
from .backends.job import Outcome, Outcomes
from .budget import budget_of, rows_per_pass
from .capturing import captured
from .compiled import Compiled
from .digest import digest_of, structure
from .errors import (
    CycleError,
    ElsewhereError,
    InputsError,
    InterpError,
    MetricError,
    ModelError,
    PathError,
    PlanError,
    ResultError,
    ShapeError,
    SiteError,
    UnfiredError,
    nearest,
)
from .files import pair, read_record, read_tensors, sha256, write_all
from .forking import Branch, Moment
from .generated import Generated
from .html import table
from .members import Members
from .meter import Meter
from .model import Model
from .models import register
from .models.architecture import Architecture
from .models.blocks import Attention, Block, Mlp, Sublayer
from .models.experts import Experts
from .models.positions import Rotary
from .models.projections import Outputs, Projection, linear_weight
from .models.swapping import swap_method
from .plan.alignment import Alignment, align
from .plan.columns import Columns
from .plan.context import Context
from .plan.inputs import Inputs
from .plan.interventions import (
    clamp,
    counterfactual,
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
from .plan.operations.attention import Attend, AttendBack, ForbidBack
from .plan.operations.moving import CopyScores, FromPositions
from .plan.pieces import joined
from .plan.plan import Intervention, Origin, Plan, Read, World, as_plan
from .plan.prompts import text_ids
from .plan.region import listed, resolve
from .plan.saving import fingerprint
from .plan.sites import DECODER, DIM, HEAD, KEY, KINDS, POS, TEXT, Index, Site, Span, execution_order, site, sites_of
from .plan.spans import Image, New, new
from .plan.tape import Tape
from .random import choice, hash_counters, normal, uniform
from .record import Edits, choose, record, run_chunks, run_worlds
from .running import Run
from .tail import Seen, Tail
from .wrapping import wrap

__all__ = [
    "DECODER",
    "DIM",
    "HEAD",
    "KEY",
    "KINDS",
    "POS",
    "PRUNED",
    "TEXT",
    "Alignment",
    "Architecture",
    "Attend",
    "AttendBack",
    "Attention",
    "Audit",
    "Block",
    "Branch",
    "Columns",
    "Compiled",
    "Context",
    "CopyScores",
    "CycleError",
    "Edits",
    "ElsewhereError",
    "Entry",
    "Experts",
    "ForbidBack",
    "FromPositions",
    "Generated",
    "Image",
    "Index",
    "Inputs",
    "InputsError",
    "InterpError",
    "Intervention",
    "Members",
    "Meter",
    "MetricError",
    "Mlp",
    "Model",
    "ModelError",
    "Moment",
    "New",
    "Origin",
    "Outcome",
    "Outcomes",
    "Outputs",
    "PathError",
    "Plan",
    "PlanError",
    "Projection",
    "Read",
    "ResultError",
    "Rotary",
    "Run",
    "Seen",
    "ShapeError",
    "Site",
    "SiteError",
    "Span",
    "Sublayer",
    "Tail",
    "Tape",
    "UnfiredError",
    "World",
    "align",
    "as_plan",
    "budget_of",
    "captured",
    "choice",
    "choose",
    "clamp",
    "counterfactual",
    "digest_of",
    "execution_order",
    "fingerprint",
    "freeze",
    "hash_counters",
    "here",
    "interchange",
    "intervene",
    "joined",
    "knockout",
    "linear_weight",
    "listed",
    "mean",
    "nearest",
    "new",
    "noise",
    "normal",
    "pair",
    "patch",
    "project_out",
    "read_record",
    "read_tensors",
    "recompute",
    "record",
    "register",
    "resample",
    "resolve",
    "rows_per_pass",
    "run_chunks",
    "run_worlds",
    "scale",
    "sha256",
    "site",
    "sites_of",
    "steer",
    "structure",
    "swap_method",
    "table",
    "text_ids",
    "uniform",
    "wrap",
    "write_all",
    "zero",
]
