"""Running the user's own model with interventions: forward hooks, present only while they are needed.

Sites at module boundaries are hooks on those modules. Sites inside attention are reached by swapping the attention
function, in the layers that need it and in no other. Several worlds may stand in one batch, one after another along the
rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..models.architecture import Architecture, Block, linear_weight
from ..models.attention import exposed_attention, read_mask
from ..plan.sites import Site
from ..program import Edits, Guard, Key

INSIDE = frozenset({"rot_q", "rot_k", "scores", "pattern"})
"""Sites inside attention, for which a layer's attention function is swapped."""


@dataclass(eq=False)
class Session:
    """The state of hooked forward passes.

    Attributes:
        worlds: the worlds in the batch; each has the same number of rows.
        captures: for each world, the sites to keep.
        graph: keep values attached to the autograd graph (made to start at the first of them, if need be).
        kept: for each world, the value of each of its captures, after a forward pass.
        open: whether a call is under way whose rows and positions are known.
    """

    worlds: Sequence[Edits]
    captures: Sequence[Sequence[Site]]
    graph: bool = False
    kept: list[dict[int, Tensor]] = field(default_factory=list)

    open: bool = True

    def __post_init__(self) -> None:
        self.begin(self.worlds, self.captures, self.graph)

    def begin(self, worlds: Sequence[Edits], captures: Sequence[Sequence[Site]], graph: bool = False) -> None:
        """Start a forward pass, of these worlds; their sites have to be among those that hooks were placed for."""
        self.worlds, self.captures, self.graph, self.open = worlds, captures, graph, True
        self.tracking = torch.is_grad_enabled()
        self.kept = [{} for _ in worlds]
        self._captured: dict[Key, list[tuple[int, int]]] = {}
        for world, sites in enumerate(captures):
            for index, place in enumerate(sites):
                self._captured.setdefault(place.key, []).append((world, index))

    @property
    def rows(self) -> int:
        """Rows of the whole batch."""
        return sum(len(w.world.inputs.row_ids[w.window]) for w in self.worlds if w.window is not None)

    def touched(self) -> set[Key]:
        """The sites at which something is edited, read or kept."""
        keys = set(self._captured)
        for world in self.worlds:
            keys |= set(world.by_key) | world.needs_here
        return keys

    def visit(self, key: Key, x: Tensor, guard: Guard | None = None) -> Tensor:
        """Edit and keep the value of a site, all worlds of the batch at once; `x` itself if nothing is edited."""
        # Gradient checkpointing computes blocks again in the backward pass, of the call that came last.
        if not self.open and torch._C._current_graph_task_id() == -1:
            raise PlanError(
                "a part of the model is called by itself, so rows and positions are unknown: call the model"
            )
        if (
            self.open
            and self.tracking
            and not torch.is_grad_enabled()
            and any(key in w.needs_here for w in self.worlds)
        ):
            raise PlanError(
                f"{key[0]} is read further on, and reentrant gradient checkpointing would let no gradient reach it: "
                "set use_reentrant=False"
            )
        count = len(self.worlds)
        parts = list(x.chunk(count)) if count > 1 else [x]
        guards = [None] * count if guard is None else [(g, guard[1]) for g in guard[0].chunk(count)]
        edited = [key in world.by_key or key in world.needs_here for world in self.worlds]
        for w, world in enumerate(self.worlds):
            if edited[w]:
                parts[w] = world.visit(key, parts[w], guards[w], again=not self.open)
        if any(edited):
            x = torch.cat(parts) if count > 1 else parts[0]
        for world, index in self._captured.get(key, ()):
            place = self.captures[world][index]
            part = self.worlds[world].region(place).get(parts[world]) if place.restricted else parts[world]
            if self.graph:
                # Downstream must use the very tensor that is kept, or no gradient reaches it. Cloned, because some
                # models go on to change their residual in place.
                part = part.clone() if part.requires_grad else part.detach().clone().requires_grad_()
                parts[world] = self.worlds[world].region(place).put(parts[world], part) if place.restricted else part
                x = torch.cat(parts) if count > 1 else parts[0]
                self.kept[world][index] = part
            else:
                self.kept[world][index] = part.detach().clone()
        return x


def install(session: Session, arch: Architecture, stack: ExitStack, expose: Iterable[int] = ()) -> None:
    """Place on the model what a session needs; `stack` takes it away again.

    Args:
        session: what is visited.
        arch: the model's parts.
        stack: where the removal of every hook is registered, at the moment at which it is placed.
        expose: layers whose attention is computed with its inside exposed though nothing is visited there, so that the
            worlds of one comparison use one kernel.
    """
    wanted = session.touched()

    def on_output(module: nn.Module, edit: Callable[[Tensor], Tensor]) -> None:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (edit(output[0]), *output[1:])
            return edit(output)

        stack.callback(module.register_forward_hook(hook).remove)

    def on_input(module: nn.Module, edit: Callable[[Tensor], Tensor]) -> None:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (edit(args[0]), *args[1:]), kwargs
            name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
            return args, {**kwargs, name: edit(kwargs[name])}

        stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def visitor(name: str, layer: int = -1) -> Callable[[Tensor], Tensor] | None:
        key = (name, layer, None)
        return (lambda x: session.visit(key, x)) if key in wanted else None

    embed = visitor("embed")
    if embed:
        on_output(arch.embed, embed)
    pos_embed = visitor("pos_embed")
    if pos_embed:
        assert arch.pos_embed is not None
        # Positions that all rows share come as one row, which an edit could not tell apart.
        on_output(arch.pos_embed, lambda x: pos_embed(x.expand(session.rows, *x.shape[1:])))
    first = visitor("resid_pre", 0)
    if first:
        on_input(arch.blocks[0].module, first)
    for layer, block in enumerate(arch.blocks):
        names = {name for name, at, _ in wanted if at == layer}
        if names or layer in expose:
            _install_block(session, arch, block, layer, names, on_input, on_output, stack, layer in expose)
    final = visitor("ln_final")
    if final:
        on_output(arch.norm, final)
    logits = visitor("logits")
    if logits:
        stack.enter_context(arch.lift_cap())
        # A classifier unembeds one position of each row, which its output has no axis for.
        one = (lambda x: logits(x.unsqueeze(1)).squeeze(1)) if arch.readout is not None else logits
        on_output(arch.unembed, lambda x: one(arch.capped(x)))


def _install_block(
    session: Session,
    arch: Architecture,
    block: Block,
    layer: int,
    names: set[str],
    on_input: Callable[[nn.Module, Callable[[Tensor], Tensor]], None],
    on_output: Callable[[nn.Module, Callable[[Tensor], Tensor]], None],
    stack: ExitStack,
    expose: bool,
) -> None:
    """Place the hooks of one block. `held` carries values between the hooks of one forward pass."""
    held: dict[str, Tensor] = {}

    def visit(name: str, x: Tensor, guard: Guard | None = None) -> Tensor:
        return session.visit((name, layer, None), x, guard) if name in names else x

    # One module may drop of both sublayers: which of them has ended is known by the norm that was called last.
    twice, in_mlp = block.drop1 is not None and block.drop1 is block.drop2, [False]

    def ended(module: nn.Module, edit: Callable[[Tensor], Tensor], of_mlp: bool) -> None:
        on_output(module, (lambda x: edit(x) if in_mlp[0] == of_mlp else x) if twice else edit)

    def entered(of_mlp: bool, x: Tensor) -> Tensor:
        in_mlp[0] = of_mlp
        return x

    if twice and block.norm2 is not None and names & {"attn_out", "mlp_out", "resid_mid"}:
        on_input(block.norm1, partial(entered, False))
        on_input(block.norm2, partial(entered, True))

    if names & {"attn_in", "q_input", "k_input", "v_input"}:

        def attn_in(x: Tensor) -> Tensor:
            x = visit("attn_in", x)
            for name in ("q_input", "k_input", "v_input"):
                if name in names:
                    projection = getattr(block, name[0])
                    copies = x.unsqueeze(2).expand(-1, -1, projection.heads, -1)
                    edited = visit(name, copies)
                    if edited is not copies:
                        held[name] = edited
            return x

        on_input(block.norm1, attn_in)

    shared: dict[nn.Module, list[str]] = {}
    for name in ("q", "k", "v"):
        if names & {name, f"{name}_input"}:
            shared.setdefault(getattr(block, name).module, []).append(name)
    for module, parts in shared.items():

        def project(out: Tensor, parts: list[str] = parts) -> Tensor:
            for name in parts:
                projection = getattr(block, name)
                part = projection.read(out)
                if f"{name}_input" in held:
                    # forward() rather than a call, which would run the hooks of the norm once more.
                    part = projection.per_head(block.norm1.forward(held.pop(f"{name}_input")))
                out = projection.write(out, visit(name, part))
            return out

        on_output(module, project)

    if names & INSIDE or expose:
        stack.enter_context(arch.swap_attention(block.attention, _exposed(block, visit, names, arch.causal)))

    if names & {"z", "result"}:

        def z(x: Tensor) -> Tensor:
            heads = visit("z", x.unflatten(-1, (block.q.heads, block.q.width)))
            if "result" in names:
                held["z"] = heads
            return heads.flatten(-2)

        on_input(block.out, z)
    if "result" in names:
        on_output(block.out, lambda out: out + head_results_change(block, held.pop("z"), lambda x: visit("result", x)))
    if "attn_out" in names:
        ended(block.attention_end, lambda x: visit("attn_out", x), False)
    if block.mlp is not None and block.norm2 is not None:
        if names & {"resid_mid", "mlp_in"}:

            def mlp_in(x: Tensor) -> Tensor:
                x = visit("resid_mid", x)
                if "resid_mid" in names:
                    held["resid_mid"] = x
                return visit("mlp_in", x)

            on_input(block.norm2, mlp_in)
        if "mlp_pre" in names:
            on_output(block.mlp.pre, lambda x: visit("mlp_pre", x))
        if "mlp_post" in names:
            on_input(block.mlp.down, lambda x: visit("mlp_post", x))
        if names & {"mlp_out", "resid_mid"}:

            def mlp_out(x: Tensor) -> Tensor:
                x = visit("mlp_out", x)
                if "resid_mid" in names:
                    held["mlp_out"] = x
                return x

            ended(block.mlp_end, mlp_out, True)
    if names & {"resid_post", "resid_mid"}:

        def resid_post(x: Tensor) -> Tensor:
            # The block keeps its own copy of the residual from before the norm, where no hook reaches it.
            if "resid_mid" in names:
                x = held.pop("resid_mid") + held.pop("mlp_out")
            return visit("resid_post", x)

        on_output(block.module, resid_post)


def head_results_change(block: Block, z: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:
    """The change of the attention output that an edit of the heads' results [..., H, M] makes."""
    weight, _ = linear_weight(block.out)
    result = torch.einsum("...hd,mhd->...hm", z, weight.unflatten(1, (block.q.heads, block.q.width)))
    edited = edit(result)
    return torch.zeros_like(result[..., 0, :]) if edited is result else (edited - result).sum(-2)


def _exposed(
    block: Block, visit: Callable[..., Tensor], names: set[str], causal: bool
) -> Callable[..., tuple[Tensor, None]]:
    """An attention function that shows its inside, in the form that models call theirs."""

    def attend(
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **_: Any,
    ) -> tuple[Tensor, None]:
        for name in ("rot_q", "rot_k"):
            if name in names:
                x = visit(name, (q if name == "rot_q" else k).transpose(1, 2)).transpose(1, 2)
                q, k = (x, k) if name == "rot_q" else (q, x)
        allowed, bias = read_mask(mask, q.shape[2], k.shape[2], q.device, block.window, causal)
        scaling = block.scaling if scaling is None else scaling
        return exposed_attention(q, k, v, allowed, scaling, visit, bias, dropout, block.softcap), None

    return attend
