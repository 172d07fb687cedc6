"""Calls of `generate` that are under way: the prompt of each, which no call of the model tells by itself."""

from __future__ import annotations

import copy
import inspect
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from types import FrameType
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..text import Text
from . import caching, seams

_NEVER = 1 << 62
_ITSELF = (
    "a generation within one of the same model (the model as its own assistant, or assistant_early_exit) proposes "
    "tokens under the plan, too: plans do not support that"
)


class _Arguments(dict):
    """The arguments that a `generate` hands on to its calls of the model, which are there as long as it goes on."""


class Generation:
    """One `generate`.

    Attributes:
        ids: int64 [B, n], the tokens that it was given, one row for each row that it generates; None for embeddings.
        real: bool [B, P], which columns of the prompt are real.
        rows: int64 [B], the row of the prompt that each is of; there are `total` of those.
        ended: int64 [B], the column of the token by which a row ended, after which it is fed padding.
        chunked: whether the prompt is fed in several calls.
        image: int64 [B, P], the number of the image of its row that each token of the prompt is of; None where nobody
            knows. `encoded`: see `Fed`.
    """

    def __init__(
        self, ids: Tensor | None, arguments: _Arguments, expand: int, frame: FrameType, seen: Seen | None = None
    ) -> None:
        self._arguments, self._frame = ref(arguments), id(frame)
        # What a model decodes of what it has encoded has a mask of its own.
        decodes = "encoder_outputs" in arguments
        embeds = arguments.get("decoder_inputs_embeds" if decodes else "inputs_embeds")
        mask = arguments.get("decoder_attention_mask" if decodes else "attention_mask")
        given = ids if embeds is None else embeds
        if not isinstance(given, Tensor):
            raise PlanError("generate() is called without input_ids or inputs_embeds: positions cannot be told")
        self.ids = None if ids is None or embeds is not None else ids.to("cpu", copy=True)
        self.begins = 0 if ids is None else ids.shape[1]
        count = given.shape[0]
        self.real = torch.ones(count, given.shape[1], dtype=torch.bool)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            self.real = mask.to("cpu", torch.bool, copy=True)
        self.total = count // expand
        self.rows = torch.arange(self.total).repeat_interleave(expand)
        self.ended = torch.full((count,), _NEVER)
        self.chunked, self.begun = False, False
        self.image = None if seen is None or seen.image is None else seen.image.repeat_interleave(expand, 0)
        self.encoded: dict[Any, Any] = {} if seen is None else seen.encoded

    @property
    def over(self) -> bool:
        """Whether it has returned, or been left by an exception that is forgotten."""
        return self._arguments() is None

    @property
    def cache(self) -> Any:
        """The cache that it decodes with, or None."""
        return (self._arguments() or {}).get("past_key_values")

    def stands(self) -> bool:
        """Whether this thread is within it."""
        here: FrameType | None = sys._getframe(1)
        while here is not None and id(here) != self._frame:
            here = here.f_back
        return here is not None and not self.over

    def configured(self, config: Any) -> None:
        """Learn what its arguments came to.

        Raises:
            PlanError: the model is to propose tokens with its first layers, and stays cut where that is interrupted.
        """
        if getattr(config, "assistant_early_exit", None) is not None:
            raise PlanError(_ITSELF)
        self.chunked = getattr(config, "prefill_chunk_size", None) is not None
        width = getattr(config, "_mask_length", None)
        if isinstance(width, int) and width > self.real.shape[1]:
            # New tokens alone, after those of the cache; the mask was left out because it was all ones.
            self.real = torch.ones(len(self.real), width, dtype=torch.bool)

    def note(self, ids: Tensor, done: Tensor) -> None:
        """Learn which rows have ended, given all tokens so far."""
        if len(self.rows) > 1 and done.shape == self.ended.shape:
            column = self.real.shape[1] - self.begins + ids.shape[1] - 1
            self.ended[done.to("cpu") & (self.ended == _NEVER)] = column

    def is_of(self, ids: Any, cache: Any) -> bool:
        """Whether a call of the model within it is one of its own, and not one that something else makes there."""
        if cache is not None or self.cache is not None:
            return cache is self.cache
        if self.ids is None or not isinstance(ids, Tensor) or self.begins != self.real.shape[1]:
            return not self.begun or isinstance(ids, Tensor)
        same = len(ids) == len(self.ids) and ids.shape[1] >= self.begins
        return same and torch.equal(ids[:, : self.begins].to("cpu"), self.ids)

    def text(self, rows: int, width: int, kept: int | None) -> Text:
        """The text up to some column.

        Args:
            rows, width: of the call, with what is cached.
            kept: of how many tokens it computes the logits; None for all.

        Raises:
            PlanError: the rows or the columns are none of this generation's.
        """
        prompt = self.real.shape[1]
        if rows != len(self.rows):
            raise PlanError(
                f"generate() calls the model on {rows} rows, and it has {len(self.rows)}: this way of decoding runs "
                "rows of its own, which a plan does not know"
            )
        most = prompt + max(1, kept or 1) - 1
        if (width > most and not self.begun) or (width < prompt and not self.chunked):
            raise PlanError(
                f"generate() begins with {width} columns, and its prompt has {prompt}: the prompt was changed on the "
                "way (token_healing), so positions cannot be told"
            )
        self.begun = True
        real = torch.nn.functional.pad(self.real, (0, max(0, width - prompt)), value=True)[:, :width]
        real = real & (torch.arange(width) < self.ended[:, None])
        image = self.image
        if image is not None and image.shape != self.real.shape:
            image = None
        return Text(real, prompt, self.real.sum(1), self.rows, self.total, image=image)


@dataclass(eq=False)
class Seen:
    """What is known of the images of a `generate` before it begins: see `Generation`."""

    image: Tensor | None = None
    encoded: dict[Any, Any] = field(default_factory=dict)


Look = Callable[[Callable[[dict[str, Any]], Any], Tensor, dict[str, Any]], tuple[Any, Seen]]
"""From what looks at the images among arguments (and changes these), ids and arguments, to what that returns."""


class Generations:
    """Those of one model, while a plan is held on it.

    Args:
        binds: whether a plan is in force.
        look: runs the tower of a model that sees, which `generate` does once, before it calls the model.
    """

    def __init__(self, module: nn.Module, binds: Callable[[], bool], look: Look) -> None:
        self._binds, self._look_at = binds, look
        self._seen: dict[int, Seen] = {}
        self._live: list[Generation] = []
        self._removals: list[Callable[[], None]] = []
        self._module = where = ref(module)
        functions = {
            "_prepare_generation_config": self._told,
            "init_continuous_batching": self._batching,
            "_expand_inputs_for_generation": self._begin,
            "_get_stopping_criteria": self._configure,
            "_maybe_prepare_encoder_kwargs_for_generation": self._look,
            "_prepare_encoder_decoder_kwargs_for_generation": self._look,
            # What is compiled ignores hooks that were not there then, in silence.
            "get_compiled_call": lambda own, *args, **kwargs: where().__call__,  # type: ignore[union-attr]
        }
        generate = getattr(type(module), "generate", None)
        self._code = None if generate is None else inspect.unwrap(generate).__code__
        for name, function in functions.items() if generate is not None else ():
            if hasattr(module, name):
                self._removals.append(seams.place(module, name, function))

    def close(self) -> None:
        """Take away what stands on the model."""
        while self._removals:
            self._removals.pop()()
        self._live = []

    def around(self) -> Generation | None:
        """The innermost that this thread is within."""
        self._live = [one for one in self._live if not one.over]
        return next((one for one in reversed(self._live) if one.stands()), None)

    def _told(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found, module = own(*args, **kwargs), self._module()
        if module is not None and self._binds():
            told = found[0] if isinstance(found, tuple) else found
            kind, how = (getattr(told, f"cache_{name}", None) for name in ("implementation", "config"))
            caching.require_makeable(kind, how, module)
        return found

    def _batching(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._binds():
            raise PlanError(caching.BATCHING)
        return own(*args, **kwargs)

    def _begin(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._binds():
            return own(*args, **kwargs)
        if self.around() is not None:
            raise PlanError(_ITSELF)
        expand = inspect.signature(own).bind(*args, **kwargs).arguments.get("expand_size", 1)
        ids, rest = own(*args, **kwargs)
        arguments = _Arguments(rest)
        seen = self._seen.pop(threading.get_ident(), None)
        if seen is not None and expand > 1:
            expanded = {path: self._expanded(own, args, kwargs, found) for path, found in seen.encoded.items()}
            seen = Seen(seen.image, expanded)
        self._live.append(Generation(ids, arguments, expand, self._frame(), seen))
        return ids, arguments

    def _expanded(self, own: Callable[..., Any], args: Any, kwargs: Any, found: Any) -> Any:
        """What the tower made of the images, as `generate` repeats its own for beams and samples."""
        name = "encoder_outputs" if "encoder_outputs" in kwargs else "mm_encoder_outputs"
        # A copy, since these are repeated in place.
        _, rest = own(*args, **{**kwargs, name: copy.copy(found)})
        return rest[name]

    def _look(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(own).bind(*args, **kwargs)
        self._seen.pop(threading.get_ident(), None)
        given, ids = bound.arguments["model_kwargs"], bound.arguments["inputs_tensor"]
        if not self._binds() or not isinstance(given, dict):
            return own(*args, **kwargs)

        def encode(arguments: dict[str, Any]) -> Any:
            bound.arguments["model_kwargs"] = arguments
            return own(*bound.args, **bound.kwargs)

        # Where a prompt is given as embeddings, its ids are among the arguments.
        found, seen = self._look_at(encode, given.get("input_ids", ids), given)
        self._seen[threading.get_ident()] = seen
        return found

    def _frame(self) -> FrameType:
        """The frame of the `generate` that is under way in this thread."""
        caller = sys._getframe(3)
        here: FrameType | None = caller
        while here is not None and here.f_code is not self._code:
            here = here.f_back
        return caller if here is None else here

    def _configure(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        criteria, found = own(*args, **kwargs), self.around()
        if found is None:
            return criteria
        found.configured(inspect.signature(own).bind(*args, **kwargs).arguments.get("generation_config"))
        if not any(hasattr(one, "eos_token_id") for one in criteria):
            return criteria  # rows that have ended go on all the same
        seen = _watched(type(criteria))(criteria)
        seen.note = found.note
        return seen


@cache
def _watched(kind: type) -> Any:
    """A list of criteria that says of which rows they are met."""

    class Watched(kind):
        note: Callable[[Tensor, Tensor], None]

        def __call__(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            done = super().__call__(input_ids, *args, **kwargs)
            self.note(input_ids, done)
            return done

    return Watched
