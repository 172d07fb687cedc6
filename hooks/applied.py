"""A plan held on a model while the user calls it."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .adapters.architecture import ImageFormat
from .audit import Audit
from .editing import Edits
from .errors import InputsError, PlanError
from .images import patch_grid
from .inputs import Inputs
from .plan import Origin, Plan, World
from .session import Session, install
from .sites import Site
from .tape import Tape
from .worlds import all_reads, exposed_layers, read_tapes

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
        self.others = [key for key in all_reads([self.empty]) if key[0] == "world"]
        self.stack = ExitStack()

    def install(self) -> None:
        """Place the hooks."""
        with ExitStack() as stack:
            self.session.begin([Edits(self.empty, self.model.sizes, {}, self.seed)], [[]])
            self.session.watched = {place.key for place in self.unedited}
            self.session.open = False
            root = self.model.module
            stack.callback(root.register_forward_pre_hook(self.begin, with_kwargs=True).remove)
            stack.callback(root.register_forward_hook(self.end, always_call=True).remove)
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
        call = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        call = call | call.get("kwargs", {})
        if call.get("logits_to_keep") is not None and ("logits", -1, None) in set(self.session.keys()):
            raise PlanError("the plan edits the logits, and this call computes only some of them (logits_to_keep)")
        inputs = _inputs_of_call(call, self.model.architecture.images)
        world, graph = World(inputs, self.plan), torch.is_grad_enabled()
        tapes: dict[Any, Tape] = {}
        if self.others:
            # Run anew for every call: in training the weights have changed since the last one.
            with self.model.suspended():
                tapes |= read_tapes(self.model, [world], self.seed, self.expose, only=self.others, graph=graph)
        if self.unedited:
            self.busy = True
            shadow = Edits(World(inputs), self.model.sizes, {}, self.seed)
            try:
                self.session.begin([shadow], [self.unedited], graph=graph)
                module(*args, **kwargs)
            finally:
                self.busy = False
            values = tuple((p, self.session.kept[0][i]) for i, p in enumerate(self.unedited))
            tapes[("unedited", id(inputs))] = Tape(inputs, values, self.model.sizes)
        edits = Edits(world, self.model.sizes, tapes, self.seed)
        edits.audit = self.audit
        self.session.begin([edits], [[]])

    def end(self, *_: Any) -> None:
        """From here on, until the next call of the model, nothing says which rows and positions a value is of."""
        if not self.busy:
            self.session.open = False


def _unedited_sites(plan: Plan) -> list[Site]:
    found: list[Site] = []
    for item in plan:
        for read in item.reads:
            if read.source is Origin.UNEDITED:
                place = (item.site if read.site is None else read.site).whole
                if place not in found:
                    found.append(place)
    return found


def _inputs_of_call(call: dict[str, Any], images: ImageFormat | None) -> Inputs:
    """The inputs of a call of the user's, given its arguments by name, as far as positions and rows go."""
    if images is not None:
        return _images_of_call(call, images)
    cache = call.get("past_key_values")
    if cache is not None and (not hasattr(cache, "get_seq_length") or cache.get_seq_length() > 0):
        raise PlanError(
            "this call continues from a key/value cache, which plans do not support yet; pass the whole text"
        )
    ids, embeds, mask = (call.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
    if not isinstance(ids, Tensor):
        if not isinstance(embeds, Tensor):
            raise PlanError("the model is called without input_ids or inputs_embeds: positions cannot be told")
        ids = torch.zeros(embeds.shape[:2], dtype=torch.int64)
    inputs = Inputs.of(ids, mask if isinstance(mask, Tensor) and mask.ndim == 2 else None)
    positions = call.get("position_ids")
    if isinstance(positions, Tensor) and positions.ndim == 2 and positions.shape[1] == inputs.width > 1:
        both = inputs.mask[:, 1:] & inputs.mask[:, :-1]
        if bool(((positions.cpu().diff(dim=1) != 1).expand_as(both) & both).any()):
            raise InputsError(
                "the positions start anew within a row: packed sequences are not supported; give each its row"
            )
    return inputs


def _images_of_call(call: dict[str, Any], images: ImageFormat) -> Inputs:
    pixels, mask = call.get("pixel_values"), call.get("attention_mask")
    if not isinstance(pixels, Tensor) or pixels.ndim != 4:
        raise PlanError("the model is called without pixel_values [B, C, height, width]: positions cannot be told")
    if isinstance(mask, Tensor) and not bool(mask.bool().all()):
        raise InputsError("a plan counts every patch of an image, and this call masks some of them")
    down, across = patch_grid(pixels, images.patch)
    return Inputs.of(torch.zeros(len(pixels), 1 + down * across, dtype=torch.int64))
