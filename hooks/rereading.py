"""Worlds that a call under held plans reads: the call is made again for each of them, under that world's plan."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .backends import frames
from .backends.caching import cache_of
from .backends.checkpointing import buffers_kept, uncheckpointed
from .backends.native import Pass, Placement
from .backends.sources import all_reads, read_as_constants, read_tapes
from .decoding import Decodings
from .errors import PlanError
from .fed import Fed
from .forking import Fork
from .holding import Hold
from .layout import Layout
from .models.network import Network
from .plan.plan import Plan, World
from .plan.sites import Site
from .plan.tape import Tape
from .resolving import resolve

ENCODED = "encoder_outputs"
"""What a model that decodes is given of what it has encoded."""


@dataclass(frozen=True, eq=False)
class Rereading:
    """What is needed to make a call again for the worlds that are read in it.

    Attributes:
        network: the model.
        decodings: what is known of the texts that it is fed.
        force: what is held and in force during the call.
        looks: whether any of it may be at the sites of a tower, or of an encoder.
        features: the argument by which the model is given what was made before it is called: of images, or of a text.
    """

    network: Network
    decodings: Decodings
    force: list[Hold | Fork]
    looks: bool
    features: str

    def again(
        self, call: frames.Call, args: tuple[Any, ...], kwargs: dict[str, Any], fed: Fed, path: tuple[Any, ...]
    ) -> None:
        """Make a call once more for a world that is read, with that world's own cache in place of the caller's."""
        mirror = self.decodings.mirror(fed, path)

        def apart(value: Any) -> Any:
            return value if fed.cache is None or value is not fed.cache else mirror

        own = {name: apart(value) for name, value in kwargs.items()}
        if fed.encoded is not None:
            own[self.features] = self.encoded(fed, path, own.get(self.features))
        output = call.module(*map(apart, args), **own)
        cache = cache_of(output)
        if fed.cache is None and cache is not None:
            fed.decoding.mirrors[path] = cache

    def encoded(self, fed: Fed, path: tuple[Any, ...], given: Any) -> Any:
        """What the tower makes of the images in a world that is read, for a call that is given the features of images.

        Raises:
            PlanError: nobody looked at them under that world's plan.
        """
        assert fed.encoded is not None
        if path in fed.encoded:
            if self.features == ENCODED:
                return copy.copy(fed.encoded[path])
            if _places(fed.encoded[path]) != _places(given):
                raise PlanError(
                    "the prompt is fed in several calls, with a part of the images' features in each, and the plan "
                    "reads this world under another plan, or unedited: leave out prefill_chunk_size"
                )
            return dict(fed.encoded[path])
        if self.looks:
            raise PlanError(
                "the plan edits or reads the tower and reads this world under another plan, or unedited, in a call "
                "that is given the features of images (mm_encoder_outputs), which are one world's: give it the images"
            )
        return given

    def read(
        self,
        world: World,
        now: World,
        expose: frozenset[int],
        fed: Fed,
        again: Callable[[tuple[Any, ...]], Any],
        path: tuple[Any, ...] = (),
    ) -> dict[Any, Tape]:
        """Run the worlds that a world reads: those on the inputs of the call by making the call again.

        Args:
            world: the world, and `now` what of its plan is on tokens that are fed now. Where the text goes on, worlds
                of it are run in every call, for their caches.
            again: makes the call, for the world that is reached by a path.
            path: how this one was.
        """
        tapes: dict[Any, Tape] = {}
        constants, wanted = read_as_constants(now), all_reads([now])
        seed = self.force[-1].seed
        for key, (source, _) in all_reads([world if fed.caches else now]).items():
            sites = wanted[key][1] if key in wanted else []
            graph = torch.is_grad_enabled() and key not in constants
            if source.inputs is not world.inputs:
                if key in wanted:
                    tapes |= read_tapes(self.network, [now], seed, expose, only={key}, graph=graph)
                continue
            mine = (*path, key[0], *key[2:])
            live = fed.live(source.plan, self.network.sizes)
            # Held, so that no other plan takes the identity by which it is reached.
            fed.decoding.sources[mine] = source.plan
            if all(isinstance(one.plan, Plan) for one in self.force):
                self.force[0].read.setdefault(mine, (source.plan, set()))[1].update(live)
            part = World(source.inputs, Plan(tuple(source.plan[n] for n in live)))
            with torch.set_grad_enabled(graph):
                deeper = self.read(source, part, expose, fed, again, mine)
                values = self.repeat(part, deeper, sites, expose, seed, partial(again, mine), graph, fed.layout)
            tapes[key] = Tape(source.inputs, values, self.network.sizes)
        return tapes

    def repeat(
        self,
        world: World,
        tapes: dict[Any, Tape],
        sites: list[Site],
        expose: frozenset[int],
        seed: int,
        again: Callable[[], Any],
        graph: bool,
        layout: Layout,
    ) -> tuple[tuple[Site, Tensor], ...]:
        """Make the call again under other edits, and keep the values at some sites."""
        network, device = self.network, self.network.device
        program = resolve(world, network.sizes, tapes, device=device, seed=seed, layout=layout)
        placement = Placement(network, program.touched | {place.key for place in sites}, expose)
        run = Pass(placement, [program], [sites], graph)
        with ExitStack() as stack:
            # The user's own pass is to draw the same numbers (dropout) as this one, and as it would have without it.
            stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
            stack.enter_context(buffers_kept(network.module))
            if graph:
                stack.enter_context(uncheckpointed(network.module))
            stack.callback(placement.remove)
            placement.place()
            placement.swap(stack)
            stack.enter_context(placement.gate.expecting(network.module, run))
            again()
        program.report(run.states[0]).require_fired()
        return tuple(zip(sites, run.values(0), strict=True))


def _places(encoded: Any) -> int:
    """How many places of a text the features of images take, of those that a call is given."""
    found = getattr((encoded or {}).get("image"), "pooler_output", ())
    return sum(len(one) for one in found)
