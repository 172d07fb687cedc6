"""Whether a site, a plan or inputs fit a model: what is wrong is said before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CycleError, InputsError, PlanError, ShapeError, SiteError, nearest
from ..plan.images import require_size
from ..plan.inputs import Inputs
from ..plan.plan import Intervention, Origin, Plan, World
from ..plan.prompts import require_vocabulary
from ..plan.sites import DECODER, DIM, HEAD, TEXT, Index, Site, Span, execution_order
from .architecture import Architecture, Stack, Tower
from .catalogue import site_table, why_missing
from .network import Network


def check_site(model: Network, where: Site) -> None:
    """Check that the model has a site, and the heads and dimensions that it names.

    Raises:
        SiteError: it does not.
    """
    stacks = model.architecture.stacks
    if where.stack == DECODER and model.architecture.encoder is None:
        raise SiteError(f"{where}: the model has no encoder and decoder")
    if where.stack is not None and len(stacks) == 1:
        raise SiteError(f"{where}: the model has one stack of layers, and the site names the stack {where.stack!r}")
    stack = where.key[2]
    if stack not in stacks:
        main = TEXT if model.architecture.encoder is None else DECODER
        names = [name or main for name in stacks]
        raise SiteError(f"{where}: the model has the stacks {', '.join(names)}{nearest(str(stack), names)}")
    if where.layer is not None and not -1 < where.layer < len(stacks[stack].blocks):
        unread = getattr(stacks[stack], "unread", "")
        here = "the model" if stack is None else f"the {stack} stack"
        raise SiteError(f"{where}: {here} has layers 0 .. {len(stacks[stack].blocks) - 1}{unread and '; ' + unread}")
    size = model.sizes.get(where.key)
    if size is None:
        names = [s.name for s in site_table(model.sizes, model.n_layers) if s.stack == stack]
        why = why_missing(stacks[stack], where.name, where.layer)
        if why or where.name not in names:
            raise SiteError(
                f"{where}: this model has no site {where.name!r}{why and f': {why}'}; it has {', '.join(names)}"
            )
        raise SiteError(f"{where}: this layer has no site {where.name!r}, which others of the model have")
    for axis in (HEAD, DIM):
        index: Index = getattr(where, axis)
        if index is None:
            continue
        listed = index if isinstance(index, tuple) else (index,) if isinstance(index, int) else ()
        for i in listed:
            if not -size[axis] <= i < size[axis]:
                raise SiteError(_no_such(where, axis, i, size[axis], stacks[stack]))


def check_worlds(model: Network, worlds: Sequence[World]) -> None:
    """Check that the inputs and plans of worlds fit the model.

    Raises:
        SiteError, ShapeError, PlanError, InputsError: they do not.
    """
    for inputs in {id(world.inputs): world.inputs for world in worlds}.values():
        check_inputs(model, inputs)
    known: dict[int, Any] = {}
    for world in worlds:
        check_plan(model, world.plan, known)


def check_plan(model: Network, plan: Plan, known: dict[int, Any] | None = None) -> None:
    """Check that a plan fits the model: its sites, heads and dimensions, what it reads, and the widths of its values.

    Args:
        known: the worlds and plans that were read and found right, by id; those found are added.

    Raises:
        SiteError, ShapeError, PlanError, InputsError: it does not.
    """
    known = {} if known is None else known
    check_norms(model, plan)
    for item in plan.interventions:
        check_site(model, item.site)
        if isinstance(item.site.dim, Tensor) and not _distinct(item.site.dim):
            raise SiteError(f"{item}: dim names one entry of a row twice, so it does not say which value it gets")
        for read in item.reads:
            if read.site is not None:
                check_site(model, read.site)
            source = read.source
            if source is Origin.HERE:
                _check_order(item, read.site, model.n_layers)
            elif id(source) not in known and isinstance(source, (World, Plan)):
                if isinstance(source, World):
                    check_inputs(model, source.inputs)
                check_plan(model, source.plan if isinstance(source, World) else source, known)
                known[id(source)] = source
        _check_values(model, item)


NORMED = ("ln1", "ln1_scale")
"""The output of the norm that attention reads through, and what it divides by."""
APART = ("q_input", "k_input", "v_input")
"""Edits of what single heads read, before the norm, so that there is one output of the norm for each."""


def norms_twice(model: Network, plan: Plan) -> str:
    """Where a plan edits the output of a norm and has that norm computed anew of something else, or reads that; empty
    elsewhere.

    What the edit changes in the norm's output is then added to what is computed anew.
    """
    if not any(item.site.name in NORMED for item in plan):
        return ""
    edited = {item.site.key for item in plan}
    keys = edited | {read.site.key for item in plan for read in item.own_reads if read.site is not None}
    for name, layer, stack in edited:
        if name not in NORMED:
            continue
        blocks = model.architecture.stacks[stack].blocks if stack in model.architecture.stacks else ()
        shares = layer < len(blocks) and blocks[layer].shares_norm
        for other in (*APART, *(("attn_in", "mlp_in") if shares else ())):
            if (other, layer, stack) in keys:
                return f"{name}.{layer} and {other}.{layer} in one plan"
    return ""


def check_norms(model: Network, plan: Plan) -> None:
    """Refuse plans, with what is held, of which another tool makes something else than we do.

    Raises:
        PlanError: it edits the output of a norm, and what single heads read before it, in a bridge of TransformerLens.
    """
    if model.tool is None or not getattr(model.tool, "splits_norms", False):
        return
    twice = norms_twice(model, plan)
    if twice:
        raise PlanError(
            f"{twice}: {model.tool.name} norms what each head reads by itself, and shows one output of the norm; edit "
            "one of them, or wrap the model itself"
        )


def check_inputs(model: Network, inputs: Inputs) -> None:
    """Check that inputs are of the kind that the model takes: images of its size, or token ids of its vocabulary.

    Raises:
        InputsError: they are not.
    """
    images = model.architecture.images
    if (images is None) != (inputs.pixels is None):
        takes, given = ("token ids", "images") if images is None else ("images", "token ids")
        raise InputsError(f"{inputs!r} holds {given}, and {model!r} takes {takes}: prepare them with its inputs()")
    if images is not None and inputs.pixels is not None:
        require_size(inputs.pixels, images)
        if (inputs.patch, inputs.prefix) != (images.patch, images.prefix):
            raise InputsError(
                f"{inputs!r} is cut into patches of {inputs.patch} after {inputs.prefix} tokens, and the model's "
                f"images into {images.patch} after {images.prefix}: prepare them with its inputs()"
            )
    else:
        require_vocabulary(inputs, model.architecture.token_ids)
        _check_source(model, inputs)
        check_pictures(model.architecture.tower, inputs)


def _check_source(model: Network, inputs: Inputs) -> None:
    """Check that there is a text to encode just where the model encodes one."""
    if (model.architecture.encoder is None) != (inputs.source is None):
        has = "has no text to encode" if inputs.source is None else "has a text to encode"
        raise InputsError(f"{inputs!r} {has}, unlike what {model!r} takes: prepare them with its inputs()")
    if inputs.source is not None:
        require_vocabulary(inputs.source, model.architecture.token_ids)


def check_pictures(tower: Tower | None, inputs: Inputs) -> None:
    """Check that prompts have images only where the model sees, and one wherever the text says that there is.

    Raises:
        InputsError: they do not.
    """
    if tower is None:
        if inputs.pictures is not None:
            raise InputsError(f"{inputs!r} has images, and the model is a language model that sees none")
        return
    places = (inputs.ids == tower.token) & inputs.mask
    image = torch.full_like(inputs.ids, -1) if inputs.pictures is None else inputs.pictures.image
    if image.shape != places.shape or not torch.equal(places, image >= 0):
        raise InputsError(
            f"{inputs!r}: id {tower.token} stands for an image's features, and these tokens and the images do not "
            "belong together; prepare both with model.inputs(texts, images=...)"
        )


def _check_order(item: Intervention, where: Site | None, n_layers: int) -> None:
    """Refuse a read of this world's own value that is not computed before the site that reads it.

    Raises:
        CycleError: such a read.
    """
    if where is None:
        raise PlanError(f"{item}: a read of this world needs the site that it reads")
    if execution_order(where.key, n_layers) >= execution_order(item.site.key, n_layers):
        raise CycleError(
            f"{item}: {where} is not computed before {item.site}, so it cannot be read there; "
            "read it from another World, or with freeze() from this one unedited"
        )


def _check_values(model: Network, item: Intervention) -> None:
    """Refuse values whose sizes along heads or the last axis are not the site's."""
    where, size = item.site, model.sizes[item.site.key]
    for read in item.reads:
        if isinstance(read.source, Tensor) and read.source.ndim == len(where.axes):
            for axis, n in zip(where.axes, read.source.shape, strict=True):
                whole = size.get(axis)
                if whole is not None and getattr(where, axis) is None and n != whole:
                    raise ShapeError(f"{item}: the source has {n} along {axis}, the site {whole}")
    if not item.op.__dataclass_fields__:  # type: ignore[attr-defined]
        return
    last = size.get(DIM)
    if isinstance(where.dim, int):
        # Values may leave out an axis that is selected with one int.
        return
    if isinstance(where.dim, tuple):
        last = len(where.dim)
    elif isinstance(where.dim, Tensor):
        last = where.dim.shape[-1]
    elif isinstance(where.dim, Span) and last is not None:
        last = len(range(*slice(where.dim.start, where.dim.stop).indices(last)))
    for name, value in item.op.parameters().items():
        # Integers are positions or tokens, which are not laid out like the site.
        is_value = isinstance(value, Tensor) and value.ndim and value.is_floating_point()
        if is_value and last is not None and value.shape[-1] != last:
            raise ShapeError(f"{item}: {name} ends in {value.shape[-1]} entries, the site in {last}")


def _distinct(index: Tensor) -> bool:
    """Whether the entries of each row of an index [B, n] are different ones."""
    ordered = index.sort(-1).values
    return not bool((ordered[..., 1:] == ordered[..., :-1]).any())


def _no_such(where: Site, axis: str, index: int, size: int, arch: Architecture | Tower | Stack) -> str:
    if axis == DIM:
        return f"{where}: the last axis has {size} entries, {index} is not among them"
    attention = arch.blocks[0].attention
    heads, groups = attention.q.heads, attention.k.heads
    text = f"{where}: there is no head {index}, the site has {size} (0 .. {size - 1})"
    if size == groups < heads and index < heads:
        text += (
            f"; this model has {heads} query heads but {groups} key/value heads, and {where.name} is per key/value head"
        )
        text += f": query head {index} reads key/value head {index * groups // heads}"
    return text
