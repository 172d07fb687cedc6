"""Whether a model's description can be believed: the copy-on-write executor is compared with the model's own forward.

A description says which modules a model is made of. It is wrong where a model does something besides (a subclass with
an MLP of its own, a multiplier, a norm elsewhere), and nothing but a comparison finds that. It is made once for a model
as it is made up and a regime (dtype, padding, within or past its window and its rotary length), on one short row: the
logits of the base, and of two worlds that edit a single token, which is what finds values that depend on what else is
computed with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .backends.gate import gate_of
from .backends.packed.base import Base, record_keys
from .backends.packed.shared import run_against, run_base
from .backends.passes import run_pass
from .errors import SiteError
from .models.network import Network
from .plan.inputs import Inputs
from .plan.operations.values import Steer
from .plan.plan import Intervention, Plan, World
from .plan.sites import Site, Span
from .resolving import resolve

LENGTH = 8
"""Tokens of the row, where the regime needs no more."""
ALLOWED = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference that is taken for rounding, relative to the largest logit. Models of float64 have parts in
float32."""


def distrust(network: Network, inputs: Inputs) -> str:
    """Why the description of a model cannot be believed on inputs of this kind; empty where it can."""
    row, regime = short_row(network, inputs)
    if regime not in network.trusted:
        network.trusted[regime] = compare(network, row)
    return network.trusted[regime]


def short_row(network: Network, inputs: Inputs) -> tuple[Inputs, Any]:
    """A row as short as the regime of some inputs allows, and the regime."""
    if inputs.pixels is not None:
        return inputs.rows(slice(0, 1)), (network.dtype, network.device, "images")
    attentions = [block.attention for block in network.architecture.blocks]
    bounds = {a.window for a in attentions if a.window is not None} | set(network.architecture.bounds)
    bounds |= {a.rotary.length for a in attentions if a.rotary is not None and a.rotary.length is not None}
    longest = int(inputs.lengths.max())
    passed = tuple(sorted(bound for bound in bounds if longest > bound))
    if inputs.pictures:
        # Whole, because its images fill all of their places; padded as the batch is.
        seen = inputs.pictures.lengths > 0
        row = int(torch.where(seen, inputs.lengths, 0).argmax() if passed else
                  torch.where(seen, inputs.lengths, inputs.width + 1).argmin())  # fmt: skip
        sides = tuple(bool((~inputs.mask[:, column]).any()) for column in (0, -1))
        return inputs.rows(slice(row, row + 1)), (network.dtype, network.device, "seen", *sides, passed)
    tokens = min(longest, max([LENGTH, *(bound + 3 for bound in passed)]))
    left, right = (2 * int(bool((~inputs.mask[:, column]).any())) for column in (0, -1))
    most = int(inputs.lengths.argmax())
    ids = inputs.ids[most][inputs.mask[most]][:tokens]
    ids = torch.nn.functional.pad(ids, (left, right))
    mask = torch.nn.functional.pad(torch.ones(tokens, dtype=torch.bool), (left, right))
    return Inputs.of(ids[None], mask[None]), (network.dtype, network.device, tokens, left, right, passed)


@torch.no_grad()
def compare(network: Network, row: Inputs) -> str:
    """What a model does on one row otherwise than its description says; empty where nothing."""
    module = network.module
    with gate_of(module).lock, gate_of(module).suspended(), noise_for_zeros(module):
        try:
            streams, output = _native(network, World(row), [Site("resid_pre", at) for at in _layers(network)])
        except SiteError as error:
            return f"the model's description is of parts that it does not call: {error}"
        worlds = [World(row), *_edits(row, network, streams)]
        truth = [_native(network, world, [_end(network)])[0][0] for world in worlds]
        if not _close(truth[0], output, row, network.dtype):
            return "the logits that the model returns are not what its unembedding gives"
        try:
            found = _packed(network, row, worlds[1:])
            inside = _taken_apart(network, row)
        except Exception as error:  # a description may be wrong in any way
            return f"the model's description does not run: {type(error).__name__}: {error}"
    names = ("its logits", "a token edited before the first block", "a token edited further up")
    for name, got, want in zip(names, found, truth, strict=True):
        if not _near(got, want, network.dtype):
            return f"the model does something that its description leaves out ({name} differ by {_gap(got, want):.1e})"
    if not _near(inside, truth[0], network.dtype):
        return (
            "an MLP or an attention of the model does something besides its parts "
            f"(its logits differ by {_gap(inside, truth[0]):.1e})"
        )
    return ""


def _layers(network: Network) -> tuple[int, int]:
    return (0, network.n_layers // 2)


def _native(network: Network, world: World, reads: list[Site]) -> tuple[list[Tensor], Tensor]:
    """Values of one world in the model itself, and the logits that it returns."""
    program = resolve(world, network.sizes, {}, device=network.device)
    run, logits = run_pass(network, [program], [world.inputs], [reads], frozenset())
    return list(run.values(0)), logits


def _edits(row: Inputs, network: Network, streams: list[Tensor]) -> list[World]:
    """Two worlds in which one token's residual is moved, by about as much as it is long."""
    generator = torch.Generator().manual_seed(0)
    length, worlds = int(row.lengths[0]), []
    for layer, position, stream in zip(_layers(network), (length // 2, min(1, length - 1)), streams, strict=True):
        vector = torch.randn(stream.shape[-1], generator=generator, dtype=torch.float64)
        vector = (vector * float(stream.double().pow(2).mean().sqrt())).to(stream)
        worlds.append(World(row, Plan((Intervention(Site("resid_pre", layer, pos=position), Steer(vector)),))))
    return worlds


def _packed(network: Network, row: Inputs, worlds: list[World]) -> list[Tensor]:
    """The logits of the base and of worlds, as the copy-on-write executor has them."""
    keys = record_keys({item.site.key for world in worlds for item in world.plan})
    base = Base(network, row, slice(0, 1), [_end(network)], frozenset(), keys | {_end(network).key})
    return [_ended(base, row), *run_against(base, worlds).values[0]]


def _end(network: Network) -> Site:
    """What is compared: the logits of all real tokens, or the last states of a model without a head."""
    return network.architecture.end.at(pos=Span())


def _ended(base: Base, row: Inputs) -> Tensor:
    """Run a base of one row, and return what is compared of it."""
    logits, end = run_base(base), _end(base.network)
    if end.name == "logits":
        return logits[0]
    return base.values[end.key][row.mask[0].to(base.device)][None]


def _taken_apart(network: Network, row: Inputs) -> Tensor:
    """The logits of the base where somebody looks inside every MLP and every attention."""
    blocks = network.architecture.blocks
    inside = [Site(name, layer).key for layer in range(len(blocks)) for name in ("mlp_post", "expert_out")]
    keys = {key for key in inside if key in network.sizes}
    shown = frozenset(layer for layer, block in enumerate(blocks) if not block.attention.opaque)
    base = Base(network, row, slice(0, 1), [_end(network)], shown, record_keys(keys | {_end(network).key}))
    return _ended(base, row)


def _close(read: Tensor, output: Tensor, row: Inputs, dtype: torch.dtype) -> bool:
    real = output if output.shape[1] == 1 else output[row.mask.to(output.device)][None]
    return _near(read, real, dtype)


def _near(one: Tensor, two: Tensor, dtype: torch.dtype) -> bool:
    return _gap(one, two) <= ALLOWED.get(dtype, 1e-1)


def _gap(one: Tensor, two: Tensor) -> float:
    """The largest difference relative to the largest entry; NaN where either is."""
    scale = float(two.double().abs().max())
    return float((one.double() - two.double()).abs().max()) / max(scale, 1e-30)


@contextmanager
def noise_for_zeros(module: nn.Module) -> Iterator[None]:
    """Put noise in the place of parameters that are all zero, in which an error would not show, and take it out again.

    Fresh biases are, and the second matrix of a low-rank adapter. The parameters themselves are not written into.
    """
    generator = torch.Generator().manual_seed(0)
    replaced: dict[int, nn.Parameter] = {}
    put: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for part in module.modules():
            for name, p in part._parameters.items():
                if p is None or not p.is_floating_point() or not _all_zero(p):
                    continue
                if id(p) not in replaced:
                    noise = 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float32)
                    replaced[id(p)] = nn.Parameter(noise.to(p.device, p.dtype), requires_grad=False)
                put.append((part, name, p))
                part._parameters[name] = replaced[id(p)]
        yield
    finally:
        for part, name, p in put:
            part._parameters[name] = p


def _all_zero(p: Tensor) -> bool:
    flat = p.detach().flatten()
    # Most weights show within a few numbers that they are not.
    return p.device.type != "meta" and not bool(flat[:64].any()) and not bool(flat.any())
