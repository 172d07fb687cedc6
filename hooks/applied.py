"""A plan held on a model while the user calls it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .audit import Audit
from .editing import Edits
from .errors import PlanError
from .inputs import Inputs
from .plan import Origin, Plan, World
from .session import Session, install
from .sites import Site
from .tape import Tape
from .worlds import exposed_layers, read_tapes

if TYPE_CHECKING:
    from .model import Model


class Applied:
    """A plan held on a model: each forward pass of the user's is one run of it."""

    def __init__(self, model: Model, plan: Plan, audit: Audit, seed: int) -> None:
        self.model, self.plan, self.audit, self.seed = model, plan, audit, seed
        self.busy = False
        self.session = Session([], [])
        self.unedited = _unedited_sites(plan)
        # Keys are needed to place the hooks; the inputs are known only when the user calls.
        self.empty = World(Inputs.of(torch.zeros(1, 1, dtype=torch.int64)), plan)
        self.expose = exposed_layers([self.empty], ())
        others = World(self.empty.inputs, _without_unedited(plan))
        self.tapes = read_tapes(model, [others], seed, self.expose)
        self.stack = ExitStack()

    def install(self) -> None:
        """Place the hooks."""
        with ExitStack() as stack:
            self.session.begin([Edits(self.empty, self.model.sizes, {}, self.seed)], [[]])
            self.session.watched = {place.key for place in self.unedited}
            stack.callback(self.model.module.register_forward_pre_hook(self.begin, with_kwargs=True).remove)
            install(self.session, self.model.architecture, stack, self.expose)
            # Only now, so that an error in between takes away what was placed so far.
            self.stack = stack.pop_all()

    def remove(self) -> None:
        """Take the hooks away."""
        self.stack.close()

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Learn what the user runs the model on, before it runs."""
        if self.busy:
            return
        inputs = _inputs_of_call(args, kwargs)
        world = World(inputs, self.plan)
        tapes = dict(self.tapes)
        if self.unedited:
            self.busy = True
            shadow = Edits(World(inputs), self.model.sizes, {}, self.seed)
            try:
                self.session.begin([shadow], [self.unedited], graph=torch.is_grad_enabled())
                module(*args, **kwargs)
            finally:
                self.busy = False
            values = tuple((p, self.session.kept[0][i]) for i, p in enumerate(self.unedited))
            tapes[("unedited", id(inputs))] = Tape(inputs, values, self.model.sizes)
        edits = Edits(world, self.model.sizes, tapes, self.seed)
        edits.audit = self.audit
        self.session.begin([edits], [[]])


def _unedited_sites(plan: Plan) -> list[Site]:
    found: list[Site] = []
    for item in plan:
        for read in item.reads:
            if read.source is Origin.UNEDITED:
                place = (item.site if read.site is None else read.site).whole
                if place not in found:
                    found.append(place)
    return found


def _without_unedited(plan: Plan) -> Plan:
    return Plan(tuple(i for i in plan if not any(r.source is Origin.UNEDITED for r in i.reads)))


def _inputs_of_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    """The inputs of a call of the user's, as far as positions and rows go."""
    cache = kwargs.get("past_key_values")
    if cache is not None and (not hasattr(cache, "get_seq_length") or cache.get_seq_length() > 0):
        raise PlanError(
            "this call continues from a key/value cache, which plans do not support yet; pass the whole text"
        )
    ids = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(ids, Tensor):
        embeds = kwargs.get("inputs_embeds")
        if not isinstance(embeds, Tensor):
            raise PlanError("the model is called without input_ids or inputs_embeds: positions cannot be told")
        ids = torch.zeros(embeds.shape[:2], dtype=torch.int64)
    mask = kwargs.get("attention_mask")
    if mask is None and len(args) > 1 and isinstance(args[1], Tensor) and args[1].shape == ids.shape:
        mask = args[1]
    return Inputs.of(ids, mask if isinstance(mask, Tensor) and mask.ndim == 2 else None)
