"""Sweeps against brute force: a loop over cells and rows, each row alone and without padding, edited by hand."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

import interp as ip
from hooks.errors import InputsError, InterpError, MetricError, ModelError, SiteError, UnfiredError
from interp import sweeps
from interp.results import STATUS
from tests import oracle, zoo
from tests.turns import in_turn

EXECUTORS = ("sequential", "batched", "shared")
RAGGED = (5, 3, 6, 6)
# With all memory, with next to none (a row or a world at a time), and with enough for a few.
RUNS = [("sequential", None), ("batched", None), ("shared", None), ("batched", 1), ("shared", 1), ("shared", 30_000)]
ANSWER, FOIL = 7, 9
METRIC = ip.logit_diff(ANSWER, FOIL)
CLOSE = {"rtol": 0, "atol": 1e-10}

HEADS, SQUARE, RESIDUAL = {"pos": 1, "head": 2, "dim": 3}, {"head": 1, "pos": 2, "key_pos": 3}, {"pos": 1, "dim": 2}
AXES = dict.fromkeys(["q_input", "k_input", "v_input", "q", "k", "v", "rot_q", "rot_k", "z", "result"], HEADS)
AXES |= {"scores": SQUARE, "pattern": SQUARE}

Where = dict[str, object]
Value = Callable[[str, "int | None", Tensor, int], Tensor]
"""From a site's name, layer and own value [1, ...], and the row, to what is written there."""


def prompts(lengths: Sequence[int], seed: int) -> list[list[int]]:
    """Random rows, of which two seeds share the first token: there a patch of the embeddings changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(1, zoo.VOCAB, (n,), generator=generator).tolist() for n in lengths]
    return [[3, *row[1:]] for row in rows]


def last_diff(logits: Tensor, row: int = 0) -> float:
    return float(logits[-1, ANSWER] - logits[-1, FOIL])


class Pair:
    """A model with clean and corrupt prompts, wrapped for the engine and bare for the brute force."""

    def __init__(self, family: str, lengths: Sequence[int] = (5, 5, 5), padding: str = "right") -> None:
        self.module = zoo.make(family)
        self.model = ip.wrap(self.module)
        self.rows = {"clean": prompts(lengths, 0), "corrupt": prompts(lengths, 1)}
        self.clean, self.corrupt = (self.model.inputs(self.rows[k], padding=padding) for k in ("clean", "corrupt"))

    @functools.cached_property
    def caches(self) -> dict[str, list[dict]]:
        return {name: [self.forward(row)[1] for row in rows] for name, rows in self.rows.items()}

    def forward(self, row: list[int], edits: dict | None = None) -> tuple[Tensor, dict]:
        with torch.no_grad():
            logits, cache = oracle.forward(
                self.module, torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool), edits
            )
        return logits[0], cache

    def brute(
        self,
        cells: Sequence[Sequence[Where]],
        base: str = "corrupt",
        value: Value | None = None,
        measure: Callable[[Tensor, int], float] = last_diff,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The effect [cell, row] of every cell, whether it changed anything [cell], and the metric of the base [row].

        Args:
            cells: for each cell the places that it edits: "site", "layer", and indices by axis.
            base: which prompts are edited.
            value: what is written; by default what the other prompts have there.
            measure: from the logits [T, V] of a row alone, and the row, to the metric.
        """
        other = "clean" if base == "corrupt" else "corrupt"
        if value is None:

            def value(name: str, layer: int | None, x: Tensor, row: int) -> Tensor:
                return self.caches[other][row][name, layer]

        effect, changed = np.full((len(cells), len(self.rows[base])), np.nan), np.zeros(len(cells), bool)
        bases = np.array([measure(self.forward(row)[0], r) for r, row in enumerate(self.rows[base])])
        for c, cell in enumerate(cells):
            for r, row in enumerate(self.rows[base]):
                if not all(has(place, len(row)) for place in cell):
                    continue
                edits = {}
                for place in cell:
                    name, layer = str(place["site"]), place["layer"]

                    def edit(
                        x: Tensor, place: Where = place, name: str = name, layer=layer, c: int = c, r: int = r
                    ) -> Tensor:
                        new = torch.where(chosen(place, x.shape, name), value(name, layer, x, r), x)
                        changed[c] |= not torch.equal(new, x)
                        return new

                    edits[name, layer] = edit
                effect[c, r] = measure(self.forward(row, edits)[0], r) - bases[r]
        return effect, changed, bases

    def sweep(self, grid: ip.Grid, **options) -> ip.Result:
        """A sweep of both prompts; what is no patch edits the corrupt run, which it has to say."""
        if "intervention" in options:
            options = {"direction": "denoising", **options}
        return ip.sweep(self.model, self.clean, self.corrupt, grid, **{"metric": METRIC, **options})

    def ablate(self, grid: ip.Grid, **options) -> ip.Result:
        """A sweep of the clean prompts that needs no others."""
        return ip.sweep(self.model, self.clean, None, grid, **{"metric": METRIC, **options})

    def sweeps(self, grid: ip.Grid, turn: int | None = None, **options) -> list[ip.Result]:
        """One result an executor, with all memory and with next to none; of a turn, every other one of them."""
        runs = RUNS if turn is None else RUNS[turn % 2 :: 2]
        return [self.sweep(grid, executor=executor, budget=budget, **options) for executor, budget in runs]


def listed(value: object, size: int) -> list[int]:
    if isinstance(value, slice):
        return list(range(size))[value]
    return [i + size if i < 0 else i for i in (value if isinstance(value, tuple) else (value,))]


def has(place: Where, length: int) -> bool:
    found = [place[axis] for axis in ("pos", "key_pos") if axis in place and not isinstance(place[axis], slice)]
    return all(-length <= i < length for value in found for i in (value if isinstance(value, tuple) else (value,)))


def chosen(place: Where, shape: torch.Size, name: str) -> Tensor:
    """bool of a site's shape, for a row alone: True at the entries that a cell edits."""
    found = torch.ones(shape, dtype=torch.bool)
    for axis, dim in AXES.get(name, RESIDUAL).items():
        if axis in place:
            marks = torch.zeros(shape[dim], dtype=torch.bool)
            marks[listed(place[axis], shape[dim])] = True
            found &= marks.reshape([-1 if i == dim else 1 for i in range(len(shape))])
    return found


def places(site: str, **axes: Sequence) -> list[list[Where]]:
    """The cells of a product of axes, each editing one place."""
    return [[{"site": site, **dict(zip(axes, at, strict=True))}] for at in itertools.product(*axes.values())]


def agrees(result: ip.Result, expected: tuple[np.ndarray, np.ndarray, np.ndarray], exact: bool = True) -> None:
    """Effects, what they are measured from, and what is said of every cell.

    Args:
        exact: whether what is written is a copy or plain arithmetic, so that an equal value is equal bit for bit.
    """
    effect, changed, base = expected
    assert np.nanmax(np.abs(effect)) > 1e-2, "nothing happened, so nothing is tested"
    np.testing.assert_allclose(result.effect, effect.reshape(result.effect.shape), **CLOSE)
    np.testing.assert_allclose(result.base, base, **CLOSE)
    status = result.status.ravel()
    fired, inert, pruned = (status == code for code in range(len(STATUS)))
    assert not (changed & inert).any() and not (fired & ~changed & exact).any()
    assert (np.nan_to_num(effect[pruned]) == 0).all()
    assert (np.nan_to_num(result.effect.reshape(len(status), -1)[pruned]) == 0).all()
    assert np.isfinite(result.noise_floor).all()
    assert (result.noise_floor >= 0).all() and (result.noise_floor < 1e-10).all()


# Patching, grid by grid


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_resid_pre_by_layer_and_position(family):
    pair = Pair(family)
    expected = pair.brute(places("resid_pre", layer=range(pair.model.n_layers), pos=range(5)))
    for result in pair.sweeps(ip.grid("resid_pre", layer="all", pos="all"), zoo.FAMILIES.index(family)):
        agrees(result, expected)
        assert [axis.name for axis in result.axes] == ["layer", "pos"]
        np.testing.assert_allclose(result.source, [last_diff(pair.forward(r)[0]) for r in pair.rows["clean"]], **CLOSE)
        assert result.effect.shape == (pair.model.n_layers, 5, 3)
        # The first token is the same in both, and nothing in layer 0 has looked at another yet.
        assert result.status[0, 0] == STATUS.index("inert")


@pytest.mark.parametrize(("padding", "family"), [(p, f) for f, p in in_turn(zoo.FAMILIES, ["left", "right"])])
def test_ragged_rows(padding, family):
    pair = Pair(family, RAGGED, padding)
    site = "resid_mid" if ("resid_mid", 0, None) in pair.model.sizes else "attn_out"
    expected = pair.brute(places(site, layer=range(2), pos=range(6)))
    turn = zoo.FAMILIES.index(family) // 2
    for result in pair.sweeps(ip.grid(site, layer=[0, 1], pos="all"), turn):
        agrees(result, expected)
        assert np.isnan(result.effect[:, 3:, 1]).all() and np.isnan(result.effect[:, 5, 0]).all()
        assert np.isnan(result.effect).sum() == 2 * (3 + 1)
        assert np.isfinite(result.mean()).all()


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("family", ["gpt2", "mistral", "small_rms_rotary_gqa"])
def test_whole_activations_of_ragged_rows(family, padding):
    """All positions at once: however many rows are run at a time."""
    pair = Pair(family, RAGGED, padding)
    whole = [[{"site": "attn_out", "layer": layer}] for layer in range(2)]
    expected = pair.brute(whole)
    for result in pair.sweeps(ip.grid("attn_out", layer=[0, 1]), padding == "left"):
        agrees(result, expected)
    spans = [[{"site": "attn_out", "layer": layer, "pos": slice(-4, None)}] for layer in range(2)]
    expected = pair.brute(spans)
    for result in pair.sweeps(ip.grid("attn_out", layer=[0, 1], pos=slice(-4, None)), padding == "right"):
        agrees(result, expected)


@pytest.mark.parametrize("family", ["gpt2", "llama", "small_attn_only"])
def test_heads(family):
    pair = Pair(family)
    layers = range(pair.model.n_layers)
    expected = pair.brute(places("z", layer=layers, head=range(4)))
    for result in pair.sweeps(ip.grid("z", layer="all", head="all"), family == "llama"):
        agrees(result, expected)
    expected = pair.brute([[{"site": "z", "layer": 1, "head": h, "pos": p}] for h in range(4) for p in range(5)])
    for result in pair.sweeps(ip.grid("z", layer=1, head="all", pos="all"), family != "llama"):
        agrees(result, expected)
        assert [axis.name for axis in result.axes] == ["head", "pos"]


def test_key_value_heads_and_what_is_before_them():
    pair = Pair("llama")
    for site in ("k", "v"):
        expected = pair.brute(places(site, layer=range(3), head=range(2)))
        for result in pair.sweeps(ip.grid(site, layer="all", head="all")):
            agrees(result, expected)
    expected = pair.brute(places("q", head=range(4), layer=range(2), pos=(-1, -2)))
    for result in pair.sweeps(ip.grid("q", head="all", layer=[0, 1], pos=[-1, -2])):
        agrees(result, expected)


@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_edges_of_the_pattern(family):
    pair, layer = Pair(family, (4, 4, 3)), int(family == "gpt2")
    axes = {"layer": [layer], "head": range(4), "pos": range(4), "key_pos": range(4)}
    expected = pair.brute(places("pattern", **axes))
    for executor in EXECUTORS:
        grid = ip.grid("pattern", layer=[layer], head="all", pos="all", key_pos="all")
        agrees(pair.sweep(grid, executor=executor, budget=None if executor == "batched" else 50_000), expected)


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_several_kinds_of_sites_at_once(family, direction):
    pair = Pair(family)
    base, source = ("corrupt", "clean") if direction == "denoising" else ("clean", "corrupt")
    kinds = ["resid_pre", "attn_out", "mlp_out"]
    cells = [c for kind in kinds for c in places(kind, layer=range(2), pos=range(5))]
    expected = pair.brute(cells, base=base)
    turn = (family == "gpt2") + (direction == "noising")
    for result in pair.sweeps(ip.grid(kinds, layer="all", pos="all"), turn, direction=direction):
        agrees(result, expected)
        assert (result.axes[0].name, result.axes[0].values) == ("site", tuple(kinds))
        np.testing.assert_allclose(result.source, [last_diff(pair.forward(r)[0]) for r in pair.rows[source]], **CLOSE)
        assert result.config["direction"] == direction
    assert pair.sweep(ip.grid("attn_out", layer="all")).config["direction"] == "denoising"


def test_groups_spans_and_what_is_fixed():
    pair = Pair("llama", RAGGED)
    groups = [(0, 1), (1, 3)]
    cells = [
        [{"site": "z", "layer": layer, "head": g, "pos": -1} for layer in layers]
        for layers in ((0, 2), (1,))
        for g in groups
    ]
    expected = pair.brute(cells)
    for result in pair.sweeps(ip.grid("z", layer=[(0, 2), 1], head={"a": (0, 1), "b": (1, 3)}, pos=-1)):
        agrees(result, expected)
        assert result.axes[1].labels == ("a", "b") and result.axes[1].values == ((0, 1), (1, 3))
    for pos in (slice(1, None), slice(-2, None), slice(0, -1), slice(None, 4)):
        cells = [[{"site": "mlp_out", "layer": layer, "pos": pos}] for layer in range(3)]
        expected = pair.brute(cells)
        for executor in EXECUTORS:
            agrees(pair.sweep(ip.grid("mlp_out", layer="all", pos=pos), executor=executor), expected)
    cells = [[{"site": "resid_pre", "layer": 1, "pos": p}] for p in ((0, 2), (-1, -2), (2, 4), 1)]
    expected = pair.brute(cells)
    for result in pair.sweeps(ip.grid("resid_pre", layer=1, pos=[(0, 2), (-1, -2), (2, 4), 1])):
        agrees(result, expected)
        assert np.isnan(result.effect[2]).tolist() == [False, True, False, False]
    cells = [[{"site": "attn_out", "layer": 0, "dim": d, "pos": 1}] for d in range(24)]
    agrees(pair.sweep(ip.grid("attn_out", layer=0, dim="all", pos=1)), pair.brute(cells))
    whole = [[{"site": "z", "layer": layer, "pos": 2} for layer in range(3)]]
    agrees(pair.sweep(ip.grid("z", pos=2)), pair.brute(whole))  # no axis at all: one cell


@pytest.mark.parametrize("family", ["gpt2", "llama", "small_attn_only", "small_qk_norm"])
def test_every_site(family):
    """Every site that the model offers, by layer and position; edges of attention by query."""
    pair = Pair(family, (5, 3, 5))
    for site in pair.model.sites():
        if site.name == "pos_embed":  # the same in both prompts: nothing to patch, so something else is done
            expected = pair.brute(places(site.name, layer=[None], pos=(1, -1)), value=lambda name, layer, x, row: 2 * x)
            result = pair.sweep(ip.grid(site.name, pos=[1, -1]), intervention=lambda s: ip.scale(s, 2.0))
        else:
            layers = [0, 1] if site.layers else [None]
            expected = pair.brute(places(site.name, layer=layers, pos=(1, -1)))
            by_layer = {"layer": layers} if site.layers else {}
            result = pair.sweep(ip.grid(site.name, **by_layer, pos=[1, -1]))
        assert result.config["executor"] == "shared"
        agrees(result, expected)


@pytest.mark.parametrize("family", ["gpt2", "small_rms_rotary_gqa"])
def test_both_ends(family):
    """Sites outside the blocks, and the last residual, which patched in whole gives the other run."""
    pair = Pair(family, RAGGED, "left")
    for site in ("embed", "ln_final", "logits"):
        cells = [[{"site": site, "layer": None, "pos": p}] for p in (0, 1, -1)]
        expected = pair.brute(cells)
        for result in pair.sweeps(ip.grid(site, pos=[0, 1, -1]), family == "gpt2"):
            agrees(result, expected)
    last = pair.model.n_layers - 1
    result = pair.sweep(ip.grid("resid_post", layer=[last], pos=[-1]))
    np.testing.assert_allclose(result.effect[0, 0], result.source - result.base, **CLOSE)
    np.testing.assert_allclose(result.normalized(), 1, **CLOSE)


def test_the_axes_are_in_the_order_in_which_they_are_named():
    pair = Pair("gpt2")
    one = pair.sweep(ip.grid("z", layer="all", head="all", pos=[1, 4]))
    other = pair.sweep(ip.grid("z", pos=[1, 4], layer="all", head="all"))
    assert [a.name for a in other.axes] == ["pos", "layer", "head"] and other.effect.shape == (2, 2, 4, 3)
    np.testing.assert_allclose(other.effect, np.moveaxis(one.effect, 2, 0), **CLOSE)
    np.testing.assert_array_equal(other.status, np.moveaxis(one.status, 2, 0))
    assert np.abs(other.effect[0] - other.effect[1]).max() > 1e-3


@pytest.mark.parametrize("sides", [("left", "right"), ("right", "left")])
def test_clean_and_corrupt_padded_on_different_sides(sides):
    """Position p is the p-th real token of its row, in both: refused, or the same as with one side."""
    model = ip.wrap(zoo.make("llama"))
    rows = [prompts(RAGGED, seed) for seed in (0, 1)]
    for grid in (
        ip.grid("resid_pre", layer="all", pos="all"),
        ip.grid("z", layer="all"),
        ip.grid("pattern", layer=[1], key_pos="all"),
    ):
        expected = ip.sweep(model, *(model.inputs(r) for r in rows), grid, metric=METRIC)
        for executor in EXECUTORS:
            mixed = (model.inputs(r, padding=side) for r, side in zip(rows, sides, strict=True))
            try:
                result = ip.sweep(model, *mixed, grid, metric=METRIC, executor=executor)
            except InterpError:
                continue
            np.testing.assert_allclose(result.effect, expected.effect, **CLOSE)


# Anything in place of patch


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("corrupt", [True, False])
def test_zero_ablation(corrupt, padding):
    pair = Pair("qwen2", RAGGED, padding)
    base = "corrupt" if corrupt else "clean"
    expected = pair.brute(places("z", layer=range(2), head=range(4)), base, lambda name, layer, x, row: 0 * x)
    for result in (
        pair.sweeps(ip.grid("z", layer="all", head="all"), intervention=ip.zero)
        if corrupt
        else [
            pair.ablate(
                ip.grid("z", layer="all", head="all"),
                intervention=ip.zero,
                executor=e,
            )
            for e in EXECUTORS
        ]
    ):
        agrees(result, expected)
        if corrupt:
            np.testing.assert_allclose(
                result.source, [last_diff(pair.forward(r)[0]) for r in pair.rows["clean"]], **CLOSE
            )
        else:
            assert result.source is None and result.config["direction"] == "ablation"
        assert result.config["intervention"] == "zero"


def test_an_ablation_of_two_runs_says_which_one_it_edits():
    """Nothing is guessed; where an intervention reads one of the runs, the other one is edited."""
    pair, grid = Pair("gpt2"), ip.grid("z", layer=[1], head="all")
    run = functools.partial(ip.sweep, pair.model, pair.clean, pair.corrupt, grid, metric=METRIC)
    for one in (ip.zero, lambda s: ip.scale(s, 0.5), functools.partial(ip.mean, source=reference(pair, (5, 5))[1])):
        for method in (
            run,
            functools.partial(ip.attribution, pair.model, pair.clean, pair.corrupt, grid, metric=METRIC),
        ):
            with pytest.raises(InputsError, match=r"direction='noising' for the clean run.*corrupt=None"):
                method(intervention=one)
        clean, corrupt = (run(intervention=one, direction=d) for d in ("noising", "denoising"))
        np.testing.assert_allclose(clean.effect, pair.ablate(grid, intervention=one).effect, **CLOSE)
        assert np.abs(clean.effect - corrupt.effect).max() > 1e-3
    for world, direction in ((pair.clean, "denoising"), (pair.corrupt, "noising")):
        told = run(intervention=lambda s, world=world: ip.patch(s, ip.World(world)))
        assert told.config["direction"] == direction
        np.testing.assert_allclose(told.effect, run(direction=direction).effect, **CLOSE)
    only = {1: 2.0}  # a factory is asked for the cells of the grid alone
    assert run(intervention=lambda s: ip.scale(s, only[s.layer]), direction="noising").effect.shape == (1, 4, 3)
    with pytest.raises(InputsError, match="direction="):
        run(intervention=lambda s: ip.scale(s, only[s.layer]))


def reference(pair: Pair, lengths: Sequence[int], seed: int = 5) -> tuple[list[dict], ip.World]:
    """A reference set: each row's own activations by hand, and the world that has them."""
    rows = prompts(lengths, seed)
    return [pair.forward(row)[1] for row in rows], ip.World(pair.model.inputs(rows))


@pytest.mark.parametrize("pooled", [False, True])
def test_mean_ablation(pooled):
    """The mean over the reference set at each position; pooled, over the positions of a cell that has several too."""
    pair = Pair("gpt2")
    factory = functools.partial(ip.mean, pooled=pooled)
    for together, lengths in ((False, (5, 6, 7, 5)), (True, (5, 5, 5, 5))):
        caches, world = reference(pair, lengths)

        def average(name: str, layer: int, x: Tensor, row: int, caches=caches, together=together) -> Tensor:
            values = torch.cat([c[name, layer][:, :5] for c in caches])
            return values.mean((0, 1) if pooled and together else 0, keepdim=True).expand_as(x)

        where = {} if together else {"pos": range(5)}
        expected = pair.brute(places("resid_post", layer=range(2), **where), "clean", average)
        for executor, budget in RUNS:
            result = pair.ablate(
                ip.grid("resid_post", layer="all", **({} if together else {"pos": "all"})),
                intervention=functools.partial(factory, source=world),
                executor=executor,
                budget=budget,
            )
            agrees(result, expected, exact=False)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_mean_ablation_of_ragged_rows(padding):
    """The mean at a position is over the rows of the reference set that have it."""
    pair = Pair("gpt2", RAGGED, padding)
    caches, world = reference(pair, (6, 4, 7, 6, 5))

    def average(name: str, layer: int, x: Tensor, row: int) -> Tensor:
        means = []
        for p in range(x.shape[1]):
            means.append(torch.stack([c[name, layer][0, p] for c in caches if c[name, layer].shape[1] > p]).mean(0))
        return torch.stack(means)[None]

    expected = pair.brute(places("attn_out", layer=range(2), pos=range(6)), "clean", average)
    for executor, budget in RUNS:
        result = pair.ablate(
            ip.grid("attn_out", layer="all", pos="all"),
            intervention=functools.partial(ip.mean, source=world),
            executor=executor,
            budget=budget,
        )
        agrees(result, expected, exact=False)


def test_resample_ablation():
    """Every row gets the values of some one row of the reference set, the same one in every cell."""
    pair = Pair("gpt2", (5, 5, 5))
    caches, world = reference(pair, (5, 5, 5, 5))
    cells = places("z", layer=range(2), head=range(4))
    by_donor = np.stack(
        [pair.brute(cells, "clean", lambda name, layer, x, row, c=c: c[name, layer])[0] for c in caches]
    )

    def donors(**options) -> list[int]:
        factory = functools.partial(ip.resample, source=world, **options.pop("intervention", {}))
        found = []
        for executor, budget in (("sequential", None), ("batched", 1), ("shared", None), ("shared", 1)):
            result = pair.ablate(
                ip.grid("z", layer="all", head="all"),
                intervention=factory,
                executor=executor,
                budget=budget,
                **options,
            )
            gap = np.abs(by_donor - result.effect.reshape(1, 8, 3)).max(1)  # [donor, row]
            assert (gap.min(0) < 1e-10).all()
            found.append(gap.argmin(0).tolist())
        assert all(f == found[0] for f in found), "a draw depends on how the sweep is run"
        return found[0]

    drawn = [tuple(donors(seed=seed)) for seed in range(4)]
    assert len(set(drawn)) > 1 and drawn[0] == tuple(donors(seed=0))
    assert len({tuple(donors(intervention={"seed": seed})) for seed in range(3)}) > 1


def test_resampling_from_shorter_rows_takes_no_padding():
    """A donor that lacks a position has nothing to give there: what stands in its padding must not matter."""
    pair = Pair("gpt2", (6, 6, 6))
    rows = prompts((3, 6, 4), 5)
    effects = []
    for pad in (0, 11):
        ids = torch.tensor([row + [pad] * (6 - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (6 - len(row)) for row in rows])
        factory = functools.partial(ip.resample, source=ip.World(pair.model.inputs(ids, mask)))
        try:
            effects.append(
                [
                    ip.sweep(
                        pair.model,
                        pair.clean,
                        None,
                        ip.grid("attn_out", layer=[0]),
                        metric=ip.logit(7, pos=(4, 5)),
                        intervention=factory,
                        seed=seed,
                    ).effect
                    for seed in range(4)
                ]
            )
        except InterpError:
            effects.append([])
    np.testing.assert_allclose(effects[0], effects[1], **CLOSE)


@pytest.mark.parametrize("family", ["gpt2", "mistral", "small_qk_norm"])
def test_knocked_out_edges(family):
    pair = Pair(family, (4, 4, 3), "left")
    cells = [[{"site": "scores", "layer": layer, "pos": -1, "key_pos": k}] for layer in range(2) for k in range(4)]
    expected = pair.brute(cells, "clean", lambda name, layer, x, row: torch.full_like(x, -torch.inf))
    for name, (executor, budget) in itertools.product(("scores", "pattern"), itertools.product(EXECUTORS, (None, 1))):
        result = pair.ablate(
            ip.grid(name, layer=[0, 1], pos=-1, key_pos="all"),
            intervention=ip.knockout,
            executor=executor,
            budget=budget,
        )
        agrees(result, expected)
    if family == "gpt2":
        with pytest.raises(SiteError, match="scores or pattern"):
            pair.ablate(ip.grid("z"), intervention=ip.knockout)


def test_steering_and_strength():
    pair = Pair("llama", RAGGED, "left")
    vector = torch.randn(24, dtype=torch.float64)
    cells = places("resid_post", layer=range(3), pos=(0, 2, -1))
    expected = pair.brute(cells, "corrupt", lambda name, layer, x, row: x + 3 * vector)
    for result in pair.sweeps(
        ip.grid("resid_post", layer="all", pos=[0, 2, -1]), intervention=lambda s: ip.steer(s, vector, 3.0)
    ):
        agrees(result, expected)
    expected = pair.brute(
        cells, "corrupt", lambda name, layer, x, row: 0.75 * x + 0.25 * pair.caches["clean"][row][name, layer]
    )
    half = lambda s: ip.patch(s, ip.World(pair.clean)).strength(0.25)  # noqa: E731
    for result in pair.sweeps(ip.grid("resid_post", layer="all", pos=[0, 2, -1]), intervention=half):
        agrees(result, expected)


def test_an_intervention_of_the_users_own():
    pair = Pair("gpt2", RAGGED)

    def flip(x: Tensor, ctx) -> Tensor:
        return -x

    def centre(x: Tensor, ctx) -> Tensor:
        return x - x.mean(1, keepdim=True)

    expected = pair.brute(places("mlp_out", layer=range(2), pos=range(6)), value=lambda name, layer, x, row: -x)
    for result in pair.sweeps(ip.grid("mlp_out", layer="all", pos="all"), intervention=lambda s: ip.intervene(s, flip)):
        agrees(result, expected)

    pair = Pair("gpt2")
    expected = pair.brute(
        places("mlp_out", layer=range(2)), value=lambda name, layer, x, row: x - x.mean(1, keepdim=True)
    )
    mixing = lambda s: ip.intervene(s, centre, mixes=("pos",))  # noqa: E731
    for result in pair.sweeps(ip.grid("mlp_out", layer="all"), intervention=mixing):
        agrees(result, expected)
    result = pair.sweep(ip.grid("mlp_out", layer="all"), intervention=mixing)
    assert result.config["executor"] == "batched" and "pos" in result.config["executor_reason"]


def test_random_interventions_are_the_same_however_they_are_run():
    pair = Pair("llama", RAGGED, "left")
    add = lambda s: ip.noise(s, 0.5)  # noqa: E731
    for grid in (ip.grid("embed", pos="all"), ip.grid("z", layer="all", head="all"), ip.grid("mlp_out", layer="all")):
        first, *others = pair.sweeps(grid, intervention=add, seed=3)
        assert np.nanmin(np.abs(first.effect[..., 3])) > 0 or "embed" not in str(grid)
        for other in others:
            np.testing.assert_allclose(other.effect, first.effect, **CLOSE)
        again = pair.sweep(grid, intervention=add, seed=4)
        assert np.nanmax(np.abs(again.effect - first.effect)) > 1e-3
    # A row draws the same alone, by its id.
    first = pair.sweep(ip.grid("z", layer="all"), intervention=add)
    for row in range(4):
        alone = pair.model.inputs([pair.rows["corrupt"][row]], row_ids=torch.tensor([row]))
        result = ip.sweep(pair.model, alone, None, ip.grid("z", layer="all"), metric=METRIC, intervention=add)
        np.testing.assert_allclose(result.effect[:, 0], first.effect[:, row], **CLOSE)


# Metrics


@pytest.mark.parametrize("padding", ["right", "left"])
def test_several_metrics_at_once(padding):
    pair = Pair("qwen2", RAGGED, padding)
    own = ip.metric(lambda x: x[:, 0].norm(dim=-1), ip.site("resid_post", layer=1, pos=-1), name="size")
    metrics = [METRIC, ip.log_prob(ANSWER), ip.kl(), own, ip.rank(ANSWER), ip.accuracy(ANSWER)]
    grid = ip.grid("resid_pre", layer="all", pos=[0, 1, 2, -1])
    each = [pair.sweep(grid, metric=metric) for metric in metrics]
    for result in pair.sweeps(grid, padding == "left", metric=metrics):
        assert result.several and result.effect.shape == (6, 2, 4, 4)
        assert result.metrics == ("logit_diff", "log_prob", "kl", "size", "rank", "accuracy")
        assert result.base.shape == result.source.shape == (6, 4) and result.noise_floor.shape == (6,)
        for i, alone in enumerate(each):
            assert not alone.several
            np.testing.assert_allclose(result.effect[i], alone.effect, **CLOSE)
            np.testing.assert_allclose(result.base[i], alone.base, **CLOSE)
            np.testing.assert_allclose(result.source[i], alone.source, **CLOSE)
    one = pair.sweep(grid, metric=[METRIC])
    assert one.several and one.effect.shape == (1, 2, 4, 4)


def loss(logits: Tensor, row: list[int], other: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(row[1:]))


def divergence(logits: Tensor, row: list[int], other: Tensor) -> Tensor:
    theirs = other.log_softmax(-1)
    return (theirs.exp() * (theirs - logits.log_softmax(-1))).sum(-1).mean()


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize(
    ("metric", "by_hand"),
    [
        (ip.cross_entropy(), loss),
        (ip.kl(pos=None), divergence),
        (ip.logit(ANSWER, pos=slice(1, None)), lambda logits, row, other: logits[1:, ANSWER].mean()),
    ],
    ids=["cross_entropy", "kl", "logit"],
)
def test_metrics_of_many_positions_of_ragged_rows(metric, by_hand, padding):
    """What a metric reads of a row does not depend on the rows that are run beside it."""
    pair = Pair("gpt2", RAGGED, padding)
    other = [pair.forward(row)[0] for row in pair.rows["clean"]]

    def measure(logits: Tensor, r: int) -> float:
        return float(by_hand(logits, pair.rows["corrupt"][r], other[r]))

    expected = pair.brute(places("attn_out", layer=range(2), pos=(0, 1, -1)), measure=measure)
    for result in pair.sweeps(ip.grid("attn_out", layer="all", pos=[0, 1, -1]), padding == "left", metric=metric):
        agrees(result, expected)


def test_a_metric_before_the_end():
    """What is read in the middle: cells after it cannot matter, and say so or are exactly 0."""
    pair = Pair("gpt2")
    middle = ip.metric(lambda x: x[:, 0, 3], ip.site("mlp_out", layer=0, pos=2), name="middle")
    for result in pair.sweeps(ip.grid(["attn_out", "resid_post"], layer="all", pos="all"), metric=middle):
        assert (np.abs(result.effect[0, 0, 2]) > 1e-4).all()
        assert (result.effect != 0).sum() == 3
    shared = pair.sweep(ip.grid(["attn_out", "resid_post"], layer="all", pos="all"), metric=middle)
    assert shared.config["executor"] == "shared"
    assert (shared.status[:, 1] == STATUS.index("pruned")).all()


# Results


def test_what_a_result_says(tmp_path):
    pair = Pair("gpt2")
    result = pair.sweep(ip.grid("z", layer="all", head="all"), seed=3, path=tmp_path / "deep" / "z")
    assert result.config["executor"] == "shared" and result.config["executor_reason"] == ""
    assert result.config["model"] == repr(pair.model) and result.config["seed"] == 3
    assert result.config["grid"] == "Grid(z over layer, head)" and result.config["intervention"] == "patch"
    assert result.config["versions"]["torch"] == torch.__version__
    assert len(result.rows) == 3 and len(set(result.rows)) == 3
    json.dumps(result.config)
    loaded = ip.Result.load(tmp_path / "deep" / "z")
    np.testing.assert_array_equal(loaded.effect, result.effect)
    assert loaded.config == result.config and loaded.axes == result.axes and loaded.rows == result.rows
    for executor in ("sequential", "batched"):
        assert pair.sweep(ip.grid("z"), executor=executor).config["executor"] == executor
    handle = pair.module.transformer.h[0].register_forward_hook(lambda *_: None)
    try:
        other = pair.sweep(ip.grid("z", layer="all", head="all"))
    finally:
        handle.remove()
    assert other.config["executor"] == "batched" and "hooks of yours" in other.config["executor_reason"]
    np.testing.assert_allclose(other.effect, result.effect, **CLOSE)


def test_the_noise_floor_is_the_largest_change_without_an_edit():
    """Of any row; and never below what the numbers' own rounding is."""
    pair = Pair("gpt2")
    calls: list[int] = []

    def unsteady(x: Tensor) -> Tensor:
        calls.append(len(calls))
        # The first world is the base, the second the base computed again.
        return x[:, 0, ANSWER] + (torch.tensor([0.0, 0.5, -0.75]).double() if len(calls) == 2 else 0.0)

    metric = ip.metric(unsteady, ip.site("logits", pos=-1))
    result = pair.sweep(ip.grid("attn_out", layer="all"), metric=metric, executor="sequential")
    np.testing.assert_allclose(result.noise_floor, 0.75, **CLOSE)

    for dtype, eps in ((torch.float64, 2.0**-52), (torch.float32, 2.0**-23)):
        model = ip.wrap(zoo.make("gpt2", dtype=dtype))
        clean, corrupt = (model.inputs(pair.rows[name]) for name in ("clean", "corrupt"))
        grid = ip.grid("attn_out", layer="all")
        # Computed again by the same pass, the base is the same to the last bit.
        result = ip.sweep(model, clean, corrupt, grid, metric=METRIC, executor="sequential")
        assert result.noise_floor >= eps * np.abs(result.base).max() > 0


def test_a_sweep_while_a_plan_is_held():
    """The executor is the one that runs the worlds: the hooks of the plan that is held are not the user's own."""
    pair = Pair("gpt2")
    grid = ip.grid("z", layer="all", head="all")
    plan = ip.scale(ip.site("resid_post", 0), 0.5)
    for executor in ("auto", *EXECUTORS):
        with pair.model.apply(plan):
            result = pair.sweep(grid, executor=executor)
        assert result.config["executor"] == ("shared" if executor == "auto" else executor)
        assert result.config["executor_reason"] == ""
        expected = ip.evaluate(pair.model, ip.World(pair.corrupt, plan), METRIC).numpy()
        np.testing.assert_allclose(result.base, expected, **CLOSE)
    assert np.abs(result.base - pair.sweep(grid).base).max() > 1e-3


def test_a_sweep_says_which_executor_ran_under_what_is_held():
    pair, grid = Pair("gpt2"), ip.grid("z", layer=[1])
    assert pair.sweep(grid).config["executor"] == "shared"
    mixing = ip.intervene(ip.site("attn_out", layer=0), lambda x: x - x.mean(0, keepdim=True), mixes="row")
    with pair.model.apply(mixing):
        held = pair.sweep(grid).config
    assert held["executor"] != "shared" and "mixes row" in held["executor_reason"]


def test_what_no_cell_reaches_is_not_computed_again():
    pair = Pair("gpt2")

    def noise(**grid):
        cells = ip.grid("z", layer=[1], **grid).cells(pair.model, pair.corrupt)[1]
        return sweeps._cell_worlds(cells, ip.zero, pair.corrupt)[1].plan[0].site.pos

    assert noise(pos=[-1]) == noise(pos=-1) == -1
    assert noise(pos=[(2, 4), 3]) == 2
    assert noise(head="all") is None and noise(pos="all") is None and noise(pos=[2, -1]) is None
    assert noise(pos=slice(2, None)) is None and noise(pos=pair.corrupt.mask) is None


def test_the_model_is_left_as_it_was():
    pair = Pair("mistral")
    before = {name: p.clone() for name, p in pair.module.state_dict().items()}
    with torch.no_grad():
        logits = pair.module(torch.tensor(pair.rows["clean"])).logits

    def explode(x: Tensor) -> Tensor:
        raise RuntimeError("a bug of the user's")

    for executor in EXECUTORS:
        pair.sweep(ip.grid("pattern", layer="all"), executor=executor)
        with pytest.raises(RuntimeError, match="bug of the user"):
            pair.sweep(ip.grid("z"), metric=ip.metric(explode, ip.site("logits", pos=-1)), executor=executor)
        with pytest.raises(RuntimeError, match="bug of the user"):
            pair.sweep(
                ip.grid("pattern"), intervention=lambda s: ip.intervene(s, lambda x, ctx: explode(x)), executor=executor
            )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pair.module.modules())
    assert all(torch.equal(p, before[name]) for name, p in pair.module.state_dict().items())
    with torch.no_grad():
        assert torch.equal(pair.module(torch.tensor(pair.rows["clean"])).logits, logits)


def test_no_graph_is_kept_and_gradients_stay_as_they_were():
    pair = Pair("llama")
    pair.module.requires_grad_(True)
    assert torch.is_grad_enabled()
    pair.sweep(ip.grid("z", layer="all"))
    assert torch.is_grad_enabled() and all(p.grad is None for p in pair.module.parameters())


# Refusals


def test_nothing_changed():
    pair = Pair("gpt2")
    for executor in EXECUTORS:
        with pytest.raises(UnfiredError, match=r"10 cells.*equals"):
            ip.sweep(
                pair.model,
                pair.clean,
                pair.clean,
                ip.grid("resid_pre", layer="all", pos="all"),
                metric=METRIC,
                executor=executor,
            )
    same = pair.model.inputs(pair.rows["clean"])
    with pytest.raises(UnfiredError):
        ip.sweep(pair.model, pair.clean, same, ip.grid("z", layer="all"), metric=METRIC)
    early = ip.metric(lambda x: x[:, 0, 0], ip.site("resid_pre", layer=0, pos=0), name="early")
    with pytest.raises(UnfiredError, match="nothing that is read depends"):
        pair.sweep(ip.grid("z", layer=[1]), metric=early, executor="shared")


def test_a_model_in_training_mode_is_refused():
    pair = Pair("gpt2")
    pair.module.train()
    with pytest.raises(ModelError, match=r"training mode.*eval\(\)"):
        pair.sweep(ip.grid("z"))
    pair.module.eval()
    pair.module.transformer.h[1].train()  # one part of it is enough: dropout is there
    with pytest.raises(ModelError, match="training mode"):
        pair.sweep(ip.grid("z"))


def test_prompts_that_do_not_correspond(stories):
    pair = Pair("gpt2")
    for rows, match in [
        ((5, 4, 5), "pair 1 has 5 clean tokens and 4 corrupt"),
        ((5, 5), "3 clean prompts and 2 corrupt"),
    ]:
        with pytest.raises(InputsError, match=match):
            ip.sweep(pair.model, pair.clean, pair.model.inputs(prompts(rows, 1)), ip.grid("z"), metric=METRIC)
    model = ip.load(stories)
    one, other = model.inputs("Tim saw a dog"), model.inputs("Tim saw an elephant")
    with pytest.raises(InputsError) as caught:
        ip.sweep(model, one, other, ip.grid("z"), metric=ip.logit(7))
    text = str(caught.value)
    assert f"{int(one.lengths)} clean tokens and {int(other.lengths)} corrupt" in text
    start = next(i for i, (a, b) in enumerate(zip(one.tokens[0], other.tokens[0], strict=False)) if a != b)
    assert str(list(one.tokens[0][start:])) in text and str(list(other.tokens[0][start:])) in text
    assert f"position {start} on" in text


def test_what_a_sweep_refuses():
    pair = Pair("gpt2")
    grid = ip.grid("z", layer="all")
    for options, error, match in [
        ({"direction": "denoise"}, InputsError, "'denoising'"),
        ({"executor": "share"}, ModelError, "'shared'"),
        ({"metric": lambda x: x}, MetricError, "ip.metric"),
        ({"metric": [METRIC, "kl"]}, MetricError, "'kl' is not a metric"),
        ({"metric": []}, MetricError, "name a metric"),
        ({"metric": [METRIC, ip.logit_diff(1, 2)]}, MetricError, "different names"),
        ({"metric": None}, MetricError, None),
        ({"budget": 0}, InterpError, "budget"),
        ({"budget": -5}, InterpError, "budget"),
        ({"intervention": lambda s: None}, InterpError, None),
        ({"intervention": "zero"}, InterpError, None),
    ]:
        with pytest.raises(error, match=match):
            pair.sweep(grid, **options)
    with pytest.raises(InputsError, match=r"clean is list.*model\.inputs"):
        ip.sweep(pair.model, pair.rows["clean"], pair.corrupt, grid, metric=METRIC)
    with pytest.raises(InputsError, match="corrupt is World"):
        ip.sweep(pair.model, pair.clean, ip.World(pair.corrupt), grid, metric=METRIC)
    with pytest.raises(InputsError, match="intervention="):
        ip.sweep(pair.model, pair.clean, None, grid, metric=METRIC)
    with pytest.raises(InputsError):
        ip.sweep(pair.model, None, pair.corrupt, grid, metric=METRIC)
    with pytest.raises(ModelError, match=r"ip\.wrap"):
        ip.sweep(pair.module, pair.clean, pair.corrupt, grid, metric=METRIC)
    with pytest.raises(InterpError):
        ip.sweep(pair.model, pair.clean, pair.corrupt, "z", metric=METRIC)
    with pytest.raises(MetricError, match="patches from nothing"):
        ip.sweep(pair.model, pair.clean, None, grid, metric=ip.kl(), intervention=ip.zero)


def test_progress_is_shown_where_it_is_asked_for(capsys):
    pair = Pair("gpt2")
    pair.sweep(ip.grid("z", layer="all", head="all"), progress=True)
    shown = capsys.readouterr().err
    assert "8 cells x 3 rows (shared)" in shown and "/8" in shown and "/10" not in shown
    pair.sweep(ip.grid("z", layer="all", head="all"), progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("executor", ["sequential", "batched", "shared"])
def test_the_executor_that_is_asked_for_runs_references_and_sources_too(executor, monkeypatch):
    """So that the slowest is an oracle of everything that is in a result."""
    import interp.evaluation as evaluation
    import interp.sweeps as sweeps

    model, asked = zoo.wrapped("gpt2"), []
    name = "run_worlds"
    for module in (sweeps, evaluation):
        real = getattr(module, name)

        def noted(*args, real=real, **options):
            asked.append(options.get("executor", "auto"))
            return real(*args, **options)

        monkeypatch.setattr(module, name, noted)
    draw = torch.Generator().manual_seed(0)
    clean, corrupt = (model.inputs(torch.randint(1, 50, (2, 6), generator=draw)) for _ in range(2))
    grid = ip.grid("resid_pre", layer=[1], pos="all")
    result = ip.sweep(model, clean, corrupt, grid, metric=ip.kl(), executor=executor, progress=False)
    assert set(asked) == {executor} and len(asked) >= 3
    assert result.config["executor"] == executor and np.abs(result.effect).max() > 1e-3
