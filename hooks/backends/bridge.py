"""TransformerLens: a plan is placed on the hook points of a `TransformerBridge`, which stays as its user set it up.

The bridge's forward pass is that of the Hugging Face model inside it, whose modules it has replaced, so that model is
what is called and watched: calls of the bridge, of its `generate` and of the model itself all go through it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..models import describe
from ..models.architecture import Architecture
from ..plan.sites import KINDS, Key, Site
from .boundaries import Edit, Find, Hooks, Running
from .gate import gate_of
from .plain import require_plain

_SPLIT = frozenset({"q_input", "k_input", "v_input"})


def is_bridge(model: Any) -> bool:
    """Whether a model is a `TransformerBridge`."""
    return any(
        kind.__name__ == "TransformerBridge" and kind.__module__.startswith("transformer_lens.")
        for kind in type(model).__mro__
    )


class Bridge:
    """Places visits on the hook points of a bridge.

    Attributes:
        name: of the tool; `splits_norms`: whether it norms what each head reads by itself.
        bridge: the user's `TransformerBridge`.
    """

    name, splits_norms = "TransformerLens", True

    def __init__(self, bridge: Any) -> None:
        self.bridge = bridge
        self._fires: dict[type, bool] = {}

    @property
    def module(self) -> nn.Module:
        """The model inside."""
        return self.bridge.original_model

    def describe(self, module: Any) -> Architecture:
        """The parts of the model inside the bridge, without the sites whose hook points never fire."""
        found = describe(module)
        require_plain(found, "a TransformerBridge")
        known, never = self.bridge.hook_dict, {}
        for name in ("rot_q", "rot_k"):
            point = known.get(Site(name, 0).hook)
            if point is None or not self._fired(module, point):
                never[name] = "nothing goes through its hook point in this bridge"
        return replace(found, missing={**found.missing, **never})

    def _fired(self, module: nn.Module, point: Any) -> bool:
        """Whether a hook point is gone through: in some families there are such that nothing goes through."""
        fired: list[bool] = []
        handle = point.register_forward_hook(lambda *_: fired.append(True) or None)
        device = next(module.parameters()).device
        try:
            kept = torch.random.fork_rng([device] if device.type == "cuda" else [])
            with torch.no_grad(), kept, gate_of(module).suspended():
                module(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=device), use_cache=False)
        finally:
            handle.remove()
        return bool(fired)

    def require(self, ids: Tensor, mask: Tensor) -> None:
        """Refuse inputs that a bridge computes wrongly.

        Raises:
            ModelError: rows padded on the left in float64, whose first patterns are NaN.
        """
        dtype = next(self.bridge.original_model.parameters()).dtype
        if dtype == torch.float64 and not bool(mask[:, 0].all()):
            raise ModelError(
                "a TransformerBridge gives NaN for rows that are padded on the left in float64: pad on the right "
                "(model.inputs(..., padding='right')), or use float32"
            )

    def place_hooks(
        self,
        arch: Architecture,
        keys: Set[Key],
        find: Find,
        within: Callable[[], bool],
        stack: ExitStack,
        watched: bool,
    ) -> None:
        """Place visits of some sites; arguments as of `placing.place_hooks`."""
        points = _Points(self.bridge, arch, keys, find, within, stack)
        points.outside()
        for layer, block in enumerate(arch.blocks):
            if watched:
                points.hooks.watch(block.module)
            names = {name for name, at, _ in keys if at == layer}
            if names:
                points.inside(layer, names)

    def swap_functions(
        self, arch: Architecture, keys: Set[Key], expose: Iterable[int], find: Find, stack: ExitStack
    ) -> None:
        """Turn on, while the model is called, what some hook points need to be gone through."""
        names = {name for name, _, _ in keys}
        if ("logits", -1, None) in keys:
            stack.enter_context(arch.lift_cap())
        if names & _SPLIT:
            stack.enter_context(self._turned_on("use_split_qkv_input", "q_input, k_input and v_input"))
        if "result" in names:
            stack.enter_context(self._turned_on("use_attn_result", "result"))

    @contextmanager
    def _turned_on(self, flag: str, sites: str) -> Iterator[None]:
        turn, before = getattr(self.bridge, f"set_{flag}"), bool(getattr(self.bridge.cfg, flag, False))
        if before:
            yield
            return
        try:
            turn(True)
        except (ValueError, NotImplementedError) as error:
            raise ModelError(f"this bridge cannot show {sites}: {error}") from error
        try:
            yield
        finally:
            turn(False)


class _Points:
    """The hook points of a bridge. Values wait in the pass's scratch from one to the next."""

    def __init__(
        self,
        bridge: Any,
        arch: Architecture,
        keys: Set[Key],
        find: Find,
        within: Callable[[], bool],
        stack: ExitStack,
    ) -> None:
        self.known, self.arch, self.keys, self.find, self.stack = bridge.hook_dict, arch, keys, find, stack
        self.within = within
        self.hooks = Hooks(find, within, stack)

    def on(self, name: str, edit: Edit, otherwise: Callable[[Tensor], Tensor] | None = None) -> None:
        """Show what goes through a hook point to the pass that is under way.

        Args:
            otherwise: what it is to a call that is nobody's, within one of ours, which shares what is turned on for it.
        """
        point = self.known.get(name)
        if point is None:
            raise ModelError(f"the bridge has no hook point {name!r}, which is needed here")

        def hook(x: Tensor, hook: Any) -> Tensor | None:
            run = self.find()
            if run is None:
                return otherwise(x) if otherwise is not None and self.within() else None
            edited = edit(run, x)
            return None if edited is x else edited

        # Permanent to TransformerLens, whose own calls take the others away while a plan is held.
        handle = point.add_hook(hook, is_permanent=True)

        def remove() -> None:
            handle.hook.remove()
            if handle in point.fwd_hooks:
                point.fwd_hooks.remove(handle)

        self.stack.callback(remove)

    def outside(self) -> None:
        """The sites outside the blocks."""
        capped = self.arch.capped
        made: dict[str, Edit] = {
            "embed": lambda run, x: run.visit(("embed", -1, None), x),
            # Positions that all rows share come as one row, which an edit could not tell apart.
            "pos_embed": lambda run, x: run.visit(("pos_embed", -1, None), x.expand(run.rows, *x.shape[1:])),
            "ln_final_scale": lambda run, x: run.visit(("ln_final_scale", -1, None), x),
            "ln_final": lambda run, x: run.visit(("ln_final", -1, None), x),
            "logits": lambda run, x: run.visit(("logits", -1, None), capped(x)),
        }
        for name, edit in made.items():
            if (name, -1, None) in self.keys:
                self.on(Site(name).hook, edit, capped if name == "logits" else None)

    def inside(self, layer: int, names: set[str]) -> None:
        """The sites of a block."""

        def show(name: str) -> Edit:
            return partial(_shown, (name, layer, None))

        def visit(run: Running, name: str, x: Tensor) -> Tensor:
            return run.visit((name, layer, None), x) if name in names else x

        def at(name: str, edit: Edit | None = None) -> None:
            self.on(Site(name, layer).hook, edit or show(name))

        straight = {"q", "k", "v", "rot_q", "rot_k", "z", "result", "attn_out", "mlp_pre", "mlp_post", *_SPLIT}
        straight |= {"ln1_scale", "ln1", "ln2_scale", "ln2", "mlp_pre_linear"}
        for name in KINDS:
            if name in names & straight:
                at(name)
        if layer == 0 and "resid_pre" in names:
            at("resid_pre")
        if "attn_in" in names:
            # TransformerLens has a copy for each head there. Ours is what all of them read: the input of the norm, and
            # before the copies for q, k and v are made of it, which is done by a hook on the norm.
            norm = self.arch.blocks[layer].of_attention.pre
            assert norm is not None
            self.hooks.on_input(norm, show("attn_in"), first=True)
        if names & {"scores", "pattern"}:
            at("scores", partial(_scores, layer, "scores" in names))
            at("pattern", partial(_pattern, layer, "pattern" in names))

        def mlp_in(run: Running, x: Tensor) -> Tensor:
            # A write here reaches the MLP alone: the block has kept its own copy of the residual.
            x = visit(run, "resid_mid", x)
            run.scratch[layer, "resid_mid"] = x
            return visit(run, "mlp_in", x)

        def mlp_out(run: Running, x: Tensor) -> Tensor:
            x = visit(run, "mlp_out", x)
            run.scratch[layer, "mlp_out"] = x
            return x

        def resid_post(run: Running, x: Tensor) -> Tensor:
            if "resid_mid" in names:
                x = run.scratch.pop((layer, "resid_mid")) + run.scratch.pop((layer, "mlp_out"))
            return visit(run, "resid_post", x)

        if names & {"resid_mid", "mlp_in"}:
            parallel = self.arch.blocks[layer].parallel
            self.on(f"blocks.{layer}.ln2.hook_in" if parallel else Site("resid_mid", layer).hook, mlp_in)
        if names & {"resid_mid", "mlp_out"}:
            at("mlp_out", mlp_out)
        if names & {"resid_mid", "resid_post"}:
            at("resid_post", resid_post)


def _shown(key: Key, run: Running, x: Tensor) -> Tensor:
    return run.visit(key, x)


def _scores(layer: int, visited: bool, run: Running, x: Tensor) -> Tensor:
    """Scores with -inf where attention is forbidden, for which a bridge has the lowest number."""
    allowed = x > torch.finfo(x.dtype).min / 2
    run.scratch[layer, "allowed"] = allowed
    if not visited:
        run.scratch[layer, "dead"] = ~allowed.any(-1, keepdim=True)
        return x
    edited = run.visit(("scores", layer, None), torch.where(allowed, x, -torch.inf), (allowed, -torch.inf))
    dead = (edited == -torch.inf).all(-1, keepdim=True)
    run.scratch[layer, "dead"] = dead
    return torch.where(dead, 0, edited)


def _pattern(layer: int, visited: bool, run: Running, x: Tensor) -> Tensor:
    """A pattern that is zero for a query that may attend to nothing."""
    allowed, dead = run.scratch.pop((layer, "allowed")), run.scratch.pop((layer, "dead"))
    x = torch.where(dead, 0, x)
    return run.visit(("pattern", layer, None), x, (allowed, 0.0)) if visited else x
