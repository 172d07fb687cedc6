"""Where the sites of a model are: forward hooks on its parts, and attention functions that show their inside."""

from __future__ import annotations

from collections.abc import Callable, Set
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from ..models.architecture import Architecture, Stack
from ..models.hook import Hook
from ..models.norms import rescaled, scale_of
from ..plan.sites import Key
from .block_hooks import BlockHooks, visit_rows
from .boundaries import Edit, Find, Hooks, Running, scaled


def place_hooks(
    arch: Architecture,
    keys: Set[Key],
    find: Find,
    within: Callable[[], bool],
    stack: ExitStack,
    watched: bool,
    kind: type[Hook] = Hook,
) -> None:
    """Place on a model the hooks of some sites.

    Args:
        arch: the model's parts.
        keys: the sites.
        find: the pass that is under way.
        within: whether this thread is in a call that is nobody's, within one that these hooks are placed for.
        stack: takes the hooks away again.
        watched: notice blocks that are called by themselves.
        kind: of the hooks.
    """
    hooks = Hooks(find, within, stack, kind)

    def show(name: str) -> Edit:
        return lambda run, x: run.visit((name, -1, None), x)

    for name, part in arch.stacks.items():
        if isinstance(part, Stack):
            _place_stack(hooks, part, str(name), keys, watched)
        elif name is not None:
            _place_tower(Hooks(find, within, stack, kind, first=True), part, name, keys, watched)
    keys = {key for key in keys if key[2] is None}
    names = {name for name, layer, _ in keys if layer == -1}
    if "embed" in names and arch.tower is None and arch.encoder is None:
        hooks.on_output(arch.embed, scaled(show("embed"), arch.embed_scale))
    elif "embed" in names:
        # Features of images are put in the place of embeddings, so where the stream begins is past the embedding; and
        # an encoder and a decoder may share that.
        hooks.on_input(arch.blocks[0].module, show("embed"))
    if "pos_embed" in names:
        assert arch.pos_embed is not None
        # Positions that all rows share come as one row, which an edit could not tell apart.
        each = show("pos_embed")
        hooks.on_output(arch.pos_embed, lambda run, x: each(run, x.expand(run.rows, *x.shape[1:])))
    for layer, block in enumerate(arch.blocks):
        if watched:
            hooks.watch(block.module)
        inside = {name for name, at, _ in keys if at == layer}
        if layer == 0 and "resid_pre" in inside:
            hooks.on_input(block.module, lambda run, x: run.visit(("resid_pre", 0, None), x))
        if inside:
            BlockHooks(hooks, block, layer, inside, arch.width).place()
    _place_final(hooks, arch, names, None, lambda run, key, x: run.visit(key, x))
    if "pooled" in names:
        assert arch.pooler is not None
        pooled = show("pooled")
        hooks.on_output(arch.pooler, lambda run, x: pooled(run, x.unsqueeze(1)).squeeze(1))
    if "logits" in names:
        # A classifier unembeds one position of each row, which its output has no axis for.
        one = show("logits")
        seen = one if arch.readout is None else (lambda run, x: one(run, x.unsqueeze(1)).squeeze(1))
        if arch.cap is None:
            hooks.on_output(arch.unembed, scaled(seen, arch.logit_scale))
        else:
            hooks.on_output(arch.unembed, lambda run, x: seen(run, arch.capped(x)), within=arch.capped)


def _place_stack(hooks: Hooks, part: Stack, stack: str, keys: Set[Key], watched: bool) -> None:
    """Place the hooks of an encoder, or of the attention to what it makes."""
    names = {name for name, layer, of in keys if layer == -1 and of == stack}
    if "embed" in names:
        hooks.on_input(part.blocks[0].module, lambda run, x: run.visit(("embed", -1, stack), x))
    for layer, block in enumerate(part.blocks):
        if watched:
            hooks.watch(block.module)
        inside = {name for name, at, of in keys if at == layer and of == stack}
        if layer == 0 and "resid_pre" in inside:
            hooks.on_input(block.module, lambda run, x: run.visit(("resid_pre", 0, stack), x))
        if inside:
            BlockHooks(hooks, block, layer, inside, part.width, stack, folded=False).place()
    _place_final(hooks, part, names, stack, lambda run, key, x: run.visit(key, x))


def _place_tower(hooks: Hooks, tower: Any, stack: str, keys: Set[Key], watched: bool) -> None:
    """Place the hooks of a stack that sees images, whose values the pass is shown as rows of the text."""
    lead = 1 if tower.packed else 2

    def show(name: str, embedded: bool = False) -> Edit:
        return lambda run, x: visit_rows(run, (name, -1, stack), x, lead, embedded)

    names = {name for name, layer, of in keys if layer == -1 and of == stack}
    if "embed" in names:
        hooks.on_output(tower.embed, show("embed", embedded=True))
    for layer, block in enumerate(tower.blocks):
        if watched:
            hooks.watch(block.module)
        inside = {name for name, at, of in keys if at == layer and of == stack}
        if layer == 0 and "resid_pre" in inside:
            first = ("resid_pre", 0, stack)
            hooks.on_input(block.module, lambda run, x: visit_rows(run, first, x, lead))  # noqa: B023
        if inside:
            BlockHooks(hooks, block, layer, inside, tower.width, stack, lead).place()
    _place_final(hooks, tower, names, stack, lambda run, key, x: visit_rows(run, key, x, lead))


def _place_final(hooks: Hooks, part: Any, names: set[str], stack: str | None, visit: Callable[..., Tensor]) -> None:
    """Place the hooks of the final norm's scale and output."""
    if "ln_final_scale" in names:
        scale = scale_of(part.norm, part.width)
        assert scale is not None

        def change(run: Running, args: tuple[Any, ...], out: Tensor) -> Tensor:
            old = scale(args[0])
            return rescaled(part.norm, out, old, visit(run, ("ln_final_scale", -1, stack), old))

        hooks.on_call(part.norm, change)
    if "ln_final" in names:
        hooks.on_output(part.norm, lambda run, x: visit(run, ("ln_final", -1, stack), x))
