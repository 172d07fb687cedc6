"""Where: named activations of a transformer, and the part of one that an intervention or a capture means.

The legend of letters used in every shape of this package: B rows, T query positions, S key positions, H heads, K
key/value heads, D head width, M model width, F MLP width, E experts, U one number, V vocabulary, L layers, W worlds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ..errors import SiteError, nearest
from .encoding import Put, Record
from .kinds import BY_HOOK, DIM, HEAD, KEY, KINDS, POS, Kind
from .spans import IMAGE, NEW, SPAN, Image, New, Span

TEXT, VISION = "text", "vision"
"""Stacks of layers in a model that has several: the language model, which is meant where none is named, and a tower."""
DECODER, ENCODER, CROSS = "decoder", "encoder", "cross"
"""The same in one that decodes what it has encoded: the decoder, which is meant where none is named, the encoder, and
the attention of the decoder's layers to what is encoded."""
STACKS = (VISION, ENCODER, CROSS)
"""Those besides the one that is meant where none is named."""


Key = tuple[str, int, str | None]
"""What identifies a whole activation: its name, its layer (-1 outside the blocks) and its stack."""

_BEFORE = 1 << 20
"""More layers than any tower has."""
_ORDER = {name: len(KINDS) * index for index, name in enumerate(KINDS)}


_WORDS: dict[str, int | New | Image | None] = {"last": -1, "all": None, "new": New(), "image": Image()}
"""Positions that have a name."""

Index = int | tuple[int, ...] | Span | New | Image | Tensor | None


@dataclass(frozen=True, eq=False)
class Site:
    """A named activation, and the part of it that is meant.

    Attributes:
        name: a kind that `Model.sites` lists (TransformerLens's names: ``resid_pre``, ``z``, ``pattern``, ...).
        layer: the block, from 0; None for the sites outside the blocks.
        stack: which stack of layers, in a model that has several; None for the language model (``"text"`` is the
            same), ``"vision"`` for the tower that sees its images. In one that decodes what it encodes, None for the
            decoder (``"decoder"``), ``"encoder"``, or ``"cross"`` for the attention of the decoder's layers to what is
            encoded, whose queries are tokens of the decoder and whose keys and values are the encoder's.
        head: an int, ints, or None for all. Key/value heads where the site has those; experts of ``expert_out``.
        pos: query positions: an int, ints, a `Span`, None for all, a bool mask [B, T] over the columns of the inputs,
            or ints [B] or [B, n], one list for each row. Position p is the p-th *real* token of its row; negative
            positions count from the row's last real token. While a model generates, all of these are of the prompt,
            a `New` is of the tokens that follow it, and None is of both. Of an image, 0 is the class token, and the
            patches follow row by row; the logits of a classifier have one position. ``"image"`` and ``"image 0"`` are
            the tokens of all images of a row, and of its first. In a tower, a row's positions are those of all its
            images, one after another.
        key_pos: key positions of ``scores`` and ``pattern``, in the same forms.
        dim: entries of the last axis; for ``logits`` these are tokens, and may be ints [B, n], a list for each row.
    """

    name: str
    layer: int | None = None
    stack: str | None = None
    head: Index = None
    pos: Index = None
    key_pos: Index = None
    dim: Index = None

    def __post_init__(self) -> None:
        if self.name not in KINDS:
            raise SiteError(f"unknown site {self.name!r}{nearest(self.name, KINDS)}; the sites are {', '.join(KINDS)}")
        kind = KINDS[self.name]
        if kind.per_layer and self.layer is None:
            raise SiteError(f"site {self.name!r} is in a block: say which, as site({self.name!r}, layer=0)")
        if not kind.per_layer and self.layer is not None:
            raise SiteError(f"site {self.name!r} is outside the blocks and takes no layer, {self.layer} given")
        if self.layer is not None and (not isinstance(self.layer, int) or isinstance(self.layer, bool)):
            raise SiteError(f"a layer is an int, not {self.layer!r}")
        for axis in (HEAD, POS, KEY, DIM):
            value = getattr(self, axis)
            if value is not None and axis not in kind.axes:
                raise SiteError(f"site {self.name!r} has axes {kind.axes}: it cannot be restricted by {axis}={value!r}")
            if value is not None and type(value) is not int:
                object.__setattr__(self, axis, _index(axis, value))

    @property
    def kind(self) -> Kind:
        """What is known of all sites of this name: their axes, and whether they are per layer."""
        return KINDS[self.name]

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the activation's axes, in order."""
        return self.kind.axes

    @cached_property
    def key(self) -> Key:
        """What identifies the tensor: the same for ``resid_pre`` of a layer and ``resid_post`` of the one before."""
        return key_of(self.name, self.layer, self.stack)

    @property
    def hook(self) -> str:
        """TransformerLens's name of the whole activation, as ``blocks.8.attn.hook_z``."""
        return self.kind.hook if self.layer is None else f"blocks.{self.layer}.{self.kind.hook}"

    @property
    def whole(self) -> Site:
        """The same activation without restrictions."""
        return Site(self.name, self.layer, self.stack)

    @property
    def restricted(self) -> bool:
        """Whether only a part of the activation is meant."""
        return any(getattr(self, axis) is not None for axis in (HEAD, POS, KEY, DIM))

    def at(self, **restrictions: Any) -> Site:
        """Return this site restricted further, as ``site.at(pos=-1)``; what was restricted before is replaced."""
        restrictions = _of_experts(self.name, restrictions)
        unknown = set(restrictions) - {HEAD, POS, KEY, DIM}
        if unknown:
            name = sorted(unknown)[0]
            options = (HEAD, POS, KEY, DIM)
            raise SiteError(f"a site is restricted by head, pos, key_pos or dim, not {name!r}{nearest(name, options)}")
        return replace(self, **restrictions)

    def encoded(self, put: Put) -> dict[str, Any]:
        """The site as data."""
        return SITE.encoded(self, put)

    def _parts(self) -> tuple[Any, ...]:
        # The pair resid_pre / resid_post is one tensor, so two spellings of it compare equal.
        return (*self.key, self.head, self.pos, self.key_pos, self.dim)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Site):
            return NotImplemented
        return all(same(a, b) for a, b in zip(self._parts(), other._parts(), strict=True))

    def __hash__(self) -> int:
        return hash(self.key)

    def __str__(self) -> str:
        place = self.name if self.layer is None else f"{self.name}.{self.layer}"
        parts = [f"{axis}={describe_index(getattr(self, axis))}" for axis in (HEAD, POS, KEY, DIM)]
        parts = [part for part in parts if not part.endswith("=None")]
        return (f"{self.stack}:" if self.stack else "") + place + (f"[{', '.join(parts)}]" if parts else "")

    __repr__ = __str__


def key_of(name: str, layer: int | None, stack: str | None) -> Key:
    """The `Site.key` of a whole activation."""
    stack = None if stack in (TEXT, DECODER) else stack
    if name == "resid_pre" and layer:
        return ("resid_post", layer - 1, stack)
    return (name, -1 if layer is None else layer, stack)


def site(name: str | Site, layer: int | None = None, **restrictions: Any) -> Site:
    """Name a site, in either spelling.

    Args:
        name: a kind with its `layer` (``"z"``, 8), or TransformerLens's full name (``"blocks.8.attn.hook_z"``).
        layer: the block, from 0.
        **restrictions: `head`, `pos`, `key_pos`, `dim` and `stack`, as in `Site`; `expert`, of ``router`` and
            ``expert_out``. ``pos="last"`` is -1, a slice is a
            `Span`. While the model generates, these mean tokens of the prompt, and ``pos=-1`` stays its last;
            ``pos="new"`` is what is generated (``pos=new(0, 5)`` its first five tokens), and no `pos`, or
            ``pos="all"``, is every token, of the prompt and new. So it is for `key_pos`. ``pos="image"`` and
            ``"image 1"`` are the tokens of a row's images, or of its second, in a model that sees.

    Raises:
        SiteError: the name is unknown, the layer is missing or superfluous, or the site lacks a restricted axis.

    >>> site("z", layer=8, head=6) == site("blocks.8.attn.hook_z", head=6)
    True
    >>> site("resid_post", layer=3) == site("resid_pre", layer=4)
    True
    """
    if isinstance(name, Site):
        if layer is not None:
            raise SiteError(f"{name} already is a site: use its .at() to restrict it")
        return name.at(**restrictions) if restrictions else name
    if not isinstance(name, str):
        raise SiteError(f"a site is a name or a Site, not {type(name).__name__}")
    parsed = _parse_hook(name)
    restrictions = _of_experts(name if parsed is None else parsed[0], restrictions)
    unknown = set(restrictions) - {HEAD, POS, KEY, DIM, "stack"}
    if unknown:
        word = sorted(unknown)[0]
        raise SiteError(f"unknown restriction {word!r}{nearest(word, (HEAD, POS, KEY, DIM, 'stack', 'layer'))}")
    if parsed is not None:
        kind, named = parsed
        if layer is not None and named is not None and layer != named:
            raise SiteError(f"{name!r} names layer {named}, layer={layer} given")
        return Site(kind, layer if named is None else named, **restrictions)
    return Site(name, layer, **restrictions)


def sites_of(given: Site | str | Iterable[Site | str]) -> list[Site]:
    """The sites that a user names, one or several, in either spelling.

    Raises:
        SiteError: one of them is none.
    """
    if not isinstance(given, (str, Site, Iterable)):
        raise SiteError(f"sites are names or Sites, one or several, not {type(given).__name__}")
    return [site(one) for one in ([given] if isinstance(given, (str, Site)) else given)]


_EXPERTS = {"router": DIM, "expert_out": HEAD}
"""The axis of experts, of the sites that have one."""


def _of_experts(name: str, restrictions: dict[str, Any]) -> dict[str, Any]:
    """Restrictions in which experts are named by the axis that a site has for them."""
    if "expert" not in restrictions:
        return restrictions
    if name not in _EXPERTS:
        raise SiteError(f"site {name!r} has no experts; {' and '.join(_EXPERTS)} have")
    rest = {axis: value for axis, value in restrictions.items() if axis != "expert"}
    return {**rest, _EXPERTS[name]: restrictions["expert"]}


def _parse_hook(name: str) -> tuple[str, int | None] | None:
    if name in BY_HOOK:
        return BY_HOOK[name], None
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if match and match[2] in BY_HOOK and KINDS[BY_HOOK[match[2]]].per_layer:
        return BY_HOOK[match[2]], int(match[1])
    if match or name.startswith(("hook_", "ln_final.", "unembed.")):
        inside = bool(match)
        known = [
            f"blocks.{match[1]}.{hook}" if match else hook
            for hook, kind in BY_HOOK.items()
            if KINDS[kind].per_layer == inside
        ]
        raise SiteError(f"unknown hook name {name!r}{nearest(name, known)}")
    return None


def execution_order(key: Key, n_layers: int) -> tuple[int, int]:
    """Sort key of a `Site.key` by when a forward pass computes it: towers and encoders come before what reads them.

    Attention to what is encoded comes between the other sublayers of the decoder's layer.
    """
    name, layer, stack = key
    if stack == CROSS:
        return (layer, _ORDER["attn_out"] + 1 + _ORDER[name] // len(KINDS))
    if stack is not None:
        layer, order = execution_order((name, layer, None), _BEFORE // 2)
        return (layer - _BEFORE, order)
    if KINDS[name].per_layer:
        return (layer, _ORDER[name])
    return (-1 if name in ("embed", "pos_embed") else n_layers, _ORDER[name])


def _index(axis: str, value: Any) -> Index:
    """Bring what a user may write for positions, heads or dimensions into one of the forms of `Index`."""
    if isinstance(value, str):
        if value in _WORDS and axis in (POS, KEY):
            return _WORDS[value]
        image = Image.named(value) if axis in (POS, KEY) else None
        if image is not None:
            return image
        raise SiteError(f"{axis}={value!r}: expected ints, a slice, a tensor or None{nearest(value, _WORDS)}")
    if hasattr(value, "__array__") and not isinstance(value, Tensor):
        value = torch.as_tensor(value)
    if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool and not value.ndim):
        raise SiteError(f"{axis}={value!r}: expected ints, a slice, a tensor or None")
    if isinstance(value, slice):
        if value.step not in (None, 1):
            raise SiteError(f"{axis}={value!r}: a step other than 1 is not understood; list the positions")
        try:
            return Span(value.start, value.stop)
        except SiteError as error:
            raise SiteError(f"{axis}={value!r}: {error}") from None
    if isinstance(value, Sequence):
        return _ints(axis, value)
    if isinstance(value, Tensor):
        return _tensor_index(axis, value)
    if value is None or isinstance(value, (int, Span)) or (isinstance(value, (New, Image)) and axis in (POS, KEY)):
        return value
    raise SiteError(f"{axis}={value!r}: expected ints, a slice, a tensor or None")


def _ints(axis: str, value: Sequence[Any]) -> tuple[int, ...]:
    if not value or not all(isinstance(i, Integral) and not isinstance(i, bool) for i in value):
        raise SiteError(f"{axis}={value!r}: expected one or more ints")
    if len(set(value)) != len(value):
        raise SiteError(f"{axis}={tuple(value)!r}: an entry is named twice")
    return tuple(int(i) for i in value)


def _tensor_index(axis: str, value: Tensor) -> Index:
    if value.is_floating_point() or value.is_complex():
        raise SiteError(f"{axis}: a tensor of positions is bool (a mask) or int, not {value.dtype}")
    if value.ndim == 0:
        return int(value)
    if axis == HEAD or (axis == DIM and value.ndim == 1):
        if value.dtype == torch.bool:
            value = value.nonzero().flatten()
        if value.ndim == 1:
            return _ints(axis, value.tolist())
    forms = {POS: "bool [B, T], int [B] or int [B, n]", KEY: "bool [B, S], int [B] or int [B, n]", DIM: "int [B, n]"}
    fits = value.ndim == 2 if value.dtype == torch.bool or axis == DIM else value.ndim in (1, 2)
    if axis not in forms or not fits or (axis == DIM and value.dtype == torch.bool):
        raise SiteError(f"{axis}: expected {forms.get(axis, 'ints')}, got {value.dtype} of shape {list(value.shape)}")
    return value


def same(a: Any, b: Any) -> bool:
    """Whether two values of plans are the same: tensors by dtype, shape and content (NaN equals NaN), the rest by
    ``==``.
    """
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.dtype != b.dtype or a.shape != b.shape:
            return False
        equal = (a == b.to(a.device)) | ((a != a) & (b != b).to(a.device))
        return bool(equal.all())
    return type(a) is type(b) and a == b


def describe_index(value: Index) -> str:
    """A short text for an index, as ``5:`` or ``mask[2, 16]``."""
    if isinstance(value, Tensor):
        return f"{'mask' if value.dtype == torch.bool else 'ints'}{list(value.shape)}"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(str, value)) + ")"
    return str(value)


SITE = Record(
    "site",
    {"name": (str,), "layer": (int, type(None)), "stack": (str, type(None))}
    | {axis: (int, tuple, Span, New, Image, Tensor, type(None)) for axis in (HEAD, POS, KEY, DIM)},
    Site,
)
SITE_RECORDS = (SITE, SPAN, NEW, IMAGE)
"""How sites stand in a file."""
