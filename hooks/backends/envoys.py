"""nnsight: a plan is played inside a trace, where envoys give what its sites hold and take what is made of it.

What is played is tensors, numbers and envoys alone, so a trace can be sent to where the model is: nnsight ships our
functions with it, and resolves envoys there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, PlanError
from ..layout import Layout
from ..lowering import Lowered, Lowering
from ..models import describe
from ..models.architecture import Architecture
from ..models.network import Network
from ..plan.inputs import Inputs
from ..plan.plan import Intervention
from ..plan.region import Entries
from ..plan.sites import Key, Site
from ..program import Program, State
from .exposing import INSIDE, placed
from .plain import require_plain
from .playing import Asked, Named, Visits, play
from .reaching import Parts, parts_of


def is_envoy(model: Any) -> bool:
    """Whether a model is one of nnsight's."""
    return any(kind.__name__ == "Envoy" and kind.__module__.startswith("nnsight.") for kind in type(model).__mro__)


@dataclass(frozen=True, eq=False)
class Played:
    """What a trace gave back: a state for each world, and what was kept of it, by its place among the captures."""

    states: list[State]
    kept: list[dict[int, Tensor]]
    captures: Sequence[Sequence[Site]]

    def values(self, world: int) -> tuple[Tensor, ...]:
        """What was kept of a world, in the order in which it was asked for."""
        return tuple(self.kept[world][number] for number in range(len(self.captures[world])))


class Traces:
    """Runs plans in traces of an nnsight model.

    Attributes:
        name: of the tool.
        envoy: the user's model.
        remote: as nnsight's `trace` takes it: False, True, a host, or ``"local"`` (all but sent).
    """

    name = "nnsight"

    def __init__(self, envoy: Any, remote: bool | str = False) -> None:
        if remote and not hasattr(envoy, "_remote_backend"):
            raise ModelError(
                f"{type(envoy).__name__} of nnsight runs here whatever remote= says: give the hub name of a model to "
                "nnsight's TransformersModel or LanguageModel"
            )
        if remote and remote != "local" and not getattr(envoy, "repo_id", ""):
            raise ModelError(
                "this model was given to nnsight with its weights, so no service knows it by a name: give nnsight the "
                'name of a model on the hub, or try the path with remote="local"'
            )
        if not remote and hasattr(envoy, "dispatch") and not getattr(envoy, "dispatched", True):
            # Its weights are read when it is first run, into other modules than those that we would describe.
            envoy.dispatch()
        self.envoy, self.remote = envoy, remote

    @property
    def module(self) -> nn.Module:
        """The model inside."""
        return self.envoy._module

    def describe(self, module: Any) -> Architecture:
        """The parts of the model inside."""
        found = describe(module)
        require_plain(found, "an nnsight model")
        why = "a trace of nnsight shows what a norm returns, and not what it divides by"
        scales = dict.fromkeys(("ln1_scale", "ln2_scale", "ln_final_scale"), why)
        return replace(found, missing={**found.missing, **scales})

    def require(self, ids: Tensor, mask: Tensor) -> None:
        """Nothing that a model takes is refused here."""

    def run_pass(
        self,
        network: Network,
        programs: Sequence[Program],
        inputs: Sequence[Inputs],
        captures: Sequence[Sequence[Site]],
        expose: frozenset[int],
        graph: bool = False,
    ) -> tuple[Played, Tensor]:
        """Run worlds along the batch of one forward pass in a trace; arguments as of `passes.run_pass`.

        Raises:
            PlanError: gradients through a model that runs elsewhere.
            ModelError: nnsight cannot reach a site.
        """
        if graph and self.remote:
            raise PlanError("gradients through a model that runs elsewhere do not come back: leave out grad=True")
        keys = {place.key for sites in captures for place in sites}.union(*(program.touched for program in programs))
        arch = network.architecture
        inside = {layer for name, layer, _ in keys if name in INSIDE} | {layer for _, layer in map(placed, expose)}
        parts = parts_of(self.envoy, arch, frozenset(keys), inside)
        visits = Visits(*_lowered(network, programs, captures), graph)
        given = network.arguments(
            torch.cat([i.ids for i in inputs]),
            torch.cat([i.mask for i in inputs]),
            torch.cat([i.positions for i in inputs]),
            torch.cat([i.pixels for i in inputs if i.pixels is not None]) if inputs[0].pixels is not None else None,
        )
        if parts.cap is not None and self.remote:
            raise PlanError(
                f"{arch.family} caps its logits in a line of its forward that cannot be switched off elsewhere: leave "
                "out edits and captures of the site logits (run().logits are there)"
            )
        with nullcontext() if parts.cap is None else arch.lift_cap():
            found = _traced(self.envoy, given, self.remote, parts, visits)
        states = [State({}, changes) for changes in found["changes"]]
        return Played(states, found["kept"], captures), logits_of_classes(network, found["logits"])


def logits_of_classes(network: Network, logits: Tensor) -> Tensor:
    """Logits with an axis of positions, which a classifier's lack."""
    return logits if network.architecture.readout is None else logits.unsqueeze(1)


def _traced(
    envoy: Any, given: Mapping[str, Any], remote: bool | str, parts: Parts, visits: Visits
) -> Mapping[str, Any]:
    import nnsight

    options: dict[str, Any] = {}
    if remote:
        # Where the model is there are none of our modules: what is played goes with the trace.
        nnsight.register(import_module(__name__.partition(".")[0]))
        options["remote"] = remote
    with envoy.trace(**given, **options):
        found = nnsight.save(play(envoy, parts, visits))
    return found


def _lowered(
    network: Network, programs: Sequence[Program], captures: Sequence[Sequence[Site]]
) -> tuple[tuple[Lowered, ...], tuple[tuple[tuple[Key, Entries | None], ...], ...]]:
    """Programs and captures without words."""
    lowered, kept = [], []
    for program, sites in zip(programs, captures, strict=True):
        layout: Layout = program.layout.window(program.window)
        lowering = Lowering(layout, network.device, network.dtype, torch.is_grad_enabled())
        lowered.append(_played(lowering.program(program), program))
        kept.append(tuple((place.key, lowering.capture(place, network.sizes)[0]) for place in sites))
    return tuple(lowered), tuple(kept)


def _played(lowered: Lowered, program: Program) -> Lowered:
    """A lowered program whose interventions are what is played of them, and print as they were asked for."""
    steps: dict[Key, tuple[Any, ...]] = {}
    for key, found in lowered.steps.items():
        asked = [program.plan[step.number] for step in found]
        steps[key] = tuple(
            replace(step, item=_asked(item, step.item))  # type: ignore[arg-type]
            for step, item in zip(found, asked, strict=True)
        )
    return Lowered(steps, lowered.held_back)


def _asked(item: Intervention, lowered: Intervention) -> Asked:
    """What is played of an intervention, and how it prints."""
    return Asked(Named(item.site.name), str(item), tuple(map(str, item.reads)), lowered.op, lowered.weight)
