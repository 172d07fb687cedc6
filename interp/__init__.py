"""Causal analysis of transformers: state an intervention, run worlds, measure effects.

import interp as ip

model = ip.wrap(hf_model, tokenizer)
clean, corrupt = model.inputs(clean_prompts), model.inputs(corrupt_prompts)
metric = ip.logit_diff("she", "he")
result = ip.sweep(model, clean, corrupt, ip.grid("resid_pre", layer="all", pos="all"), metric=metric)
"""

try:
    from hooks import (
        Audit,
        Context,
        CycleError,
        ElsewhereError,
        Generated,
        Inputs,
        InputsError,
        InterpError,
        Intervention,
        MetricError,
        Model,
        ModelError,
        New,
        PathError,
        Plan,
        PlanError,
        Read,
        ResultError,
        Run,
        ShapeError,
        Site,
        SiteError,
        Span,
        Tape,
        UnfiredError,
        World,
        align,
        clamp,
        counterfactual,
        freeze,
        here,
        interchange,
        intervene,
        knockout,
        mean,
        new,
        noise,
        patch,
        project_out,
        recompute,
        resample,
        run_worlds,
        scale,
        site,
        steer,
        wrap,
        zero,
    )
except ImportError as error:  # a file of the user's that is called hooks.py hides the package that ships with interp
    import hooks as _found

    if getattr(_found, "run_worlds", None) is None:
        raise ImportError(
            f"interp needs the package 'hooks' that ships with it, but Python found {_found.__file__}; "
            "rename that file, or start Python elsewhere"
        ) from error
    raise

from interp import adapters, attention, kv, paths, plots, training
from interp.activations import Activations, save_activations
from interp.attention_view import AttentionView, attention_view
from interp.attribution import attribution
from interp.axes import Axis
from interp.by_step import by_step
from interp.checks import Conformance
from interp.evaluation import evaluate
from interp.grids import Grid, grid
from interp.lens import LogitLens, direct_logit_attribution, logit_lens
from interp.loading import load
from interp.metrics import (
    Metric,
    accuracy,
    cross_entropy,
    kl,
    log_prob,
    logit,
    logit_diff,
    metric,
    prob,
    rank,
)
from interp.pairing import paired
from interp.results import Result
from interp.similarity import similarity
from interp.suite import conformance
from interp.sweeps import sweep
from interp.version import __version__

__all__ = [
    "Activations",
    "AttentionView",
    "Audit",
    "Axis",
    "Conformance",
    "Context",
    "CycleError",
    "ElsewhereError",
    "Generated",
    "Grid",
    "Inputs",
    "InputsError",
    "InterpError",
    "Intervention",
    "LogitLens",
    "Metric",
    "MetricError",
    "Model",
    "ModelError",
    "New",
    "PathError",
    "Plan",
    "PlanError",
    "Read",
    "Result",
    "ResultError",
    "Run",
    "ShapeError",
    "Site",
    "SiteError",
    "Span",
    "Tape",
    "UnfiredError",
    "World",
    "__version__",
    "accuracy",
    "adapters",
    "align",
    "attention",
    "attention_view",
    "attribution",
    "by_step",
    "clamp",
    "conformance",
    "counterfactual",
    "cross_entropy",
    "direct_logit_attribution",
    "evaluate",
    "freeze",
    "grid",
    "here",
    "interchange",
    "intervene",
    "kl",
    "knockout",
    "kv",
    "load",
    "log_prob",
    "logit",
    "logit_diff",
    "logit_lens",
    "mean",
    "metric",
    "new",
    "noise",
    "paired",
    "patch",
    "paths",
    "plots",
    "prob",
    "project_out",
    "rank",
    "recompute",
    "resample",
    "run_worlds",
    "save_activations",
    "scale",
    "similarity",
    "site",
    "steer",
    "sweep",
    "training",
    "wrap",
    "zero",
]


def __dir__() -> list[str]:
    """What the package offers; modules that it is made of are importable, and not what one looks for."""
    return [*__all__, "__doc__", "__file__", "__name__", "__path__"]
