"""A model and a plan that are one compiled graph, called as a model is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .compiling import Graphs
from .errors import InputsError, PlanError
from .models.network import Network
from .plan.inputs import Inputs
from .plan.plan import Intervention, Plan, World, as_plan
from .plan.sites import Site, sites_of
from .plan.tape import Tape
from .running import Run


@dataclass(frozen=True, eq=False)
class Compiled:
    """A model and a plan that run as one compiled graph; see `Model.compile`.

    Attributes:
        model: the model.
        graphs: those that were compiled so far.
        plan: what is done where a call names no other.
        capture: what is kept where a call names nothing else.
    """

    model: Network
    graphs: Graphs
    plan: Plan
    capture: tuple[Site, ...]

    def __call__(
        self,
        inputs: Inputs | World,
        plan: Plan | Intervention | None = None,
        *,
        capture: Sequence[Site | str] | Site | str | None = None,
        grad: bool = False,
        seed: int = 0,
    ) -> Run:
        """Run inputs, as `Model.run` does, through the graph of the plan's structure.

        Args:
            inputs: from `Model.inputs()`, or a `World`, which brings its own plan.
            plan: another than `plan`.
            capture: other sites than `capture`.
            grad: keep the autograd graph; for gradients at captured sites see `Run.gradient`.
            seed: seed of random interventions.

        Raises:
            UnfiredError: an intervention never fired.
            ModelError: the model cannot be compiled under this plan.
        """
        if isinstance(inputs, World):
            if plan is not None:
                raise PlanError("a World brings its own plan")
            inputs, plan = inputs.inputs, inputs.plan
        if not isinstance(inputs, Inputs):
            raise InputsError(f"a compiled model takes Inputs (from model.inputs), not {type(inputs).__name__}")
        sites = list(self.capture) if capture is None else sites_of(capture)
        world = World(inputs, self.plan if plan is None else as_plan(plan))
        outcome, taps = self.graphs.run(world, sites, grad=grad, seed=seed)
        outcome.audit.require_fired()
        assert outcome.output is not None
        kept = tuple(zip(sites, outcome.values, strict=True))
        return Run(
            outcome.output, Tape(inputs, kept, self.model.sizes), outcome.audit, taps, self.model.architecture.headless
        )
