"""Decoding under a plan: what each call feeds of which text, whether `generate` makes it or a loop of the user's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from .backends import caching
from .backends.generating import Generation, Generations, Look
from .errors import InputsError, PlanError
from .fed import Decoding, Fed
from .layout import Layout
from .models.architecture import Architecture
from .models.calls import (
    decoded_of_call,
    encoded_of_call,
    inputs_of_call,
    kept_logits,
    pictures_of_call,
    real_columns,
    require_apart,
    tokens_of_call,
)
from .plan.inputs import Inputs
from .plan.sites import ENCODER, VISION
from .text import UNSEEN, Text


class Decodings:
    """All texts that one model is fed while a plan is held on it."""

    def __init__(self, module: nn.Module, binds: Callable[[], bool], look: Look) -> None:
        self._known: WeakKeyDictionary[Any, Decoding] = WeakKeyDictionary()
        self._without: WeakKeyDictionary[Generation, Decoding] = WeakKeyDictionary()
        self._ends: dict[int, Callable[[], None]] = {}
        self._generations = Generations(module, binds, look)

    def close(self) -> None:
        """Forget all, and take away what stands on the model and on caches."""
        self._generations.close()
        for end in self._ends.values():
            end()
        self._ends, self._known, self._without = {}, WeakKeyDictionary(), WeakKeyDictionary()

    def forget(self, hold: Any) -> None:
        """Forget what one hold has seen."""
        for one in (*self._known.values(), *self._without.values()):
            one.since.pop(id(hold), None)

    def fed(self, module: nn.Module, call: dict[str, Any], arch: Architecture) -> Fed:
        """What a call of the model feeds, given its arguments by name.

        Raises:
            PlanError, InputsError: positions cannot be told.
        """
        if arch.images is not None:
            inputs = inputs_of_call(call, arch.images)
            return Fed(inputs, Layout.of(inputs), Decoding())
        require_apart(call)
        encoded_text = None
        if arch.encoder is not None:
            encoded_text, call = encoded_of_call(call), decoded_of_call(call)
        ids, cache = tokens_of_call(call), call.get("past_key_values")
        if cache is not None:
            attentions = [block.attention.module for block in arch.blocks]
            caching.require_plain(cache, attentions, ids.device, arch.encoder is not None)
        past, kept = caching.filled(cache), kept_logits(call)
        tower = arch.tower if past == 0 and call.get("input_ids") is not None else None
        pictures, image = pictures_of_call(call, tower, ids)
        generation = self._generations.around()
        beside = generation is not None and not generation.is_of(call.get("input_ids"), cache)
        if beside:
            generation = None
        if generation is not None:
            decoding = self._of(cache, generation)
            text = generation.text(len(ids), past + ids.shape[1], kept)
            if text.image is None and image is not None and past == 0:
                text = replace(text, image=image)
        elif past == 0:
            decoding = Decoding()
            text = Text.of(real_columns(call, ids, 0), image)
        else:
            decoding = self._of(cache, None)
            text = _continued(decoding.text, real_columns(call, ids, past), past)
        layout = text.layout(past, kept, caching.windows(cache, ids.shape[1], len(arch.blocks)))
        inputs = _inputs(call, ids, layout)
        if pictures is not None:
            tower_layout = replace(Layout.of_tower(pictures, layout.rows), origin=layout.origin, given=layout.given)
            layout, inputs = replace(layout, towers={VISION: tower_layout}), replace(inputs, pictures=pictures)
        if encoded_text is not None:
            inputs = replace(inputs, source=encoded_text)
            layout = layout.after(encoded_text.columns, encodes=call.get("encoder_outputs") is None)
        uses = call.get("use_cache")
        uses = getattr(getattr(module, "config", None), "use_cache", False) if uses is None else uses
        caches = cache is not None or bool(uses)
        encoded = None
        if call.get("mm_encoder_outputs") or call.get("encoder_outputs") is not None:
            encoded = {} if generation is None else generation.encoded
        return Fed(inputs, layout, decoding, text, cache, caches, generation is not None, beside, encoded=encoded)

    def looked(self, call: dict[str, Any], arch: Architecture) -> Fed | None:
        """The images of a `generate`, which it looks at before it calls the model, or the text that it encodes then.

        None where there is neither.

        Raises:
            InputsError: they do not fit the text.
        """
        ids = call.get("input_ids")
        if arch.encoder is not None:
            source = encoded_of_call(call)
            made = replace(Inputs.of(source.ids[:, :1]), source=source)
            return Fed(made, Layout.of(made), Decoding(), caches=True, only=ENCODER)
        if arch.tower is None or not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
            return None
        if caching.filled(call.get("past_key_values")):
            return None
        pictures, _ = pictures_of_call(call, arch.tower, ids)
        if pictures is None:
            return None
        made = replace(Inputs.of(ids, real_columns(call, ids, 0)), pictures=pictures)
        # Worlds that only the text reads are looked at too, for the features of their images.
        return Fed(made, Layout.of(made), Decoding(), caches=True, only=VISION)

    def _of(self, cache: Any, generation: Generation | None) -> Decoding:
        if cache is not None:
            owner = caching.followed(cache)
            return self._known.get(cache) or (None if owner is None else self._known.get(owner)) or Decoding()
        assert generation is not None
        return self._without.setdefault(generation, Decoding())

    def returned(self, fed: Fed, output: Any) -> None:
        """Note that a call has returned, and with it the cache that a later one may go on from."""
        decoding = fed.decoding
        decoding.text, decoding.counted = fed.text, max(decoding.counted, 0 if fed.text is None else fed.text.width)
        cache = caching.cache_of(output) if fed.cache is None else fed.cache
        owner = None if cache is None else caching.followed(cache)
        if cache is None or decoding in (self._known.get(cache), None if owner is None else self._known.get(owner)):
            return
        self._follow(cache, decoding)

    def _follow(self, cache: Any, decoding: Decoding) -> None:
        """Know of what is in a cache, of what is done to it between calls, and of what is in copies of it."""
        end = self._ends.pop(id(cache), None)
        if end is not None:
            end()
        self._known[cache] = decoding
        where, me = ref(decoding), ref(self)

        def note(operation: str, argument: Any) -> None:
            known = where()
            if known is not None:
                known.note(operation, argument)

        def copied(twin: Any) -> None:
            known, mine = where(), me()
            if known is not None and mine is not None:
                mine._follow(twin, known.copied())

        self._ends = {key: end for key, end in self._ends.items() if key in {id(one) for one in self._known}}
        self._ends[id(cache)] = caching.follow(cache, note, copied)

    def mirror(self, fed: Fed, path: Any) -> Any:
        """The cache of a world that is read of the same text; a copy of the caller's at first sight.

        Raises:
            PlanError: it would be a copy of what other plans have edited, or was fed other tokens.
        """
        if fed.cache is None:
            return None
        mirrors = fed.decoding.mirrors
        if path not in mirrors:
            if fed.past and (fed.decoding.text is not None or caching.followed(fed.cache) is not None):
                raise PlanError(
                    "the plan reads this world under another plan, or unedited, from a call on that goes on from a "
                    "key/value cache, and no cache of that world was kept from the first call on: hold one plan, "
                    "which is no function of the call, around the whole decoding"
                )
            mirrors[path] = caching.apart(fed.cache)
        held = caching.filled(mirrors[path])
        if held != fed.past:
            raise PlanError(
                "the plan reads this world under another plan, or unedited, and that world's cache holds "
                f"{held} tokens where the call's holds {fed.past}: some were fed while the plan was suspended, or in a "
                "call that failed"
            )
        return mirrors[path]


def _continued(text: Text | None, real: Tensor, past: int) -> Text:
    """The text of a call by hand that goes on from a cache, given which columns it takes for real.

    Raises:
        PlanError: the cache has other rows than it had.
    """
    if text is not None and len(text.rows) != len(real):
        raise PlanError(
            f"the call has {len(real)} rows, and its key/value cache was filled with {len(text.rows)}: nobody saw "
            "which rows of the prompt they go on from"
        )
    if text is None or text.width < past:
        several = real.shape[1] - past > 1
        before = real[:, :past] if text is None else torch.cat([text.real, real[:, text.width : past]], 1)
        begun = Text.of(before)
        if text is not None:
            begun = replace(begun, rows=text.rows, total=text.total)
        text = replace(begun, several=False, doubt="" if several else UNSEEN)
    return text.cut(past).fed(real[:, past:])


def _inputs(call: dict[str, Any], ids: Tensor, layout: Layout) -> Inputs:
    """The tokens of a call as inputs; a row that is fed padding alone holds one of it.

    Raises:
        InputsError: rows that hold several sequences.
    """
    real = layout.queries.real
    positions = call.get("position_ids")
    if isinstance(positions, Tensor) and positions.ndim == 2 and positions.shape[1] == real.shape[1] > 1:
        both = real[:, 1:] & real[:, :-1]
        if bool(((positions.cpu().diff(dim=1) != 1).expand_as(both) & both).any()):
            raise InputsError(
                "the positions start anew within a row: packed sequences are not supported; give each its row"
            )
    if layout.offset or layout.queries.prompt is not None:
        real = real | ~real.any(1, keepdim=True)
    return Inputs.of(ids, real)
