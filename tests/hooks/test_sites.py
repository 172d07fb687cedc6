"""Sites: both spellings, equality, what a restriction may be, and what the errors say."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import hooks
from hooks import KINDS, Site, Span, site
from hooks.errors import SiteError, nearest
from hooks.plan.sites import execution_order
from tests import zoo

# What TransformerLens calls each activation, written down here once more, by hand.
TRANSFORMER_LENS = {
    "embed": "hook_embed",
    "pos_embed": "hook_pos_embed",
    "resid_pre": "blocks.3.hook_resid_pre",
    "attn_in": "blocks.3.hook_attn_in",
    "q_input": "blocks.3.hook_q_input",
    "k_input": "blocks.3.hook_k_input",
    "v_input": "blocks.3.hook_v_input",
    "ln1_scale": "blocks.3.ln1.hook_scale",
    "ln1": "blocks.3.ln1.hook_out",
    "q": "blocks.3.attn.hook_q",
    "k": "blocks.3.attn.hook_k",
    "v": "blocks.3.attn.hook_v",
    "rot_q": "blocks.3.attn.hook_rot_q",
    "rot_k": "blocks.3.attn.hook_rot_k",
    "scores": "blocks.3.attn.hook_attn_scores",
    "pattern": "blocks.3.attn.hook_pattern",
    "z": "blocks.3.attn.hook_z",
    "result": "blocks.3.attn.hook_result",
    "attn_out": "blocks.3.hook_attn_out",
    "resid_mid": "blocks.3.hook_resid_mid",
    "mlp_in": "blocks.3.hook_mlp_in",
    "ln2_scale": "blocks.3.ln2.hook_scale",
    "ln2": "blocks.3.ln2.hook_out",
    "mlp_pre": "blocks.3.mlp.hook_pre",
    "mlp_pre_linear": "blocks.3.mlp.hook_pre_linear",
    "mlp_post": "blocks.3.mlp.hook_post",
    "router": "blocks.3.mlp.hook_router",
    "expert_out": "blocks.3.mlp.hook_expert_out",
    "mlp_out": "blocks.3.hook_mlp_out",
    "resid_post": "blocks.3.hook_resid_post",
    "ln_final_scale": "ln_final.hook_scale",
    "ln_final": "ln_final.hook_out",
    "pooled": "pooler.hook_out",
    "logits": "unembed.hook_out",
}
OUTSIDE = {"embed", "pos_embed", "ln_final_scale", "ln_final", "pooled", "logits"}
AXES = {
    "head": "q_input k_input v_input q k v rot_q rot_k scores pattern z result expert_out",
    "key_pos": "scores pattern",
}


def plain(name: str, **restrictions) -> Site:
    return site(name, layer=None if name in OUTSIDE else 3, **restrictions)


def message(call, *args, **kwargs) -> str:
    with pytest.raises(SiteError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


# Names


def test_every_kind_is_listed():
    assert list(KINDS) == list(TRANSFORMER_LENS)


@pytest.mark.parametrize("name", TRANSFORMER_LENS)
def test_both_spellings_are_one_site(name):
    full = TRANSFORMER_LENS[name]
    ours, theirs = plain(name), site(full)
    assert ours == theirs and hash(ours) == hash(theirs) and str(ours) == str(theirs)
    assert (theirs.name, theirs.layer) == (name, None if name in OUTSIDE else 3)
    assert ours.hook == full and site(ours.hook) == ours
    assert site(full, pos=-1) == plain(name, pos=-1) != ours
    assert not ours.restricted and site(full, pos=-1).restricted and site(full, pos=-1).whole == ours


def test_all_sites_differ_but_for_one_pair():
    sites = [Site(name, layer) for name in KINDS for layer in ((None,) if name in OUTSIDE else (0, 1, 2))]
    equal = {(str(a), str(b)) for i, a in enumerate(sites) for b in sites[:i] if a == b}
    assert equal == {("resid_post.0", "resid_pre.1"), ("resid_post.1", "resid_pre.2")}
    assert all(hash(site("resid_post", i)) == hash(site("resid_pre", i + 1)) for i in range(3))
    assert site("resid_pre", 0) != site("resid_post", 0)
    assert site("z", 0) != Site("z", 0, stack="encoder")
    assert site("z", 0) != "z.0"


def test_a_site_passes_through_and_is_restricted():
    place = site("z", 2, head=1)
    assert site(place) is place
    assert site(place, pos=-1) == site("z", 2, head=1, pos=-1) == place.at(pos=-1)
    assert place.at(head=3) == site("z", 2, head=3)
    assert place.at(head=None) == place.whole
    assert "already is a site" in message(site, place, 3)
    assert site("blocks.2.attn.hook_z", 2, head=1) == place


@pytest.mark.parametrize(
    ("name", "layer", "words"),
    [
        ("resid_pos", 3, ["'resid_pos'", "'resid_post'"]),
        ("attn_scores", 3, ["'attn_scores'", "scores"]),
        ("patern", 0, ["did you mean 'pattern'"]),
        ("z", None, ["which", "layer=0"]),
        ("logits", 2, ["takes no layer"]),
        ("blocks.3.attn.hook_zz", None, ["did you mean 'blocks.3.attn.hook_z'"]),
        ("blocks.3.hook_z", None, ["did you mean 'blocks.3.attn.hook_z'"]),
        ("blocks.11.hook_resid_pos", None, ["did you mean 'blocks.11.hook_resid_p"]),
        ("blocks.3.mlp.hook_mid", None, ["blocks.3.mlp.hook_"]),
        ("hook_embedd", None, ["did you mean 'hook_embed'"]),
        ("ln_final.hook_normalized", None, ["ln_final.hook_normalized"]),
        ("blocks.3.attn.hook_z", 4, ["layer 3", "layer=4"]),
        ("blocks.-1.attn.hook_z", None, ["blocks.-1"]),
        ("blocks.x.attn.hook_z", None, ["blocks.x"]),
        ("", None, ["''"]),
    ],
)
def test_an_unknown_name_teaches(name, layer, words):
    text = message(site, name, layer)
    for word in words:
        assert word in text


def test_a_hint_is_never_the_name_that_was_refused():
    """`blocks.0.hook_embed` is no name, so it is not the nearest valid one either."""
    for name in ("blocks.0.hook_embed", "blocks.0.ln_final.hook_out", "blocks.0.unembed.hook_out"):
        assert f"did you mean {name!r}" not in message(site, name)


def test_a_hook_name_without_its_block_says_so():
    """`hook_resid_pre` is how TransformerLens names it inside a block: with its layer it is the site."""
    text = message(site, "attn.hook_z")
    assert "which" in text and "layer" in text
    assert site("hook_resid_pre", layer=3) == site("resid_pre", 3)
    assert site("attn.hook_z", layer=0) == site("z", 0)


@pytest.mark.parametrize("name", [3, None, ("z", 3)])
def test_a_name_is_a_string(name):
    assert "name or a Site" in message(site, name)


# Restrictions


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", TRANSFORMER_LENS)
def test_a_site_without_the_axis_refuses_it(name, axis):
    if name in AXES[axis].split():
        assert getattr(plain(name, **{axis: 1}), axis) == 1
    else:
        text = message(plain, name, **{axis: 1})
        assert axis in text and name in text
        assert axis in message(plain(name).at, **{axis: 1})


def test_patterns_have_no_dimensions():
    for name in ("scores", "pattern"):
        assert "dim" in message(plain, name, dim=0)


def test_restrictions_in_every_form():
    assert site("z", 0, pos="last") == site("z", 0, pos=-1)
    assert site("z", 0, pos="all") == site("z", 0)
    assert site("z", 0, pos=slice(2, None)).pos == Span(2, None)
    assert site("z", 0, pos=slice(2, 5, 1)) == site("z", 0, pos=Span(2, 5))
    assert site("z", 0, pos=range(3)) == site("z", 0, pos=[0, 1, 2]) == site("z", 0, pos=(0, 1, 2))
    assert site("z", 0, pos=range(3)) != site("z", 0, pos=(0, 2, 1))
    assert site("z", 0, pos=(1,)) != site("z", 0, pos=1)  # the second may leave the axis out of its values
    assert site("z", 0, head=torch.tensor(2)) == site("z", 0, head=2) == site("z", 0, head=np.int64(2))
    assert (
        site("z", 0, head=torch.tensor([0, 2]))
        == site("z", 0, head=(0, 2))
        == site("z", 0, head=list(np.array([0, 2])))
    )
    assert site("z", 0, pos=slice(np.int64(1), None)) == site("z", 0, pos=slice(1, None))
    assert site("z", 0, head=torch.tensor([True, False, True])) == site("z", 0, head=(0, 2))
    assert site("z", 0, dim=np.array([4, 1])) == site("z", 0, dim=(4, 1))
    assert site("z", 0, pos=torch.tensor([1, 2])) != site("z", 0, pos=(1, 2))  # one a row, not two in every row
    assert site("z", 0, pos=torch.tensor([1, 2])) == site("z", 0, pos=np.array([1, 2]))
    assert site("z", 0, pos=torch.tensor([1, 2])) != site("z", 0, pos=torch.tensor([1, 3]))
    assert site("z", 0, pos=torch.tensor([[1], [2]])) != site("z", 0, pos=torch.tensor([1, 2]))
    assert hash(site("z", 0, pos=torch.tensor([1, 2]))) == hash(site("z", 0, pos=torch.tensor([1, 2])))


@pytest.mark.parametrize(
    "restriction",
    [
        {"pos": "first"},
        {"head": "last"},
        {"pos": True},
        {"pos": 1.5},
        {"pos": ()},
        {"pos": (0, 0)},
        {"head": [1, 1]},
        {"head": (True, False)},
        {"pos": slice(0, 4, 2)},
        {"pos": torch.tensor([0.5])},
        {"pos": torch.zeros(3, dtype=torch.bool)},
        {"pos": torch.zeros(2, 2, 2, dtype=torch.long)},
        {"head": torch.zeros(2, 2, dtype=torch.long)},
        {"dim": torch.zeros(2, 2, dtype=torch.bool)},
        {"head": torch.zeros(4, dtype=torch.bool)},
        {"pos": 3.5j},
        {"pos": range(0)},
        {"pos": slice(0.5, None)},
        {"pos": slice(None, True)},
        {"pos": torch.tensor(True)},
        {"head": np.bool_(True)},
    ],
    ids=str,
)
def test_what_is_no_restriction_is_refused(restriction):
    assert next(iter(restriction)) in message(site, "z", 0, **restriction)


def test_an_unknown_restriction_names_the_nearest():
    """Among the restrictions: the name of a site is no help here."""
    assert "did you mean 'key_pos'" in message(site, "scores", 0, keypos=3)
    assert "did you mean 'head'" in message(site, "z", 0, heads=3)
    assert "did you mean 'key_pos'" in message(site("scores", 0).at, keypos=3)
    assert "did you mean 'head'" in message(site("z", 0).at, heads=3)


def test_sites_print_what_they_mean():
    assert str(site("z", 8)) == "z.8"
    assert str(site("logits")) == "logits"
    assert (
        str(site("scores", 1, head=(0, 2), pos=-1, key_pos=slice(2, None)))
        == "scores.1[head=(0, 2), pos=-1, key_pos=2:]"
    )
    assert str(site("z", 1, pos=torch.ones(2, 3, dtype=torch.bool))) == "z.1[pos=mask[2, 3]]"
    assert str(site("z", 1, pos=torch.zeros(2, dtype=torch.long))) == "z.1[pos=ints[2]]"
    assert str(Site("z", 1, stack="encoder")) == "encoder:z.1"


def test_sites_are_immutable():
    with pytest.raises(AttributeError):
        site("z", 0).layer = 1


def test_execution_order_is_the_order_of_a_pass():
    keys = [site("embed").key, site("pos_embed").key]
    per_layer = [name for name in KINDS if name not in OUTSIDE]
    # resid_pre of a later layer is the resid_post before it: one key, which comes once.
    keys += [site(name, layer).key for layer in (0, 1) for name in per_layer if layer == 0 or name != "resid_pre"]
    keys += [site("ln_final").key, site("logits").key]
    found = sorted(reversed(keys), key=lambda key: execution_order(key, 2))
    # In which order a block computes q, k and v is its own business.
    free = {"q_input", "k_input", "v_input", "q", "k", "v"}
    assert [key if key[0] not in free else key[1] for key in found] == [k if k[0] not in free else k[1] for k in keys]
    assert all(found.index((f"{n}_input", 1, None)) < found.index((n, 1, None)) for n in "qkv")


def test_nearest():
    assert nearest("patern", KINDS) == ", did you mean 'pattern'?"
    assert nearest("qqqqqqqq", KINDS) == ""


# What models offer


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_a_model_offers_what_it_has(family):
    module = zoo.make(family)
    model = hooks.wrap(module)
    absent = {"router", "expert_out", "pooled"}  # of mixtures of experts and of towers
    if family not in ("gpt2", "small_ln_learned", "small_qk_norm"):
        absent.add("pos_embed")
    else:
        absent |= {"rot_q", "rot_k"}
    if family == "small_attn_only":
        absent |= {"resid_mid", "mlp_in", "ln2_scale", "ln2", "mlp_pre", "mlp_post", "mlp_out"}
    if family in ("gpt2", "neox", "neox_sequential", "small_ln_learned", "small_attn_only", "small_qk_norm"):
        absent.add("mlp_pre_linear")  # not gated
    if family == "neox":
        absent.add("resid_mid")  # the MLP reads what attention reads
    table = model.sites()
    assert [info.name for info in table] == [name for name in KINDS if name not in absent]
    ids, mask = zoo.random_inputs(zoo.VOCAB, [5, 3], "left")
    inputs = model.inputs(ids, mask)
    for info in table:
        assert info.layers == (0 if info.name in OUTSIDE else model.n_layers)
        for layer in range(info.layers) if info.layers else (None,):
            place = Site(info.name, layer)
            shape = [{"B": 2, "T": 5, "S": 5}.get(size, size) for size in info.shape]
            assert list(model.run(inputs, capture=place).tape[place].shape) == shape
            assert site(info.hook.format(layer)) == place
        assert re.search(rf"^{info.name} ", str(table), re.MULTILINE)
    for name in absent:
        text = message(model.run, inputs, hooks.zero(Site(name, None if name in OUTSIDE else 0)))
        assert name in text and "resid_post" in text


def test_a_model_refuses_layers_heads_and_dimensions_that_it_lacks():
    model = hooks.wrap(zoo.make("llama"))  # 3 layers, 4 query heads, 2 key/value heads of 8
    inputs = model.inputs([[1, 2, 3]])
    for layer in (3, -1):
        assert "0 .. 2" in message(model.run, inputs, capture=Site("z", layer))
        assert "0 .. 2" in message(model.run, inputs, hooks.zero(Site("resid_mid", layer)))
    assert "0 .. 3" in message(model.run, inputs, hooks.zero(site("z", 0, head=4)))
    assert "0 .. 3" in message(model.run, inputs, hooks.zero(site("z", 0, head=(0, -5))))
    text = message(model.run, inputs, hooks.zero(site("k", 0, head=3)))
    assert "key/value" in text and "query head 3 reads key/value head 1" in text
    assert "8 entries" in message(model.run, inputs, hooks.zero(site("z", 0, dim=8)))
    assert "row 0" in message(model.run, inputs, hooks.zero(site("z", 0, pos=3)))
    assert "row 0" in message(model.run, inputs, capture=site("z", 0, pos=-4))
    assert not [m for m in model.module.modules() if m._forward_hooks or m._forward_pre_hooks]
