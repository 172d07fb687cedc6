"""A model and a plan that are one compiled graph, called as a model is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .asked import asked
from .compiling import Graphs
from .errors import InputsError
from .generated import Generated
from .models.network import Network
from .plan.inputs import Inputs
from .plan.plan import Intervention, Plan, World, as_plan
from .plan.sites import Site, sites_of
from .plan.tape import Tape
from .running import Run
from .stepping import decoded


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
        inputs, plan = asked(inputs, plan, "a compiled model")
        sites = list(self.capture) if capture is None else sites_of(capture)
        world = World(inputs, self.plan if plan is None else as_plan(plan))
        outcome, taps = self.graphs.run(world, sites, grad=grad, seed=seed)
        outcome.audit.require_fired()
        assert outcome.output is not None
        kept = tuple(zip(sites, outcome.values, strict=True))
        return Run(
            outcome.output, Tape(inputs, kept, self.model.sizes), outcome.audit, taps, self.model.architecture.headless
        )

    def generate(
        self,
        prompts: Inputs | World,
        plan: Plan | Intervention | None = None,
        *,
        max_new_tokens: int,
        seed: int = 0,
        **options: Any,
    ) -> Generated:
        """Decode greedily with a static cache, each step a call of one graph, which a GPU replays.

        It equals `Model.generate` under the same plan, greedily decoded. The prompt is run under the plan as it is
        (not compiled). Rows go on to the last step, and `mask` says where they ended.

        Args:
            prompts: from ``Model.inputs(..., padding="left")``, or a `World`, which brings its own plan.
            plan: another than `plan`.
            max_new_tokens: S, one or more.
            seed: of random interventions.
            options: ``eos_token_id`` alone, as of `generate` of transformers.

        Raises:
            PlanError: new tokens whose scores, patterns or rotated keys are edited, or for which other worlds are read.
            ModelError: layers that slide, images, or a model that does not generate.
            UnfiredError: an intervention never fired.
        """
        prompts, plan = asked(prompts, plan, "a compiled model")
        odd = sorted(set(options) - {"eos_token_id"})
        if odd or max_new_tokens < 1:
            what = f"no {', '.join(odd)}" if odd else f"no {max_new_tokens} tokens"
            raise InputsError(f"a graph of one step decodes greedily, and knows {what}: Model.generate() takes those")
        todo = self.plan if plan is None else as_plan(plan)
        tokenizer = getattr(self.model, "tokenizer", None)
        return decoded(self.graphs, todo, prompts, max_new_tokens, seed, tokenizer, options)
