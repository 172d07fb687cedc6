"""A row's numbers do not depend on where it stands: padded on the left, on the right, beside others, or alone."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import interp as ip
from tests import zoo
from tests.turns import pairs

EXACT = {"rtol": 0.0, "atol": 1e-10}
LENGTHS = (7, 4, 5)
FAMILIES = ["gpt2", "mistral", "gemma2", "neox", "small_rms_rotary_gqa"]
IDS = torch.tensor([4, 0, 9])

each_family = pytest.mark.parametrize("family", FAMILIES)


def prompts(seed: int, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, zoo.VOCAB, (n,), generator=generator).tolist() for n in lengths]


def real(x: ip.Inputs, place: ip.Site, value: Tensor, row: int) -> Tensor:
    """One row of a value, at its real tokens alone, in the order of their positions."""
    at = x.mask[row].nonzero().flatten()
    value = value[row : row + 1]
    for axis in ("pos", "key_pos"):
        if axis in place.axes:
            value = value.index_select(place.axes.index(axis), at)
    return value


def everywhere(model: ip.Model) -> list[ip.Site]:
    return [
        ip.site(info.name, layer if info.layers else None)
        for info in model.sites()
        for layer in (range(model.n_layers) if info.layers else (0,))
        if not info.layers or (info.name, layer, None) in model.sizes
    ]


@each_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_captured_values(family, side):
    """Every site, unedited and under edits whose positions are counted from both ends."""
    model = zoo.wrapped(family)
    sites = everywhere(model)
    edits = ip.scale(ip.site("resid_pre", 1, pos=(1, -2)), 2.0) + ip.zero(ip.site("z", 0, head=1, pos=slice(-2, None)))
    edits += ip.knockout(ip.site("scores", 1, head=0, pos=slice(2, None), key_pos=1))
    x = model.inputs(prompts(1), padding=side)
    for plan in (ip.Plan(), edits):
        run = model.run(x, plan, capture=sites)
        for row, tokens in enumerate(prompts(1)):
            alone = model.run(model.inputs([tokens]), plan, capture=sites)
            for place in sites:
                found, expected = real(x, place, run.tape[place], row), alone.tape[place]
                torch.testing.assert_close(found, expected, **EXACT, msg=lambda text, p=place: f"{p}: {text}")
                assert float(expected.nan_to_num(0, 0, 0).abs().max()) > 1e-3
            # Read as parts: the p-th token of a row is the p-th, from either end.
            part = [ip.site("resid_post", 1, pos=pos) for pos in (1, -1, (0, -2))]
            parts = model.run(x, plan, capture=part).tape
            for place in part:
                chosen = alone.tape[ip.site("resid_post", 1)][:, list(torch.as_tensor(place.pos).reshape(-1))]
                torch.testing.assert_close(parts[place][row : row + 1], chosen, **EXACT)


def random_plans(donors: ip.Inputs) -> dict[str, ip.Plan | ip.Intervention]:
    resample = partial(ip.resample, source=donors, seed=3)
    return {
        "noise": ip.noise(ip.site("resid_pre", 1, pos=(1, -1)), 0.5, seed=2),
        "noise on heads": ip.noise(ip.site("z", 1, head=(1, 2)), 0.5),
        "noise on scores": ip.noise(ip.site("scores", 0, pos=slice(1, None), key_pos=0), 0.7),
        "resample": resample(ip.site("resid_pre", 1, pos=(2, 0))),
        "resample a head": resample(ip.site("v", 1, head=1)),
        "resample a pattern": resample(ip.site("pattern", 1, head=2)),
    }


@each_family
@pytest.mark.parametrize("executor", ["sequential", "batched", "shared"])
def test_random_interventions(family, executor):
    """A draw is known by the row's id and the position in the row, and a donor by its own positions."""
    model = zoo.wrapped(family)
    sets = {side: model.inputs(prompts(3, (7, 8, 7, 9)), padding=side) for side in ("right", "left")}
    reads = [ip.site("logits", pos=-1), ip.site("logits", pos=2)]

    def changes(x: ip.Inputs, side: str) -> dict[str, Tensor]:
        worlds = [ip.World(x, plan) for plan in (ip.Plan(), *random_plans(sets[side]).values())]
        found = {o.index: torch.stack(list(o.values)) for o in ip.run_worlds(model, worlds, reads, executor=executor)}
        return {name: found[1 + n] - found[0] for n, name in enumerate(random_plans(sets[side]))}

    rows = prompts(1)
    both = {side: changes(model.inputs(rows, padding=side, row_ids=IDS), side) for side in ("right", "left")}
    for row, tokens in enumerate(rows):
        alone = changes(model.inputs([tokens], row_ids=IDS[row : row + 1]), "left")
        for name, change in alone.items():
            assert float(change[0].abs().max()) > 1e-6, name
            for side in ("right", "left"):
                torch.testing.assert_close(both[side][name][:, row : row + 1], change, **EXACT, msg=f"{name}, {side}")


POSITIONS = {
    "an int": 1,
    "the last": -1,
    "from the end": -3,
    "several": (0, -2),
    "from the second on": slice(1, None),
    "the last two": slice(-2, None),
    "to the last": slice(None, -1),
    "all": None,
    "a mask": "odd",
    "one a row": torch.tensor([3, 1, 4]),
}


@pytest.mark.parametrize(
    ("name", "family", "sides"),
    pairs(POSITIONS, ["gpt2", "mistral", "small_rms_rotary_gqa"], [("left", "right"), ("right", "left")]),
    ids=str,
)
def test_positions_of_a_source_that_is_padded_on_the_other_side(name, family, sides):
    """What is patched in is what the source has at the same positions of the same rows, as each pair has alone."""
    model, pos = zoo.wrapped(family), POSITIONS[name]
    source, x = (model.inputs(prompts(seed), padding=side) for seed, side in ((2, sides[0]), (1, sides[1])))
    tape = model.run(source, capture=[ip.site("resid_pre", 1), ip.site("z", 0), ip.site("pattern", 1)]).tape

    def plans(x: ip.Inputs, read: ip.World | ip.Tape, row: int | None = None) -> list[ip.Plan | ip.Intervention]:
        here = x.mask & (x.positions % 2 == 1) if isinstance(pos, str) else pos
        if isinstance(pos, Tensor) and row is not None:
            here = pos[row : row + 1]
        sites = [ip.site("resid_pre", 1, pos=here), ip.site("z", 0, head=(1, 2), pos=here)]
        sites += [ip.site("pattern", 1, head=0, pos=here), ip.site("pattern", 1, key_pos=here)]
        return [ip.patch(place, read) for place in sites]

    reads = [ip.site("logits", pos=-1), ip.site("logits", pos=1)]
    given = [*plans(x, ip.World(source)), *plans(x, tape)]

    def values(x: ip.Inputs, given: list, executor: str) -> list[Tensor]:
        found = ip.run_worlds(model, [ip.World(x, plan) for plan in given], reads, executor=executor)
        return [torch.cat(o.values, 1) for o in sorted(found, key=lambda o: o.index)]

    ran = {executor: values(x, given, executor) for executor in ("sequential", "batched", "shared")}
    for row, (mine, theirs) in enumerate(zip(prompts(1), prompts(2), strict=True)):
        alone, other = model.inputs([mine]), model.inputs([theirs])
        base = values(alone, [ip.Plan()], "sequential")[0]
        expected = values(alone, plans(alone, ip.World(other), row), "sequential")
        assert max(float((value - base).abs().max()) for value in expected) > 1e-6
        for executor, found in ran.items():
            for value, wanted in zip(found, 2 * expected, strict=True):
                torch.testing.assert_close(value[row : row + 1], wanted, **EXACT, msg=f"{executor}, row {row}")
