"""A sweep of edges at a path: returned where it is finished, and any other one refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import interp as ip
from hooks.errors import ResultError
from interp import streaming
from tests import zoo

EDGES = ["a0.h0->logits", "m0->m1", "input->m0"]
METRIC = ip.logit_diff(7, 9)


@pytest.fixture(scope="module")
def model() -> ip.Model:
    return ip.wrap(zoo.make("gpt2"))


def prompts(model: ip.Model, seed: int) -> ip.Inputs:
    return model.inputs(torch.randint(1, zoo.VOCAB, (3, 5), generator=torch.Generator().manual_seed(seed)))


def sweep(model: ip.Model, path: Any = None, **options: Any) -> ip.Result:
    pair = options.pop("pair", (0, 1))
    clean, corrupt = (None if seed is None else prompts(model, seed) for seed in pair)
    return ip.paths.edge_sweep(model, clean, corrupt, **{"metric": METRIC, "edges": EDGES, **options}, path=path)  # type: ignore[arg-type]


def mean(model: ip.Model, **more: Any) -> dict[str, Any]:
    return {"values": "mean", "reference": prompts(model, 2), **more}


BASES: dict[str, Callable[[ip.Model], dict[str, Any]]] = {"patch": lambda m: {}, "mean": mean}
CHANGES: dict[str, tuple[str, Callable[[ip.Model], dict[str, Any]]]] = {
    "norms": ("patch", lambda m: {"norms": "frozen"}),
    "values": ("patch", lambda m: {"values": "zero"}),
    "direction": ("patch", lambda m: {"direction": "noising"}),
    "metric": ("patch", lambda m: {"metric": ip.logit(7)}),
    "edges": ("patch", lambda m: {"edges": EDGES[:2]}),
    "order of edges": ("patch", lambda m: {"edges": EDGES[::-1]}),
    "clean": ("patch", lambda m: {"pair": (2, 1)}),
    "corrupt": ("patch", lambda m: {"pair": (0, 2)}),
    "seed": ("patch", lambda m: {"seed": 1}),
    "executor": ("patch", lambda m: {"executor": "sequential"}),
    "graph": ("patch", lambda m: {"graph": ip.paths.Graph.of(m, "blocks"), "edges": ["m0->m1"]}),
    "pooled": ("mean", lambda m: mean(m, pooled=True)),
    "reference": ("mean", lambda m: mean(m, reference=prompts(m, 3))),
    "resampled": ("mean", lambda m: mean(m, values="resample")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_with_any_option_changed_it_is_another_sweep(model, tmp_path, change):
    base, other = CHANGES[change]
    first = sweep(model, tmp_path / "edges", **BASES[base](model))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ResultError, match=r"edges.json is the result of another sweep.*Delete it"):
        sweep(model, tmp_path / "edges", **other(model))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming.Stream, "write", lambda *args: pytest.fail("computed again"))
        again = sweep(model, tmp_path / "edges", **BASES[base](model), budget=50_000)
    np.testing.assert_array_equal(again.effect, first.effect)
    assert again.config == first.config and np.abs(first.effect).max() > 1e-3


def test_spans_enter_by_their_positions(model, tmp_path):
    """Not by how a tensor prints, which leaves out its middle."""

    def graph(at: int) -> ip.paths.Graph:
        mask = torch.zeros(3, 5, dtype=torch.bool)
        mask[:, at] = True
        return ip.paths.Graph.of(model, positions={"here": mask})

    names = graph(2).edges
    options = {"edges": [next(name for name in names if name.startswith("m0"))]}
    sweep(model, tmp_path / "edges", graph=graph(2), **options)
    with pytest.raises(ResultError, match="differs in graph"):
        sweep(model, tmp_path / "edges", graph=graph(3), **options)
    sweep(model, tmp_path / "edges", graph=graph(2), **options)
