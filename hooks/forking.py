"""Worlds decoded side by side: rows of one batch, each with its part of the cache, whose logits become one.

The caller's own calls of the model are made wider inside the model: every row once for each world. So a loop, or
`generate` in any of its modes, chooses its tokens from what the worlds come to together, and feeds them to all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from .backends import caching, seams
from .errors import InputsError, PlanError, ShapeError
from .fed import Fed
from .holding import Hold
from .joining import may_join, parting
from .models.calls import tokens_of_call
from .models.network import Network
from .plan.inputs import Inputs
from .plan.plan import Plan, as_plan
from .worldwise import first_part, part_of, repeated, side_by_side

_WORLD = "world"
_SHARED = frozenset({"logits_to_keep", "cache_position", "past_key_values"})
"""Arguments of a call that are no rows."""


@dataclass(frozen=True, eq=False)
class Branch:
    """A world that is decoded beside others, on the tokens that they choose together.

    Attributes:
        plan: what is done in it.
        hide: bool [B, P], columns of the prompt that it does not see, as if the text had been written without them;
            None where it sees all.
        images: what its images are, a function of the pixels that the call is given; None where they are those.
    """

    plan: Plan = field(default_factory=Plan)
    hide: Tensor | None = None
    images: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "plan", as_plan(self.plan))
        hide = self.hide
        if hide is not None and (not isinstance(hide, Tensor) or hide.dtype != torch.bool or hide.ndim != 2):
            given = f"{hide.dtype} {list(hide.shape)}" if isinstance(hide, Tensor) else type(hide).__name__
            raise ShapeError(f"hide= is bool [B, P], columns of the prompt, not {given}")
        if self.images is not None and not callable(self.images):
            raise InputsError(f"images= is a function of pixels, not {type(self.images).__name__}")


@dataclass(frozen=True, eq=False)
class Moment:
    """When the logits of several worlds are made one.

    Attributes:
        step: how many tokens of the text come after its prompt; 0 in the call that feeds the prompt.
        rows: int64 [B], the row of the prompt that each row goes on from.
        memory: tensors [B, ...] that a function keeps from step to step, by name; they follow the rows when beams move.
            None in a generation without a cache, where nobody learns of that.
    """

    step: int
    rows: Tensor
    memory: dict[str, Tensor] | None


Combine = Callable[[Tensor, Moment], Tensor]
"""From the logits of all worlds [W, B, T, V], those of the user's own first, to the logits [B, T, V] that are used."""
Begin = Callable[[Moment], None]
"""Told before each call."""


class Fork(Hold):
    """Several worlds held on a model at once; the first is the user's own.

    Attributes:
        branches: what each world sees.
        holds: the plan and the record of each; the first is this very hold.
        combine: makes one of their logits.
    """

    def __init__(
        self, branches: Sequence[Branch], combine: Combine, seed: int, depth: int, begin: Begin | None = None
    ) -> None:
        super().__init__(branches[0].plan, seed, depth)
        self.branches, self.combine, self.begin = tuple(branches), combine, begin
        self.holds: tuple[Hold, ...] = (self, *(Hold(branch.plan, seed, depth) for branch in branches[1:]))
        self._rows: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._joined: WeakKeyDictionary[Any, int] = WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self.branches)

    def require_fired(self) -> None:
        """Raise where something in any of the worlds never fired."""
        super().require_fired()
        for one in self.holds[1:]:
            one.require_fired()

    # Where worlds part

    def joined(self, network: Network, fed: Fed, call: Mapping[str, Any], plans: Sequence[Plan]) -> int:
        """The block before which a call is of one world, of those under some plans: 0 where it is of all throughout.

        Layers of the cache before it have the rows of one world.
        """
        seen = any(one.hide is not None or one.images is not None for one in self.branches)
        blocks = len(network.architecture.blocks)
        layer = 0 if seen or not may_join(network, call, fed.cache) else parting(plans, blocks)
        cache = fed.cache
        if cache is not None and cache in self._rows and fed.past:
            before = self._joined[cache]
            layer = min(layer, before)
            for one in cache.layers[layer:before]:
                # Worlds part earlier from now on: until now they were the same there.
                one.reorder_cache(torch.arange(self._rows[cache]).repeat(len(self)))
        return layer

    # What each world is fed

    def views(self, fed: Fed, call: Mapping[str, Any]) -> tuple[Fed, ...]:
        """A call as each of the worlds sees it.

        Raises:
            PlanError, ShapeError: it cannot be made for several worlds.
        """
        self._require_possible(fed, call)
        return tuple(fed if one.hide is None else self._hidden(fed, call, one.hide) for one in self.branches)

    def _require_possible(self, fed: Fed, call: Mapping[str, Any]) -> None:
        if call.get("labels") is not None:
            raise PlanError("several worlds are held, whose logits become one after the model: a call has no labels=")
        if fed.cache is not None and fed.past and fed.cache not in self._rows:
            raise PlanError(
                f"the key/value cache holds {fed.past} tokens of one world, and {len(self)} are held: each world has "
                "its own keys and values, so hold them from the first call on"
            )
        if any(one.hide is not None for one in self.branches):
            mask = call.get("attention_mask")
            if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
                raise PlanError("columns are hidden from a world, and the call's mask is not 2-D [B, columns]")

    def _hidden(self, fed: Fed, call: Mapping[str, Any], hide: Tensor) -> Fed:
        text = fed.text
        assert text is not None
        if len(hide) != text.total or hide.shape[1] > text.prompt:
            raise ShapeError(
                f"hide= is for prompts {list(hide.shape)}, the call's are {text.total} rows of {text.prompt} columns"
            )
        away = hide.cpu()[text.rows]
        away = torch.nn.functional.pad(away, (0, text.prompt - away.shape[1]))
        away = torch.nn.functional.pad(away, (0, max(0, text.width - text.prompt)))
        now, later = away[:, : text.width], away[:, text.width :]
        real = text.real & ~now
        lengths = text.lengths - (text.real & now).sum(1) - later.sum(1)
        if not bool(real.any(1).all()):
            raise ShapeError("hide= hides a whole row")
        mine = replace(text, real=real, lengths=lengths)
        layout = replace(mine.layout(fed.past, fed.layout.kept, fed.layout.windows), towers=fed.layout.towers)
        inputs = _fed_tokens(tokens_of_call(dict(call)), layout.queries.real)
        return replace(fed, inputs=replace(inputs, pictures=fed.inputs.pictures), layout=layout, text=mine)

    def arguments(self, call: Mapping[str, Any], views: Sequence[Fed]) -> dict[str, Any]:
        """The arguments of a call for all worlds, one after another along the rows.

        Raises:
            InputsError: the images of a world are no pixels of the shape and dtype of those that are given.
        """
        count = len(self)
        found = {name: value if name in _SHARED else repeated(name, value, count) for name, value in call.items()}
        found |= self._pictures(call)
        encoded = views[0].encoded or {}
        if (_WORLD, 1) in encoded:
            # What the tower made of the images in each world, when `generate` looked at them.
            each = [call["mm_encoder_outputs"], *(encoded[_WORLD, number] for number in range(1, count))]
            found["mm_encoder_outputs"] = {kind: side_by_side([one[kind] for one in each]) for kind in each[0]}
        if any(one.hide is not None for one in self.branches):
            found |= _seen(call, views, [one.hide is not None for one in self.branches])
        return found

    @property
    def changes_images(self) -> bool:
        """Whether some world has other images."""
        return any(one.images is not None for one in self.branches)

    def looked(self, encode: Callable[[dict[str, Any]], Any], given: Mapping[str, Any], encoded: dict[Any, Any]) -> Any:
        """The arguments of a `generate` after it has looked at the images of every world.

        Args:
            encode: looks at them, given the arguments.
            encoded: takes what the tower made of them in the worlds beside the first, by (`_WORLD`, number).
        """
        pictures = {name for name in given if name.startswith(("pixel_", "image_", "video_"))}
        mine = {n: repeated(n, value, len(self)) if n in pictures else value for n, value in given.items()}
        found = encode({**mine, **self._pictures(given)})
        outputs = found["mm_encoder_outputs"]
        for number in range(1, len(self)):
            encoded[_WORLD, number] = {kind: part_of(value, len(self), number) for kind, value in outputs.items()}
        found["mm_encoder_outputs"] = {kind: part_of(value, len(self), 0) for kind, value in outputs.items()}
        # What is left of the images goes on to the model, which is called with the rows of one world.
        return {name: given[name] if name in pictures else value for name, value in found.items()}

    def _pictures(self, call: Mapping[str, Any]) -> dict[str, Any]:
        pixels = call.get("pixel_values")
        if not isinstance(pixels, Tensor):
            return {}
        return {"pixel_values": torch.cat([self._pixels(one, pixels) for one in self.branches])}

    def _pixels(self, branch: Branch, pixels: Tensor) -> Tensor:
        if branch.images is None:
            return pixels
        made = branch.images(pixels)
        if not isinstance(made, Tensor) or made.shape != pixels.shape or made.dtype != pixels.dtype:
            given = f"{made.dtype} {list(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
            raise InputsError(f"images= gave {given} for pixels {pixels.dtype} {list(pixels.shape)}")
        if pixels.ndim < 5:
            return made
        # A row with fewer images is filled up with some that are all zero, which models know by that and leave out.
        there = (pixels != 0).flatten(2).any(2)[..., None, None, None]
        return torch.where(there, made, pixels)

    # What comes of them

    def began(self, fed: Fed, joined: int = 0) -> None:
        """Note that a call begins, which is of one world before a block."""
        self.follow(fed.cache, len(fed.layout), joined)
        if self.begin is not None:
            self.begin(self.moment(fed))

    def moment(self, fed: Fed) -> Moment:
        """The moment of a call."""
        assert fed.text is not None
        step = max(0, fed.text.width - fed.text.prompt)
        return Moment(
            step, fed.layout.rows, fed.decoding.memory if fed.cache is not None or not fed.generated else None
        )

    def returned(self, fed: Fed, joined: int, output: Any) -> Any:
        """What the caller is given in place of the outputs of all worlds."""
        moment, count = self.moment(fed), len(self)
        self.follow(fed.cache if fed.cache is not None else caching.cache_of(output), len(fed.layout), joined)
        several = isinstance(output, tuple)
        logits = output[0] if several else output.logits
        worlds = logits.unflatten(0, (count, len(fed.layout)))
        made = self.combine(worlds, moment)
        if made.shape != worlds.shape[1:] or made.device != worlds.device:
            raise ShapeError(f"combine gave {list(made.shape)} for logits {list(worlds.shape)} of worlds, rows, tokens")
        count = 1 if joined else count  # all else is of one world already
        if several:
            return (made, *(first_part(value, count) for value in output[1:]))
        found = {name: first_part(value, count) for name, value in output.items() if name != "logits"}
        return type(output)(**{**found, "logits": made})

    def follow(self, cache: Any, rows: int, joined: int = 0) -> None:
        """Have what is done to rows of a cache between calls done to those of every world."""
        if cache is None:
            return
        if cache not in self._rows:
            for name in ("reorder_cache", "batch_select_indices", "batch_repeat_interleave"):
                if hasattr(cache, name):
                    seams.place(cache, name, partial(self._all, name, ref(cache)))
        self._rows[cache], self._joined[cache] = rows, joined

    def _all(self, name: str, where: Any, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        cache, argument = where(), next(iter((*args, *kwargs.values())))
        rows = self._rows[cache]
        if name == "batch_repeat_interleave":
            self._rows[cache] = rows * int(argument)
            return own(argument)
        index = torch.as_tensor(argument)
        self._rows[cache] = len(index)
        every = torch.cat([index + world * rows for world in range(len(self))])
        if not self._joined[cache]:
            return own(every)
        for number, layer in enumerate(cache.layers):
            getattr(layer, name)(index if number < self._joined[cache] else every)
        return None


def _seen(call: Mapping[str, Any], views: Sequence[Fed], hides: Sequence[bool]) -> dict[str, Any]:
    """Masks and positions where some worlds do not see all columns.

    Raises:
        PlanError: positions have several axes.
    """
    ids, given, mask = tokens_of_call(dict(call)), call.get("position_ids"), call.get("attention_mask")
    if isinstance(given, Tensor) and given.ndim != 2:
        raise PlanError("columns are hidden from a world, and this model counts positions along several axes")
    masks, positions = [], []
    for view, hidden in zip(views, hides, strict=True):
        assert view.text is not None
        masks.append((view.text.real if hidden or mask is None else mask.to(view.text.real.device)).to(torch.int64))
        if hidden or not isinstance(given, Tensor):
            start = view.layout.queries.index if hidden or mask is not None else None
            plain = torch.arange(view.past, view.past + ids.shape[1]).expand(len(ids), -1)
            positions.append((plain if start is None else start).to(ids.device))
        else:
            positions.append(given)
    width = max(one.shape[1] for one in masks)
    masks = [torch.nn.functional.pad(one, (0, width - one.shape[1]), value=1) for one in masks]
    return {"attention_mask": torch.cat(masks).to(ids.device), "position_ids": torch.cat(positions)}


def _fed_tokens(ids: Tensor, real: Tensor) -> Inputs:
    return Inputs.of(ids, real | ~real.any(1, keepdim=True))
