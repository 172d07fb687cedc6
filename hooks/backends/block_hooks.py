"""Where the sites of one block are: hooks on its sublayers, their norms and what stands inside them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..models.blocks import Attention, Block, Sublayer
from ..models.experts import Experts
from ..models.norms import rescaled, scale_of
from ..models.projections import Outputs, head_results
from ..plan.sites import KINDS, Key
from .boundaries import Edit, Hooks, Running, scaled


def visit_rows(run: Running, key: Key, x: Tensor, lead: int, embedded: bool = False) -> Tensor:
    """Show a pass a tower's value, whose first `lead` axes are its tokens, as rows of the text."""
    assert key[2] is not None
    fold = run.fold(key[2], embedded)
    if fold is None:
        return x
    laid = fold.lay(x.flatten(0, lead - 1))
    edited = run.visit(key, laid)
    return x if edited is laid else fold.back(edited).reshape(x.shape)


class BlockHooks:
    """The hooks of one block. Values wait in the pass's scratch from one hook to the next.

    Args:
        width: M of the stack.
        stack: that the block is of; None of the main one.
        folded: whether that is a tower, whose values have their tokens along the first `lead` axes; by default any but
            the main one.
    """

    def __init__(
        self,
        hooks: Hooks,
        block: Block,
        layer: int,
        names: set[str],
        width: int,
        stack: str | None = None,
        lead: int = 2,
        folded: bool | None = None,
    ) -> None:
        self.hooks, self.block, self.layer, self.names = hooks, block, layer, names
        self.width, self.stack, self.lead = width, stack, lead
        self.folded = stack is not None if folded is None else folded

    def visit(self, run: Running, name: str, x: Tensor) -> Tensor:
        if name not in self.names:
            return x
        key = (name, self.layer, self.stack)
        if self.folded:
            return visit_rows(run, key, x, self.lead)
        if x.ndim < len(KINDS[name].axes):  # some layers go on with all tokens in one row
            return run.visit(key, x.unflatten(0, (run.rows, -1))).flatten(0, 1)
        return run.visit(key, x)

    def shown(self, name: str) -> Edit:
        return lambda run, x: self.visit(run, name, x)

    def wait(self, run: Running, name: str, x: Any) -> None:
        run.scratch[self.stack, self.layer, name] = x

    def take(self, run: Running, name: str) -> Any:
        return run.scratch.pop((self.stack, self.layer, name), None)

    def place(self) -> None:
        # Some layers add what their last projection returns: heads are edited in that before it is attn_out.
        self.heads()
        self.around_attention()
        self.projections()
        if "rot_k" in self.names:
            self.hooks.on_keys(self.block.attention.module, self.cached)
        if self.block.of_mlp is not None:
            self.around_mlp(self.block.of_mlp)
        if self.names & {"resid_post", "resid_mid"}:
            self.hooks.on_output(self.block.module, self.resid_post)

    def ended(self, sublayer: Sublayer, edit: Edit) -> None:
        """Edit what a sublayer adds. One module may drop of several: the last norm called tells which."""
        edit = scaled(edit, sublayer.scale)
        if self.drops_twice:
            mine = self.block.sublayers.index(sublayer)
            self.hooks.on_output(
                sublayer.end,
                lambda run, x: edit(run, x) if run.scratch.get((self.stack, self.layer, "entered")) == mine else x,
            )
        else:
            self.hooks.on_output(sublayer.end, edit)

    @property
    def drops_twice(self) -> bool:
        drops = [s.drop for s in self.block.sublayers if s.drop is not None]
        return len(drops) > len(set(drops))

    def on_read(self, sublayer: Sublayer, edit: Edit) -> None:
        """Edit the residual stream as one sublayer reads it."""
        if sublayer.pre is None:
            self.hooks.on_input(sublayer.fn.module, edit)
        elif self.block.shares_norm:
            self.hooks.on_input(sublayer.fn.module, partial(self.read_apart, sublayer, edit))
        else:
            self.hooks.on_input(sublayer.pre, edit)

    def read_apart(self, sublayer: Sublayer, edit: Edit, run: Running, normed: Tensor) -> Tensor:
        """What one of two sublayers reads of a norm that they share, where the stream is edited for that one alone."""
        stream = run.scratch[self.stack, self.layer, "stream"]
        edited = edit(run, stream)
        assert sublayer.pre is not None
        return normed if edited is stream else self.renormed(run, sublayer.pre, edited)

    def keep_stream(self, run: Running, x: Tensor) -> Tensor:
        self.wait(run, "stream", x)
        return x

    def around_attention(self) -> None:
        sublayer, names = self.block.of_attention, self.names
        if self.drops_twice and names & {"attn_out", "mlp_out", "resid_mid"}:
            for number, each in enumerate(self.block.sublayers):
                assert each.pre is not None
                self.hooks.on_input(each.pre, partial(self.entered, number))
        if self.block.shares_norm and names & {"attn_in", "q_input", "k_input", "v_input", "mlp_in"}:
            assert sublayer.pre is not None
            self.hooks.on_input(sublayer.pre, self.keep_stream)
        if names & {"attn_in", "q_input", "k_input", "v_input"}:
            self.on_read(sublayer, self.attn_in)
        if names & {"ln1_scale", "ln1"}:
            self.around_norm("ln1", sublayer)
        if "attn_out" in names:
            self.ended(sublayer, self.shown("attn_out"))
        if sublayer.post_add is not None and "resid_mid" in names:
            self.hooks.on_output(sublayer.post_add, self.shown("resid_mid"))

    def around_norm(self, name: str, sublayer: Sublayer) -> None:
        """Show what a norm divides by, and what it returns."""
        norm = sublayer.pre
        assert norm is not None
        # Found out here: within a graph nothing is tried.
        scale = scale_of(norm, self.width) if f"{name}_scale" in self.names else None

        def change(run: Running, args: tuple[Any, ...], out: Tensor) -> Tensor:
            new = out
            if scale is not None:
                old = scale(args[0])
                new = rescaled(norm, out, old, self.visit(run, f"{name}_scale", old))
            new = self.visit(run, name, new)
            if new is not out and name == "ln1":
                self.wait(run, "ln1_change", new - out)
            return new

        self.hooks.on_call(norm, change)

    def renormed(self, run: Running, norm: nn.Module, x: Tensor) -> Tensor:
        """What attention's norm makes of another stream, with what rows beside it that edit its output change in it."""
        # forward() rather than a call, which would run the hooks of the norm once more.
        out, change = norm.forward(x), run.scratch.get((self.stack, self.layer, "ln1_change"))
        if change is None:
            return out
        return out + (change.unsqueeze(-2) if out.ndim > change.ndim else change)

    def entered(self, number: int, run: Running, x: Tensor) -> Tensor:
        run.scratch[self.stack, self.layer, "entered"] = number
        return x

    def attn_in(self, run: Running, x: Tensor) -> Tensor:
        x = self.visit(run, "attn_in", x)
        for name in ("q_input", "k_input", "v_input"):
            if name in self.names:
                projection = getattr(self.block.attention, name[0])
                copies = x.unsqueeze(-2).expand(*x.shape[:-1], projection.heads, x.shape[-1])
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
                norm = self.block.of_attention.pre
                part = projection.per_head(copies if norm is None else self.renormed(run, norm, copies))
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
        if names & {"ln2_scale", "ln2"}:
            self.around_norm("ln2", sublayer)
        if names & ({"mlp_in", "resid_mid"} if self.rebuilt else {"mlp_in"}):
            self.on_read(sublayer, self.mlp_in)
        if isinstance(mlp, Experts):
            if "router" in names:
                self.hooks.on_call(mlp.router, partial(self.routed, mlp))
            if "expert_out" in names:
                self.hooks.on_call(mlp.experts, partial(self.expert_out, mlp))
        else:
            for name, part in (("mlp_pre", mlp.pre), ("mlp_pre_linear", mlp.up)):
                if name not in names or part is None:
                    continue
                if isinstance(part, Outputs):
                    self.hooks.on_output(part.module, partial(self.columns, name, part))
                else:
                    self.hooks.on_output(part, self.shown(name))
            if "mlp_post" in names:
                self.hooks.on_input(mlp.down, self.shown("mlp_post"))
        if names & {"mlp_out", "resid_mid"}:
            self.ended(sublayer, self.mlp_out)

    @property
    def rebuilt(self) -> bool:
        """Whether the residual between the sublayers is at no module's boundary where an edit of it reaches all."""
        return self.block.of_attention.post_add is None and not self.block.parallel

    def columns(self, name: str, part: Outputs, run: Running, out: Tensor) -> Tensor:
        return part.write(out, self.visit(run, name, part.read(out)))

    def routed(self, mlp: Experts, run: Running, _args: tuple[Any, ...], out: Any) -> Any:
        logits = out[0]
        edited = self.visit(run, "router", logits)
        return out if edited is logits else (edited, *mlp.route(edited), *out[3:])

    def expert_out(self, mlp: Experts, run: Running, args: tuple[Any, ...], out: Tensor) -> Tensor:
        x, chosen, weights = args[:3]
        parts = mlp.parts(x, weights, chosen)
        edited = self.visit(run, "expert_out", parts)
        return out if edited is parts else out + (edited - parts).sum(1)

    def mlp_in(self, run: Running, x: Tensor) -> Tensor:
        if self.rebuilt and "resid_mid" in self.names:
            x = self.visit(run, "resid_mid", x)
            self.wait(run, "resid_mid", x)
        return self.visit(run, "mlp_in", x)

    def mlp_out(self, run: Running, x: Tensor) -> Tensor:
        x = self.visit(run, "mlp_out", x)
        if self.rebuilt and "resid_mid" in self.names:
            self.wait(run, "mlp_out", x)
        return x

    def resid_post(self, run: Running, x: Tensor) -> Tensor:
        # The block keeps its own copy of the residual from before the norm, where no hook reaches it.
        if "resid_mid" in self.names and self.rebuilt:
            sublayer = self.block.of_mlp
            assert sublayer is not None
            stream = self.take(run, "resid_mid") + self.take(run, "mlp_out")
            x = sublayer.summed(stream).view_as(x)
        return self.visit(run, "resid_post", x)


def head_results_change(attention: Attention, z: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:
    """The change of the attention output that an edit of the heads' results [..., H, M] makes."""
    result = head_results(attention.out, z)
    edited = edit(result)
    return torch.zeros_like(result[..., 0, :]) if edited is result else (edited - result).sum(-2)
