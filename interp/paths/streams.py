"""The residual stream of a run taken apart: what each writer adds to it, and what each reader reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hooks import Inputs, Model, PathError, Plan, Site, World, linear_weight, run_worlds
from interp.parts import Linear, bias_output, head_outputs, post_norm
from interp.paths.nodes import QKV, Writer
from interp.sides import check_model


@dataclass(frozen=True, eq=False)
class Streams:
    """What every writer adds to the residual stream of one run, kept in the smallest form.

    Attributes:
        model: the wrapped model.
        inputs: what was run.
        embedded: [B, T, M], the residual stream before the first block.
        z: for each layer [B, T, H, D].
        mlp_out: for each layer [B, T, M]; None without an MLP.
        attn_in: for each layer [B, T, M], what attention reads; mlp_in: what the MLP reads.
        final: [B, T, M], what the last norm reads.
        held: the plan that was held on the model.
        per_head: what each head reads [B, T, H, M], by site, where that plan has a part between it and q, k or v.
    """

    model: Model
    inputs: Inputs
    embedded: Tensor
    z: tuple[Tensor, ...]
    mlp_out: tuple[Tensor | None, ...]
    attn_in: tuple[Tensor, ...]
    mlp_in: tuple[Tensor | None, ...]
    final: Tensor
    held: Plan = field(default_factory=Plan)
    per_head: dict[Site, Tensor] = field(default_factory=dict)
    _posts: dict[int, Linear] = field(default_factory=dict)

    def rows(self, window: slice) -> Streams:
        """The same for a range of rows."""

        def cut(values: Sequence[Any]) -> Any:
            return tuple(None if value is None else value[window] for value in values)

        return Streams(
            self.model, self.inputs.rows(window), self.embedded[window], cut(self.z), cut(self.mlp_out),
            cut(self.attn_in), cut(self.mlp_in), self.final[window],
            self.held, {place: value[window] for place, value in self.per_head.items()},
        )  # fmt: skip

    def heads(self, layer: int) -> Tensor:
        """What each head of a layer adds, [B, T, H, M]."""
        block = self.model.architecture.blocks[layer]
        return head_outputs(block, self.z[layer], self._post(layer))

    def head(self, layer: int, head: int) -> Tensor:
        """What one head adds, [B, T, M]."""
        block = self.model.architecture.blocks[layer]
        weight, _ = linear_weight(block.attention.out)
        part = weight[:, head * block.attention.q.width : (head + 1) * block.attention.q.width]
        return self._post(layer)(self.z[layer][..., head, :] @ part.T)

    def writer(self, writer: Writer) -> Tensor:
        """What a writer adds, [B, T, M]; of a whole attention layer without the bias, which never changes."""
        if writer.kind == "input":
            return self.embedded
        if writer.kind == "mlp":
            value = self.mlp_out[writer.layer]
            assert value is not None
            return value
        return self.heads(writer.layer).sum(2) if writer.head is None else self.head(writer.layer, writer.head)

    def _post(self, layer: int) -> Linear:
        if layer not in self._posts:
            self._posts[layer] = post_norm(self.model.architecture.blocks[layer], self.z[layer])
        return self._posts[layer]

    def read_by(self, kind: str, layer: int) -> Tensor:
        """The residual stream that a reader of some kind reads, [B, T, M]."""
        if kind == "logits":
            return self.final
        value = (self.mlp_in if kind == "mlp" else self.attn_in)[layer]
        assert value is not None
        return value


_NORM = ("ln1_scale", "ln1")
INSIDE = {
    **{kind: (f"{kind}_input", *_NORM, kind) for kind in QKV},
    "attn": (*_NORM, *(name for kind in QKV for name in (f"{kind}_input", kind))),
    "mlp": ("ln2_scale", "ln2", "mlp_pre", "mlp_pre_linear", "mlp_post", "mlp_out"),
    "logits": ("ln_final_scale", "ln_final"),
}
"""The sites between what a reader of some kind reads and what it computes of that."""


def edits(held: Plan, kind: str, layer: int) -> bool:
    """Whether a plan edits what the readers of a kind compute from their input."""
    keys = {Site(name, None if kind == "logits" else layer).key for name in INSIDE[kind]}
    return any(item.site.key in keys for item in held)


@torch.no_grad()
def streams(
    model: Model, world: Inputs | World, budget: int | None = None, seed: int = 0, executor: str = "auto"
) -> Streams:
    """Run inputs (or a world), under what is held on the model, and take the residual stream apart."""
    world = world if isinstance(world, World) else World(world)
    blocks = model.architecture.blocks
    sites = [Site("resid_pre", 0), *(Site("z", layer) for layer in range(len(blocks)))]
    sites += [Site("attn_in", layer) for layer in range(len(blocks))]
    mlps = [layer for layer, block in enumerate(blocks) if block.mlp is not None]
    sites += [Site(name, layer) for name in ("mlp_out", "mlp_in") for layer in mlps]
    sites.append(Site("resid_post", len(blocks) - 1))
    held, _ = model.held_on(world.inputs)
    inside = [Site(f"{kind}_input", layer) for layer in range(len(blocks)) for kind in QKV if edits(held, kind, layer)]
    sites += inside
    ran = run_worlds(model, [world], sites, executor=plainly(executor), budget=budget, seed=seed)
    pieces = [outcome.values for outcome in ran]
    values = iter([torch.cat([piece[i] for piece in pieces]) for i in range(len(sites))])
    embedded = next(values)
    z, attn_in = ([next(values) for _ in blocks] for _ in range(2))
    out, read = ({layer: next(values) for layer in mlps} for _ in range(2))
    every = range(len(blocks))
    return Streams(
        model=model,
        inputs=world.inputs,
        embedded=embedded,
        z=tuple(z),
        mlp_out=tuple(out.get(layer) for layer in every),
        attn_in=tuple(attn_in),
        mlp_in=tuple(read.get(layer) for layer in every),
        final=next(values),
        held=held,
        per_head={place: next(values) for place in inside},
    )


def additive(model: Model, inputs: Inputs, budget: int | None, seed: int, executor: str) -> Streams:
    """`streams` of a run that is the sum of what writers add, or PathError."""
    run = streams(model, inputs, budget, seed, executor)
    require_additive(run)
    return run


def plainly(executor: str) -> str:
    """How one world alone is run: by the model itself, which has nothing to share, unless the caller says otherwise."""
    return "batched" if executor == "auto" else executor


@torch.no_grad()
def check_additive(model: Model, inputs: Inputs, *, tolerance: float | None = None, executor: str = "auto") -> float:
    """Check that the residual stream is the sum of what the graph's writers add, at every reader.

    Args:
        model: a wrapped model.
        inputs: what it is checked on.
        tolerance: largest difference allowed, relative to the largest entry; default 1000 times the dtype's resolution.
        executor: see `run_worlds`.

    Returns:
        The largest relative difference.

    Raises:
        ModelError: the model is in training mode.
        PathError: it is not, so that a graph of writers and readers does not describe this model.
    """
    check_model(model, "noising")
    return require_additive(streams(model, inputs, executor=executor), tolerance)


@torch.no_grad()
def require_additive(run: Streams, tolerance: float | None = None) -> float:
    """`check_additive` of a run that is at hand."""
    arch, real = run.model.architecture, run.inputs.mask.to(run.embedded.device)
    limit = 1000 * torch.finfo(run.embedded.dtype).eps if tolerance is None else tolerance
    total, worst = run.embedded, 0.0

    def compare(read: Tensor, where: str) -> None:
        nonlocal worst
        difference = float((read - total)[real].abs().max() / read[real].abs().max().clamp_min(1e-30))
        worst = max(worst, difference)
        if not difference <= limit:
            why = "the graph does not describe this model"
            if len(run.held):
                why += (
                    ", or not under the plan that is held on it, which may edit what writers add (embed, z, mlp_out) "
                    "and compute (q, pattern, mlp_post), and not the stream between them"
                )
            raise PathError(
                f"the residual stream that {where} reads is not the sum of what the writers before it add (it differs "
                f"by {difference:.1e} of its largest entry): {why}"
            )

    for layer, block in enumerate(arch.blocks):
        compare(run.attn_in[layer], f"attention of layer {layer}")
        bias = bias_output(block, run.z[layer], run._post(layer))
        attended = run.heads(layer).sum(2) if bias is None else run.heads(layer).sum(2) + bias
        before = total
        total = total + attended
        if block.mlp is None:
            continue
        if block.parallel:
            total = before
        compare(run.read_by("mlp", layer), f"the MLP of layer {layer}")
        mlp_out = run.mlp_out[layer]
        assert mlp_out is not None
        total = before + attended + mlp_out
    compare(run.final, "the final norm")
    return worst
