"""What a call is asked to run: inputs beside a plan, or a world, which brings its own."""

from __future__ import annotations

from typing import Any

from .errors import InputsError, PlanError
from .plan.inputs import Inputs
from .plan.plan import World


def parted(given: Any, plan: Any) -> tuple[Any, Any]:
    """What is given and the plan beside it; of a world its inputs and its own plan.

    Raises:
        PlanError: a world beside another plan.
    """
    if not isinstance(given, World):
        return given, plan
    if plan is not None:
        raise PlanError("a World brings its own plan")
    return given.inputs, given.plan


def asked(given: Any, plan: Any, caller: str) -> tuple[Inputs, Any]:
    """Inputs and a plan, or those of a world.

    Raises:
        PlanError: a world beside another plan.
        InputsError: neither inputs nor a world.
    """
    inputs, plan = parted(given, plan)
    if not isinstance(inputs, Inputs):
        raise InputsError(f"{caller} takes Inputs (from model.inputs), not {type(inputs).__name__}")
    return inputs, plan
