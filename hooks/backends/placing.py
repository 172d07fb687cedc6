"""Where the sites of a model are: forward hooks on its parts, and attention functions that show their inside."""

from __future__ import annotations

from collections.abc import Callable, Set
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..models.architecture import Architecture
from ..models.blocks import Attention, Block, Sublayer
from ..models.hook import Hook
from ..models.projections import linear_weight
from ..plan.sites import Key
from ..program import Guard
from .caching import Entering, is_cache


class Running(Protocol):
    """The pass that a hook shows its value to."""

    scratch: dict[Any, Any]

    @property
    def rows(self) -> int:
        """Rows of the whole batch."""
        ...

    def keys(self, layer: int) -> tuple[int, int | None]:
        """The key column of a layer's attention that is the first query's own, and how many there are to be."""
        ...

    def visit(self, key: Key, x: Tensor, guard: Guard | None = None) -> Tensor:
        """Edit and keep a value."""
        ...


Find = Callable[[], Running | None]
"""The pass that this thread is in, or None where a value is nobody's."""
Edit = Callable[[Running, Tensor], Tensor]


class Hooks:
    """Places hooks that show a module's input or output to the pass that is under way.

    Args:
        find: which pass that is.
        within: whether this thread is in a call that is nobody's, within one that these hooks were placed for.
        stack: where the removal of every hook is registered, at the moment at which it is placed.
        kind: of the hooks.
    """

    def __init__(self, find: Find, within: Callable[[], bool], stack: ExitStack, kind: type[Hook] = Hook) -> None:
        self.find, self.within, self.stack, self.kind = find, within, stack, kind

    def on_output(self, module: nn.Module, edit: Edit, within: Callable[[Tensor], Tensor] | None = None) -> None:
        """Edit what a module returns, or the first of several values.

        Args:
            within: what it is to a call that is nobody's, within one of ours, which shares what is swapped for it.
        """

        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            run = self.find()
            if run is None:
                return within(output) if within is not None and self.within() else None
            if isinstance(output, tuple):
                return (edit(run, output[0]), *output[1:])
            return edit(run, output)

        self.stack.callback(module.register_forward_hook(self.kind(hook)).remove)

    def on_input(self, module: nn.Module, edit: Edit, first: bool = False) -> None:
        """Edit what a module is called with: its first argument, or its hidden states.

        Args:
            first: before other hooks.
        """

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            run = self.find()
            if run is None:
                return None
            if args:
                return (edit(run, args[0]), *args[1:]), kwargs
            name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
            return args, {**kwargs, name: edit(run, kwargs[name])}

        handle = module.register_forward_pre_hook(self.kind(hook), with_kwargs=True, prepend=first)
        self.stack.callback(handle.remove)

    def on_keys(self, module: nn.Module, edit: Edit) -> None:
        """Edit the keys [B, K, T, D] that an attention module writes into a cache, if it is called with one."""

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            run = self.find()
            if run is None:
                return None
            entering = lambda x: Entering(x, partial(edit, run)) if is_cache(x) else x  # noqa: E731
            return tuple(map(entering, args)), {name: entering(value) for name, value in kwargs.items()}

        self.stack.callback(module.register_forward_pre_hook(self.kind(hook), with_kwargs=True).remove)

    def watch(self, module: nn.Module) -> None:
        """Notice a call of a module by itself."""

        def hook(_module: nn.Module, _args: Any) -> None:
            self.find()

        self.stack.callback(module.register_forward_pre_hook(self.kind(hook)).remove)


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

    names = {name for name, layer, _ in keys if layer == -1}
    if "embed" in names:
        hooks.on_output(arch.embed, show("embed"))
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
            _BlockHooks(hooks, block, layer, inside).place()
    if "ln_final" in names:
        hooks.on_output(arch.norm, show("ln_final"))
    if "logits" in names:
        # A classifier unembeds one position of each row, which its output has no axis for.
        one = show("logits")
        seen = one if arch.readout is None else (lambda run, x: one(run, x.unsqueeze(1)).squeeze(1))
        hooks.on_output(arch.unembed, lambda run, x: seen(run, arch.capped(x)), within=arch.capped)


class _BlockHooks:
    """The hooks of one block. Values wait in the pass's scratch from one hook to the next."""

    def __init__(self, hooks: Hooks, block: Block, layer: int, names: set[str]) -> None:
        self.hooks, self.block, self.layer, self.names = hooks, block, layer, names

    def visit(self, run: Running, name: str, x: Tensor) -> Tensor:
        return run.visit((name, self.layer, None), x) if name in self.names else x

    def shown(self, name: str) -> Edit:
        return lambda run, x: self.visit(run, name, x)

    def wait(self, run: Running, name: str, x: Any) -> None:
        run.scratch[self.layer, name] = x

    def take(self, run: Running, name: str) -> Any:
        return run.scratch.pop((self.layer, name), None)

    def place(self) -> None:
        self.around_attention()
        self.projections()
        if "rot_k" in self.names:
            self.hooks.on_keys(self.block.attention.module, self.cached)
        self.heads()
        if self.block.of_mlp is not None:
            self.around_mlp(self.block.of_mlp)
        if self.names & {"resid_post", "resid_mid"}:
            self.hooks.on_output(self.block.module, self.resid_post)

    def ended(self, sublayer: Sublayer, edit: Edit) -> None:
        """Edit what a sublayer adds. One module may drop of several: the last norm called tells which."""
        if self.drops_twice:
            mine = self.block.sublayers.index(sublayer)
            self.hooks.on_output(
                sublayer.end, lambda run, x: edit(run, x) if run.scratch.get((self.layer, "entered")) == mine else x
            )
        else:
            self.hooks.on_output(sublayer.end, edit)

    @property
    def drops_twice(self) -> bool:
        drops = [s.drop for s in self.block.sublayers if s.drop is not None]
        return len(drops) > len(set(drops))

    def around_attention(self) -> None:
        sublayer, names = self.block.of_attention, self.names
        if self.drops_twice and names & {"attn_out", "mlp_out", "resid_mid"}:
            for number, each in enumerate(self.block.sublayers):
                self.hooks.on_input(each.pre, partial(self.entered, number))
        if names & {"attn_in", "q_input", "k_input", "v_input"}:
            self.hooks.on_input(sublayer.pre, self.attn_in)
        if "attn_out" in names:
            self.ended(sublayer, self.shown("attn_out"))

    def entered(self, number: int, run: Running, x: Tensor) -> Tensor:
        run.scratch[self.layer, "entered"] = number
        return x

    def attn_in(self, run: Running, x: Tensor) -> Tensor:
        x = self.visit(run, "attn_in", x)
        for name in ("q_input", "k_input", "v_input"):
            if name in self.names:
                projection = getattr(self.block.attention, name[0])
                copies = x.unsqueeze(2).expand(-1, -1, projection.heads, -1)
                edited = self.visit(run, name, copies)
                if edited is not copies:
                    self.wait(run, name, edited)
        return x

    def projections(self) -> None:
        attention = self.block.attention
        shared: dict[nn.Module, list[str]] = {}
        for name in ("q", "k", "v"):
            if self.names & {name, f"{name}_input"}:
                shared.setdefault(getattr(attention, name).module, []).append(name)
        for module, parts in shared.items():
            self.hooks.on_output(module, partial(self.project, parts))

    def project(self, parts: list[str], run: Running, out: Tensor) -> Tensor:
        for name in parts:
            projection = getattr(self.block.attention, name)
            part, copies = projection.read(out), self.take(run, f"{name}_input")
            if copies is not None:
                # forward() rather than a call, which would run the hooks of the norm once more.
                part = projection.per_head(self.block.of_attention.pre.forward(copies))
            out = projection.write(out, self.visit(run, name, part))
        return out

    def cached(self, run: Running, k: Tensor) -> Tensor:
        # Here an edit persists; what the attention function sees are the keys of all tokens, edited or not.
        self.wait(run, "cached", True)
        return self.visit(run, "rot_k", k.transpose(1, 2)).transpose(1, 2)

    def heads(self) -> None:
        out = self.block.attention.out
        if self.names & {"z", "result"}:
            self.hooks.on_input(out, self.z)
        if "result" in self.names:
            self.hooks.on_output(out, self.result)

    def z(self, run: Running, x: Tensor) -> Tensor:
        q = self.block.attention.q
        heads = self.visit(run, "z", x.unflatten(-1, (q.heads, q.width)))
        if "result" in self.names:
            self.wait(run, "z", heads)
        return heads.flatten(-2)

    def result(self, run: Running, out: Tensor) -> Tensor:
        edit = partial(self.visit, run, "result")
        return out + head_results_change(self.block.attention, self.take(run, "z"), edit)

    def around_mlp(self, sublayer: Sublayer) -> None:
        mlp, names = self.block.mlp, self.names
        assert mlp is not None
        if names & {"resid_mid", "mlp_in"}:
            self.hooks.on_input(sublayer.pre, self.mlp_in)
        if "mlp_pre" in names:
            self.hooks.on_output(mlp.pre, self.shown("mlp_pre"))
        if "mlp_post" in names:
            self.hooks.on_input(mlp.down, self.shown("mlp_post"))
        if names & {"mlp_out", "resid_mid"}:
            self.ended(sublayer, self.mlp_out)

    def mlp_in(self, run: Running, x: Tensor) -> Tensor:
        x = self.visit(run, "resid_mid", x)
        if "resid_mid" in self.names:
            self.wait(run, "resid_mid", x)
        return self.visit(run, "mlp_in", x)

    def mlp_out(self, run: Running, x: Tensor) -> Tensor:
        x = self.visit(run, "mlp_out", x)
        if "resid_mid" in self.names:
            self.wait(run, "mlp_out", x)
        return x

    def resid_post(self, run: Running, x: Tensor) -> Tensor:
        # The block keeps its own copy of the residual from before the norm, where no hook reaches it.
        if "resid_mid" in self.names:
            x = self.take(run, "resid_mid") + self.take(run, "mlp_out")
        return self.visit(run, "resid_post", x)


def head_results_change(attention: Attention, z: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:
    """The change of the attention output that an edit of the heads' results [..., H, M] makes."""
    weight, _ = linear_weight(attention.out)
    result = torch.einsum("...hd,mhd->...hm", z, weight.unflatten(1, (attention.q.heads, attention.q.width)))
    edited = edit(result)
    return torch.zeros_like(result[..., 0, :]) if edited is result else (edited - result).sum(-2)
