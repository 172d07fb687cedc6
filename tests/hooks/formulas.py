"""What tests of interventions share: sites of every form, the oracle's edits there, and values that are kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hooks import Inputs, Site
from tests import oracle, zoo

each_family = pytest.mark.parametrize("family", zoo.FAMILIES)
some_families = pytest.mark.parametrize("family", ["gpt2", "mistral", "small_rms_rotary_gqa", "small_attn_only"])


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def places(s) -> list[Site]:
    """Sites of every form, in several layers, that a model has."""
    last = s.model.n_layers - 1
    listed = [
        "embed",
        "resid_pre",
        "q_input",
        "k",
        "pattern",
        "z",
        "result",
        "attn_out",
        "mlp_post",
        "resid_post",
        "logits",
    ]
    offered = {info.name for info in s.model.sites()}
    layers = {"q_input": 0, "k": 0, "pattern": last, "z": last, "result": 0, "attn_out": last, "mlp_post": 0}
    layers |= {"resid_pre": 1, "resid_post": last, "embed": None, "logits": None}
    return [Site(name, layers[name]) for name in listed if name in offered]


def edit(s, place: Site, function: Callable[[Tensor], Tensor], only: Tensor | None = None) -> dict:
    """The oracle's edit that applies a function of the whole activation where a site means."""
    where = s.chosen(place, only)
    return {(place.name, place.layer): lambda x: torch.where(where, function(x), x)}


def kept(s, plan, place: Site, inputs: Inputs | None = None, **options) -> Tensor:
    """The whole value of a site under a plan."""
    return s.model.run(s.corrupt if inputs is None else inputs, plan, capture=place.whole, **options).tape[place.whole]


def span(directions: Tensor) -> Tensor:
    """The projector on the span of the rows of `directions`, without an orthonormal basis."""
    directions = directions.reshape(-1, directions.shape[-1])
    return torch.linalg.pinv(directions) @ directions


def reference(s, lengths: list[int], side: str) -> tuple[Inputs, dict, Tensor]:
    """Another batch, of any number of rows: its inputs, the oracle's values, and its mask."""
    ids, mask = zoo.random_inputs(zoo.VOCAB, lengths, side, seed=7)
    with torch.no_grad():
        return s.model.inputs(ids, mask), oracle.forward(s.module, ids, mask)[1], mask


def spread_mean(s, place: Site, values: dict, mask: Tensor, pooled: bool) -> Tensor:
    """The mean of a reference set at each position (and key position), laid over the columns of the corrupt batch."""
    whole = values[place.name, place.layer]
    square = place.name == "pattern"
    if square:
        whole = whole.transpose(1, 2)
    out = torch.zeros_like(s.corrupt_values[place.name, place.layer]).transpose(1, 2 if square else 1)
    real = [row.nonzero().flatten() for row in mask]
    here = [row.nonzero().flatten() for row in s.mask]
    assert not square or not pooled
    if pooled:
        return torch.cat([whole[r, columns] for r, columns in enumerate(real)]).mean(0).expand_as(out).clone()
    for b, columns in enumerate(here):
        for p, column in enumerate(columns):
            rows = [r for r in range(len(real)) if len(real[r]) > p]
            if not square:
                out[b, column] = torch.stack([whole[r, real[r][p]] for r in rows]).mean(0)
                continue
            for k, key in enumerate(columns[: p + 1]):
                out[b, column, :, key] = torch.stack([whole[r, real[r][p], :, real[r][k]] for r in rows]).mean(0)
    return out.transpose(1, 2) if square else out
