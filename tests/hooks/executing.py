"""What tests of executors share: worlds of every kind, all that they give, and how two executors agree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hooks as hk
from hooks import Inputs, Model, Site, World, patch, site
from tests import zoo

EXACT = {"rtol": 0.0, "atol": 1e-10}
LAYOUTS = {"flat": ([6, 6], "right"), "right": ([7, 4, 5], "right"), "left": ([7, 4, 5], "left")}
EXECUTORS = ("sequential", "batched", "shared")
SEVERAL = ["gpt2", "mistral", "qwen3", "neox", "gemma2", "small_rms_rotary_gqa", "small_attn_only", "small_qk_norm"]

each_family = pytest.mark.parametrize("family", zoo.FAMILIES)
several_families = pytest.mark.parametrize("family", SEVERAL)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_executor = pytest.mark.parametrize("executor", EXECUTORS)


def inputs(model: Model, layout: str, seed: int) -> Inputs:
    lengths, side = LAYOUTS[layout]
    return model.inputs(*zoo.random_inputs(zoo.VOCAB, lengths, side, seed))


def sharing_a_prefix(x: Inputs, keep: int) -> Inputs:
    """Inputs whose rows agree with those of `x` in their first `keep` tokens, and in no token from there on."""
    ids = torch.where(x.mask & (x.positions >= keep), x.ids % (zoo.VOCAB - 1) + 1, x.ids)
    return Inputs.of(ids, x.mask)


def full_rows(model: Model, x: Inputs) -> Inputs:
    """Donors that have every position of `x`."""
    return model.inputs(*zoo.random_inputs(zoo.VOCAB, [x.width] * 3, "right", 9))


def counts(place: Site, value: Tensor, x: Inputs) -> Tensor:
    """A read with zeros where it stands at padding, of which nothing is promised."""
    if place.restricted and isinstance(place.pos, (int, tuple)):
        return value
    if isinstance(place.pos, Tensor) and place.pos.dtype != torch.bool:
        return value
    if place.restricted:
        low, high = (place.pos.start, place.pos.stop) if isinstance(place.pos, hk.Span) else (None, None)
        sizes = [len(range(*slice(low, high).indices(n))) for n in x.lengths.tolist()]
        real = torch.arange(value.shape[place.axes.index("pos")]) < torch.tensor(sizes)[:, None]
    else:
        real = x.mask
    shape = [1] * value.ndim
    shape[0], shape[place.axes.index("pos")] = real.shape
    return torch.where(real.reshape(shape), value, 0.0)


class Ran:
    """Everything that worlds gave, put together from its chunks."""

    def __init__(self, model: Model, worlds: list[World], reads: list[Site], executor: str, **options: int) -> None:
        pieces: dict[int, dict[int, hk.Outcome]] = {}
        self.chunks = 0
        for outcome in hk.run_worlds(model, worlds, reads, executor=executor, **options):
            self.chunks += 1
            mine = pieces.setdefault(outcome.index, {})
            assert outcome.rows.start not in mine, "a row came twice"
            mine[outcome.rows.start] = outcome
            rows = outcome.rows.stop - outcome.rows.start
            assert [len(value) for value in outcome.values] == [rows] * len(reads)
        assert sorted(pieces) == list(range(len(worlds)))
        self.values: list[list[Tensor]] = []
        self.statuses: list[list[str]] = []
        for index, world in enumerate(worlds):
            ordered = [pieces[index][start] for start in sorted(pieces[index])]
            assert [o.rows.start for o in ordered] == [0, *(o.rows.stop for o in ordered[:-1])]
            assert ordered[-1].rows.stop == len(world.inputs)
            whole = [torch.cat([o.values[i] for o in ordered]) for i in range(len(reads))]
            self.values.append([counts(r, v, world.inputs) for r, v in zip(reads, whole, strict=True)])
            self.statuses.append([o.status for o in ordered])


def agree(one: Ran, two: Ran, worlds: list[World], reads: list[Site], atol: float = 1e-10) -> None:
    wrong = []
    for world, mine, theirs in zip(worlds, one.values, two.values, strict=True):
        for read, a, b in zip(reads, mine, theirs, strict=True):
            if a.shape != b.shape:
                wrong.append(f"{read} under {world.plan}: shapes {list(a.shape)} and {list(b.shape)}")
            elif not bool(((a - b).abs() <= atol).logical_or(a == b).all()):
                wrong.append(f"{read} under {world.plan}: off by {float((a - b).nan_to_num(9.9).abs().max()):.2g}")
    assert not wrong, f"{len(wrong)} disagree:\n" + "\n".join(wrong[:20])


def places(model: Model) -> list[Site]:
    return [
        site(info.name, layer if info.layers else None) for info in model.sites() for layer in range(info.layers or 1)
    ]


def bend(x: Tensor, ctx: hk.Context) -> Tensor:
    return torch.where(x.isfinite(), 0.6 * x + torch.cos(3.0 * x), x)


def menu(model: Model, x: Inputs, other: Inputs, inside: bool) -> list[World]:
    """A world for nearly everything that a plan can say, with and without sites inside attention."""
    source, reference, donors = World(other), World(sharing_a_prefix(x, 1)), World(full_rows(model, x))
    last, plans = model.n_layers - 1, []
    ways = [
        lambda place: hk.intervene(place.at(pos=(1, 3)), bend),
        lambda place: hk.scale(place.at(pos=-2), 0.5) if inside else hk.mean(place.at(pos=-2), reference),
        lambda place: patch(place.at(pos=-1), source),
        lambda place: hk.resample(place.at(pos=(1, -1)), donors),
        lambda place: patch(place.at(pos=slice(1, -1)), source).strength(0.4),
        # Nobody divides by nothing.
        lambda place: hk.freeze(place.at(pos=2)) if place.name.endswith("_scale") else hk.zero(place.at(pos=2)),
        lambda place: hk.noise(place.at(pos=3), 0.5),
    ]
    for number, place in enumerate(p for p in places(model) if p.layer in (None, 0, last)):
        if (place.name in ("scores", "pattern")) != inside:
            continue
        plans += [patch(place, source), ways[number % 7](place)]
        if "head" in place.axes and number % 2:
            plans.append(patch(place.at(head=-1), source))
    if inside:
        plans += [
            hk.knockout(site("scores", 0, head=1, pos=3, key_pos=(0, 2))),
            hk.knockout(site("pattern", last, key_pos=1)),
        ]
        plans += [hk.zero(site("pattern", last, key_pos=slice(1, 3))), hk.knockout(site("scores", 1, pos=0, key_pos=0))]
        plans += [hk.scale(site("pattern", 0, pos=3), 0.5) + patch(site("scores", 0, pos=2), source)]
        plans += [patch(site("pattern", 1, pos=-1, head=2), source) + hk.zero(site("v", 1, pos=1))]
    else:
        width = model.architecture.width
        basis = torch.stack([torch.linspace(-1, 1, width).double(), torch.linspace(0, 3, width).double().sin()])
        rows = torch.tensor([True, False, True])[: len(x)]
        plans += [
            hk.steer(site("resid_post", 0, pos=2), basis[0], scale=3.0),
            hk.project_out(site("resid_pre", last), basis),
            hk.interchange(site("resid_post", 0, pos=(0, -1)), basis[1], source),
            hk.freeze(site("attn_out", last)) + hk.scale(site("resid_pre", 0, pos=1), 2.0),
            hk.freeze(site("z", 1, head=0, pos=3)) + patch(site("resid_pre", 1, pos=2), source),
            patch(site("z", 0, head=2), source) + hk.zero(site("attn_out", 0, pos=1)) + hk.scale(site("q", 1), 1.5),
            patch(site("z", 1), source).where(rows),
            hk.zero(site("attn_out", 1)).where(x.mask & (x.positions != 2)),
            hk.scale(site("resid_pre", 1), 3.0).strength(torch.tensor([0.5, 1.0, 0.0])[: len(x)].double()),
            hk.recompute(site("resid_pre", 1, pos=2)),
            hk.clamp(site("k", 0, head=0, dim=(1, 2)), torch.tensor([0.5, -0.5]).double()),
            hk.zero(site("resid_post", 0, pos=torch.arange(len(x)))),
            hk.zero(site("resid_post", 0, pos=x.mask & (x.positions % 2 == 1))),
            patch(site("resid_pre", 1, pos=3), source, source_site=site("resid_pre", 0, pos=1)),
            patch(site("logits", pos=-1), source) + hk.zero(site("ln_final", pos=1)),
            hk.scale(site("embed", pos=1), 2.0) + hk.scale(site("embed", pos=1), 2.0),
        ]
    return [World(x, plan) for plan in plans] + [World(x)]


def reading(model: Model, x: Inputs, inside: bool) -> dict[str, list[Site]]:
    last, rows = model.n_layers - 1, len(x)
    mid = site("resid_mid" if ("resid_mid", last, None) in model.sizes else "attn_out", last)
    sets = {
        "last": [site("logits", pos=-1)],
        "second": [site("logits", pos=2)],
        "columns": [
            site("logits", pos=-1, dim=(3, 7)),
            site("logits", pos=1, dim=torch.arange(2 * rows).reshape(rows, 2)),
        ],
        "rows": [site("logits", pos=torch.tensor([2, 3, 1])[:rows]), site("logits", pos=(1, -2), dim=5)],
        "whole": [site("logits")],
        "span": [site("logits", pos=slice(2, None))],
        "mixture": [site("logits", pos=-1), mid, site("z", 1, head=(1, 3)), site("resid_pre", 1, pos=2), site("embed")],
        "early": [site("attn_out", 0), site("resid_post", 0, pos=(0, 3)), site("k", 0), site("q", 0, pos=-1)],
        "first": [site("resid_pre", 0, pos=slice(1, None)), site("v_input", 0, head=0)],
        "final": [site("ln_final", pos=-1), site("result", last, head=0)],
    }
    if inside:
        sets["pattern"] = [site("logits", pos=-1), site("pattern", last, pos=-1), site("scores", 0, head=1, pos=2)]
        sets["square"] = [site("pattern", 0)]
    return sets
