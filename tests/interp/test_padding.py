"""Effects of a pair of prompts do not depend on where it stands: padded on the left, on the right, or alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

import interp as ip
from interp import paths
from tests import zoo
from tests.turns import pairs

LENGTHS = (6, 4, 7)
FAMILIES = ["gpt2", "mistral"]
IDS = torch.tensor([5, 2, 8])
METRIC = ip.logit_diff(7, 9)
EXECUTORS = ("sequential", "batched", "shared")

each_family = pytest.mark.parametrize("family", FAMILIES)


def prompts(seed: int, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, zoo.VOCAB, (n,), generator=generator).tolist() for n in lengths]


Measured = Callable[[ip.Inputs, ip.Inputs], ip.Result]
"""From clean and corrupt prompts to effects."""


def stand_alike(model: ip.Model, measured: Measured, atol: float = 1e-9) -> None:
    """Compare every row's effects, base and source in both paddings with those of its pair alone."""
    rows = list(zip(prompts(1), prompts(2), strict=True))
    together = {
        side: measured(*(model.inputs(prompts(seed), padding=side, row_ids=IDS) for seed in (1, 2)))
        for side in ("right", "left")
    }
    for row, pair in enumerate(rows):
        alone = measured(*(model.inputs([tokens], row_ids=IDS[row : row + 1]) for tokens in pair))
        assert np.abs(alone.effect).max() > 1e-4 and (np.abs(alone.effect) > 1e-9).mean() > 0.3
        for side, result in together.items():
            for name in ("effect", "base", "source"):
                found, expected = getattr(result, name), getattr(alone, name)
                if expected is not None:
                    said = f"{name} of row {row}, padded on the {side}"
                    np.testing.assert_allclose(found[..., row], expected[..., 0], rtol=0, atol=atol, err_msg=said)


GRIDS = {
    "layers and positions": ip.grid("resid_pre", layer="all", pos=[0, 2, -1, -3, (1, -2)]),
    "heads": ip.grid("z", layer="all", head="all"),
    "key/value heads": ip.grid("v", layer=[1], head="all", pos=slice(1, None)),
    "edges of attention": ip.grid("pattern", layer=[1], pos=[-1, 3], key_pos=[0, -2]),
    "sites": ip.grid(["attn_out", "mlp_out"], layer="all", pos=slice(-2, None)),
}


@pytest.mark.parametrize(("name", "family", "executor"), pairs(GRIDS, FAMILIES, ["sequential", "shared"]))
def test_effects_of_a_sweep(name, family, executor):
    model = zoo.wrapped(family)
    stand_alike(model, partial(ip.sweep, model, grid=GRIDS[name], metric=METRIC, executor=executor))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_effects_of_random_interventions(executor):
    model = zoo.wrapped("small_rms_rotary_gqa")
    sides = ("right", "left") if executor == "batched" else ("left", "right")
    first, second = (model.inputs(prompts(3, (7, 9, 8)), padding=side) for side in sides)
    for intervention in (
        lambda site: ip.noise(site, 0.5),
        partial(ip.resample, source=first, seed=2),
        partial(ip.mean, source=second),
    ):
        grid = ip.grid("z", layer="all", pos=[0, -1, slice(1, 3)])
        options = {"metric": METRIC, "intervention": intervention, "executor": executor, "seed": 4}
        options |= {"direction": "denoising"}
        stand_alike(model, partial(ip.sweep, model, grid=grid, **options))


@pytest.mark.parametrize("metric", ["kl", "cross_entropy", "log_prob", "rank"])
def test_effects_on_other_metrics(metric):
    model = zoo.wrapped("mistral")
    made = {
        "kl": ip.kl(pos=slice(1, None)),
        "cross_entropy": ip.cross_entropy(),
        "log_prob": ip.log_prob(7, pos=-2),
        "rank": ip.rank(7, pos=slice(-3, None)),
    }[metric]
    stand_alike(model, partial(ip.sweep, model, grid=ip.grid("resid_pre", layer="all", pos=[0, 1]), metric=made))


@each_family
def test_first_order_estimates(family):
    model = zoo.wrapped(family)
    for name in ("layers and positions", "key/value heads"):
        stand_alike(model, partial(ip.attribution, model, grid=GRIDS[name], metric=METRIC))


@pytest.mark.parametrize(("family", "direction"), [("gpt2", "denoising"), ("mistral", "noising")])
def test_effects_of_edges(family, direction):
    model = zoo.wrapped(family)
    options = {"metric": METRIC, "direction": direction, "progress": False}
    readers = ["a0.h1<v>", "a1.h0<q>", "a1.h0<k>", "m1", "logits"]
    for norms in ("recompute", "frozen"):
        stand_alike(model, partial(paths.edge_sweep, model, norms=norms, readers=readers, **options))


@pytest.mark.parametrize("method", ["eap", "eap-ig", "receiver-exact"])
def test_scores_of_edges(method):
    model = zoo.wrapped("small_rms_rotary_gqa")
    stand_alike(model, partial(paths.edge_scores, model, metric=METRIC, method=method), atol=1e-8)
