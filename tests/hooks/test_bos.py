"""BOS: how many of them a text begins with, and means and grids without it."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import interp as ip
from tests import zoo


class Tokenizer:
    """Letters as tokens from 2 on, with BOS (1, written <s>) in front."""

    bos_token, bos_token_id = "<s>", 1
    adds = True

    def __call__(self, text, add_special_tokens=True):
        ids = [1] * text.startswith("<s>") + [2 + ord(c) - ord("a") for c in text.removeprefix("<s>")]
        return {"input_ids": [1] * (add_special_tokens and self.adds) + ids}

    def convert_ids_to_tokens(self, ids):
        return ["<s>" if i == 1 else chr(ord("a") + i - 2) for i in ids]

    def decode(self, ids, **_):
        return "".join(self.convert_ids_to_tokens(ids))


@pytest.fixture(scope="module")
def model():
    return ip.wrap(zoo.make("llama", dtype=torch.float64), Tokenizer())


def test_a_doubled_bos_is_said(model):
    with pytest.warns(UserWarning, match=r"puts another one in front.*bos=True"):
        twice = model.inputs("<s>abc")
    assert twice.ids.tolist() == [[1, 1, 2, 3, 4]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for text, bos, ids in (
            ("<s>abc", True, [1, 2, 3, 4]),
            ("<s>abc", False, [1, 2, 3, 4]),
            ("abc", True, [1, 2, 3, 4]),
            ("abc", False, [2, 3, 4]),
            ("abc", None, [1, 2, 3, 4]),
        ):
            assert model.inputs([text], bos=bos).ids.tolist() == [ids]


def test_a_tokenizer_without_one():
    quiet = Tokenizer()
    quiet.adds = False
    model = ip.wrap(zoo.make("llama"), quiet)
    assert model.inputs("abc").ids.tolist() == [[2, 3, 4]] and model.inputs("abc", bos=True).ids[0, 0] == 1
    quiet.bos_token_id = None
    with pytest.raises(ip.InputsError, match="no BOS"):
        model.inputs("abc", bos=True)


def test_positions_but_bos(model):
    inputs = model.inputs(["abc", "abcde"], padding="left")
    assert inputs.but_bos.tolist() == [[False] * 3 + [True] * 3, [False] + [True] * 5]
    assert torch.equal(inputs.rows(slice(1, 2)).but_bos, inputs.but_bos[1:])
    assert torch.equal(model.inputs(["ab"], bos=False).but_bos, torch.ones(1, 2, dtype=torch.bool))
    clean, corrupt = model.inputs(["abc", "abd"]), model.inputs(["bac", "cbd"])
    sweep = lambda pos: ip.sweep(  # noqa: E731
        model, clean, corrupt, ip.grid("resid_pre", layer="all", pos=pos), metric=ip.logit_diff(3, 4), progress=False
    )
    named, listed = sweep("but_bos"), sweep([1, 2, 3])
    assert named.axes[1].values == (1, 2, 3) and np.abs(named.effect).max() > 1e-3
    np.testing.assert_array_equal(named.effect, listed.effect)
    with pytest.raises(ip.SiteError, match="no row begins with BOS"):
        ip.grid("resid_pre", pos="but_bos").cells(model, model.inputs(["abc"], bos=False))
    with pytest.raises(ip.SiteError, match="expected 'all'"):
        ip.grid("resid_pre", layer="but_bos")


def test_a_pooled_mean_without_bos(model):
    reference, inputs = model.inputs(["ab", "bcde"]), model.inputs(["aceg"])
    site = ip.site("resid_post", layer=1, pos=3)
    kept = model.run(reference, capture=["blocks.1.hook_resid_post"]).tape["blocks.1.hook_resid_post"]
    mean = torch.cat([kept[0, 1:3], kept[1, 1:5]]).mean(0)
    whole = ip.site("resid_post", layer=1)
    for where in (whole, ip.site("resid_post", layer=1, pos=slice(1, 3))):
        plan = ip.mean(where, ip.World(reference), pooled=True, but_bos=True)
        found = model.run(inputs, plan, capture=[whole]).tape[whole]
        assert torch.allclose(found[0, 1], mean, atol=1e-12)
    with pytest.raises(ip.SiteError, match="lists its own"):
        model.run(inputs, ip.mean(site, ip.World(reference), pooled=True, but_bos=True))
    with_bos = torch.cat([kept[0, :3], kept[1, :5]]).mean(0)
    plan = ip.mean(whole, ip.World(reference), pooled=True)
    assert torch.allclose(model.run(inputs, plan, capture=[whole]).tape[whole][0, 2], with_bos, atol=1e-12)
    assert not torch.allclose(with_bos, mean)
    with pytest.raises(ip.PlanError, match="pooled=True"):
        ip.mean(whole, ip.World(reference), but_bos=True)
    with pytest.raises(ip.SiteError, match="nobody knows of a BOS"):
        model.run(inputs, ip.mean(whole, kept, pooled=True, but_bos=True))
