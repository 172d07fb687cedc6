"""What `interp` offers gives the same numbers on a model of another tool, or says what to wrap in its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import interp as ip
from tests import zoo
from tests.hooks import bridged

METRIC = ip.logit_diff([3, 4], [5, 6])
pytestmark = bridged.each_tool
backward = pytest.fixture(autouse=True, scope="module")(bridged.torch_backward)


def pair(model: ip.Model) -> tuple[ip.Inputs, ip.Inputs]:
    one, two = (model.inputs(*zoo.random_inputs(zoo.VOCAB, [6, 6], seed=seed)) for seed in (0, 3))
    return one, two


def paths(model: ip.Model) -> ip.paths.Pair:
    return ip.paths.Pair.of(model, *pair(model))


HEADS = ip.grid("z", layer="all", head="all")
PATTERNS = ip.grid("pattern", layer="all", head="all")
CALLS: dict[str, Callable[[ip.Model], Any]] = {
    "attribution": lambda m: ip.attribution(m, *pair(m), HEADS, metric=METRIC).effect,
    "attribution of patterns": lambda m: ip.attribution(m, *pair(m), PATTERNS, metric=METRIC).effect,
    "logit_lens": lambda m: ip.logit_lens(m, pair(m)[0]).logits,
    "direct_logit_attribution": lambda m: ip.direct_logit_attribution(m, pair(m)[0], answer=[3, 4]).effect.sum(0),
    "evaluate": lambda m: ip.evaluate(m, pair(m)[0], METRIC),
    "edge_sweep": lambda m: ip.paths.edge_sweep(paths(m), metric=METRIC).effect,
    "edge_scores": lambda m: ip.paths.edge_scores(paths(m), metric=METRIC).effect,
    "driving_heads": lambda m: ip.attention.driving_heads(m, *pair(m), metric=METRIC).effect,
    "attention_effect": lambda m: ip.attention.attention_effect(m, pair(m)[0], metric=METRIC).effect,
    "token_map": lambda m: ip.attention.token_map(m, pair(m)[0], metric=METRIC),
    "kv_effects": lambda m: ip.kv.kv_effects(m, [[3, 4, 5, 6]], [[7, 8]]).effect,
}


def number(found: Any) -> np.ndarray:
    return np.asarray(found.detach() if isinstance(found, torch.Tensor) else found, dtype=float)


@pytest.mark.parametrize("name", CALLS)
def test_the_same_numbers(tool: str, name: str) -> None:
    want, got = number(CALLS[name](bridged.native("llama"))), number(CALLS[name](bridged.TOOLS[tool]("llama")))
    assert want.shape == got.shape and np.abs(want).max() > 1e-3
    assert np.abs(want - got).max() <= 1e-4


def test_activations_on_disk(tool: str, tmp_path: Path) -> None:
    saved = []
    for number, model in enumerate((bridged.native("llama"), bridged.TOOLS[tool]("llama"))):
        at = tmp_path / f"{tool}{number}"
        saved.append(ip.save_activations(model, pair(model)[0], "resid_post", at, progress=False))
    one, two = (each["blocks.1.hook_resid_post"] for each in saved)
    assert float(torch.as_tensor(one[:]).abs().max()) > 0.1
    assert float((torch.as_tensor(one[:]) - torch.as_tensor(two[:])).abs().max()) <= 1e-5


def test_refused_by_name(tool: str) -> None:
    model = bridged.TOOLS[tool]("llama")
    x = pair(model)[0]
    with pytest.raises(ip.ModelError, match="no compiler"):
        model.compile()
    with pytest.raises(ip.InterpError, match="the model is run by"):
        ip.kv.kv_effects(model, [[3, 4, 5, 6]], [[7, 8]], how="gradient")
    if tool == "transformer_lens":
        with pytest.raises(ip.ModelError, match="wrap the model of transformers"):
            ip.kv.prefill(model, x.rows(slice(0, 1)), ip.kv.policies.snapkv(), 4)
    else:
        kept = [
            ip.kv.prefill(m, x.rows(slice(0, 1)), ip.kv.policies.snapkv(), 4).layers[0].keys
            for m in (bridged.native("llama"), model)
        ]
        torch.testing.assert_close(*kept)
