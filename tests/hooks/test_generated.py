"""`model.generate` is the model's own `generate` under a plan, and keeps what a run of the whole text keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hooks as hk
from hooks import Inputs, Model, Plan, new, site
from tests import seeing, zoo
from tests.hooks import bridged
from tests.hooks.decoding import OPTIONS, assert_equal, generated, prompts, spelled
from tests.zoo import fresh, wrapped

pytestmark = pytest.mark.filterwarnings("ignore")
GREEDY: dict[str, Any] = dict(OPTIONS, max_new_tokens=5)


def words() -> Any:
    """A tokenizer of words that are separated by spaces."""
    from tokenizers import pre_tokenizers

    tokenizer = bridged.tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def edits(model: Model) -> Plan:
    """Of prompt tokens, of new ones, and of what the cache keeps."""
    vector = 2.0 * torch.arange(model.architecture.width).double().cos()
    plan = hk.steer(site("resid_post", 0, pos="new"), vector) + hk.scale(site("v", 1, pos=-1), -1.5)
    return plan + hk.knockout(site("scores", 1, head=1, key_pos=0)).at(pos="new") + hk.freeze(site("mlp_out", 1))


def kept_sites(model: Model) -> list[hk.Site]:
    names = ("resid_post", "z", "k", "rot_k", "pattern", "scores", "mlp_post", "resid_mid")
    return [place for place in (site(name, 1) for name in names) if place.key in model.sizes] + [site("embed")]


def whole(model: Model, out: hk.Generated, plan: Plan, sites: list[hk.Site], seed: int = 0) -> hk.Run:
    """The texts that came out, run whole under the plan."""
    ids, mask = out.sequences[:, :-1], out.mask[:, :-1]
    text = Inputs.of(ids, mask, out.rows)
    return model.run(text, spelled(plan, out.prompts.mask, out.rows, ids.shape[1]), capture=sites, seed=seed)


def agree(one: Tensor, two: Tensor, real: Tensor, place: hk.Site, atol: float = 1e-9) -> None:
    """Equal at real tokens; of scores and patterns, at keys that are real, too."""
    if place.name in ("scores", "pattern"):
        keys = (real[:, None, :] & real[:, :, None])[:, None]
        two = torch.where(keys, two, -torch.inf if place.name == "scores" else 0.0)
        one = torch.where(keys, one, -torch.inf if place.name == "scores" else 0.0)
    else:
        one, two = one[real], two[real]
    same = (one == two) | ((one - two).abs() <= atol)
    assert bool(same.all()), (place, float((one - two).abs().nan_to_num(9e9).max()))
    assert float(one[one.isfinite()].abs().max()) > 1e-3, place


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "static": {"cache_implementation": "static"},
    "in chunks": {"prefill_chunk_size": 2},
    "without a cache": {"use_cache": False},
    "beams without a cache": {"num_beams": 2, "use_cache": False},
}


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "mode"),
    [
        pytest.param(family, mode, marks=() if family == "gemma2" or mode == "static" else pytest.mark.full)
        for family in ("gpt2", "gemma2", "mistral")
        for mode in MODES
    ],
)
def test_what_is_kept_is_what_a_run_of_the_text_keeps(family: str, mode: str) -> None:
    model = wrapped(family)
    x, plan, sites = prompts(model), edits(model), kept_sites(model)
    torch.manual_seed(3)
    out = model.generate(x, plan, capture=sites, logits=True, seed=4, **dict(GREEDY, **MODES[mode]))
    torch.manual_seed(3)
    want, audit = generated(model, x, plan, seed=4, **dict(MODES[mode], max_new_tokens=5))
    assert torch.equal(out.sequences, want.tokens)
    assert [e.positions for e in out.audit] == [e.positions for e in audit]
    expand = len(out) // 2
    assert out.rows.tolist() == [row for row in range(2) for _ in range(expand)]
    run = whole(model, out, plan, sites, seed=4)
    real = out.mask[:, :-1]
    for place in sites:
        agree(out[place], run.tape[place], real, place)
        assert (
            not bool(out[place].nan_to_num(neginf=0.0)[~real].any())
            if place.name not in ("scores", "pattern")
            else True
        )
    # The logits of every step are those of the token before.
    steps = run.logits[:, x.width - 1 :]
    assert out.logits is not None
    assert_equal([out.logits], [steps.float()], 1e-4 if steps.dtype == torch.float32 else 1e-6)


@torch.no_grad()
def test_positions_of_what_is_kept_are_those_of_plans() -> None:
    model = wrapped("llama")
    x = prompts(model)
    out = model.generate(x, capture=["resid_post", site("z", 1, head=2)], **GREEDY)
    every = out["blocks.1.hook_resid_post"]
    assert every.shape == (2, x.width + 4, model.architecture.width)
    assert torch.equal(out[site("resid_post", 1, pos=-1)], every[:, x.width - 1 : x.width])
    assert torch.equal(out[site("resid_post", 1, pos="new")], every[:, x.width :])
    assert torch.equal(out[site("resid_post", 1, pos=new(1, 3))], every[:, x.width + 1 : x.width + 3])
    assert torch.equal(out[site("resid_post", 1, pos=0)][1], every[1, 2:3])  # behind the padding
    heads = model.generate(x, capture="z", **GREEDY)[site("z", 1)]
    real = out.mask[:, :-1]
    part = out[site("z", 1, head=2)]  # as a tape has it, a row's tokens one after another
    assert torch.equal(part[0], heads[0, :, 2:3]) and torch.equal(part[1, : real[1].sum()], heads[1, real[1], 2:3])
    with pytest.raises(hk.SiteError, match="was not kept"):
        out["blocks.1.hook_mlp_out"]
    with pytest.raises(hk.SiteError, match="logits=True"):
        out["logits"]
    assert torch.equal(out.tokens, out.sequences[:, x.width :]) and out.lengths.tolist() == [5, 5]


@torch.no_grad()
def test_texts_are_padded_left_and_come_back_as_texts() -> None:
    model = hk.wrap(zoo.make("llama"), words())
    texts = ["w5 w6 w7 w8 w9", "w4 w3"]
    out = model.generate(texts, **GREEDY)
    x = model.inputs(texts, padding="left")
    module: Any = model.module
    want = module.generate(x.ids, attention_mask=x.mask.long(), **GREEDY)
    assert torch.equal(out.sequences, want) and x.mask[1].tolist() == [False] * 3 + [True] * 2
    assert out.texts is not None and [t.split() for t in out.texts] == [
        [f"w{i}" for i in row if i > 2] for row in out.tokens.tolist()
    ]
    assert "w4w3" in str(out).replace(" ", "") and "<table" in out._repr_html_()
    # One text is one row, and ids are as good.
    alone = model.generate("w4 w3", **GREEDY)
    assert torch.equal(alone.tokens, model.generate([[4, 3]], **GREEDY).tokens) and len(alone) == 1
    assert torch.equal(alone.tokens, model.generate(torch.tensor([[4, 3]]), **GREEDY).tokens)
    assert torch.equal(alone.tokens[0], out.tokens[1])
    edited = model.generate(texts, edits(model), **GREEDY)
    assert not torch.equal(edited.tokens, out.tokens)
    assert torch.equal(model.generate(hk.World(x, edits(model)), **GREEDY).tokens, edited.tokens)


@torch.no_grad()
@pytest.mark.parametrize("how", ["token", "criterion"])
def test_a_row_that_ended_is_padding_from_there(how: str) -> None:
    model = hk.wrap(fresh("llama").module, words())
    x = prompts(model)
    free = model.generate(x, **dict(GREEDY, max_new_tokens=6))
    first, second = free.tokens.tolist()
    n, end = next((n, one) for n, one in enumerate(second) if one > 2 and one not in (*first, *second[:n]))
    stop = (
        {"eos_token_id": end}
        if how == "token"
        else {"eos_token_id": 63, "stopping_criteria": [lambda ids, scores, **_: ids[:, -1] == end]}
    )
    out = model.generate(x, capture="resid_post", logits=True, **dict(GREEDY, max_new_tokens=6, **stop))
    assert out.lengths.tolist() == [6, n + 1]
    assert (
        out.logits is not None and bool(out.logits[1, n + 1 :].isnan().all()) and not bool(out.logits[0].isnan().any())
    )
    place = site("resid_post", 1)
    assert not bool(out[place][1, x.width + n + 1 :].any()) and bool(out[place][1, x.width + n].any())
    alone = model.generate(x.rows(slice(1, 2)), capture=place, **dict(GREEDY, max_new_tokens=6))
    assert_equal([out[place][1, 2 : x.width + n]], [alone[place][0, 2 : x.width + n]])
    assert out.texts is not None and out.texts[1].split()[-1] == f"w{end}"


@torch.no_grad()
def test_tokens_that_are_tried_and_rejected_are_not_kept() -> None:
    model = wrapped("llama")
    x, plan = Inputs.of(torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5]])), edits(wrapped("llama"))
    sites = kept_sites(model)
    out = model.generate(
        x, plan, capture=sites, logits=True, prompt_lookup_num_tokens=3, **dict(GREEDY, max_new_tokens=7)
    )
    run = whole(model, out, plan, sites)
    for place in sites:
        agree(out[place], run.tape[place], out.mask[:, :-1], place)
    assert out.logits is not None
    assert_equal([out.logits], [run.logits[:, x.width - 1 :].float()], 1e-4)


@torch.no_grad()
def test_inside_a_plan_that_is_held_already() -> None:
    model = wrapped("gpt2")
    x = prompts(model)
    outer, inner = hk.scale(site("resid_post", 0), 1.5), hk.scale(site("z", 1, pos="new"), 0.2)
    want = model.generate(x, outer + inner, capture="resid_post", **GREEDY)
    with model.apply(outer) as audit:
        got = model.generate(x, inner, capture="resid_post", **GREEDY)
        bare = model.generate(x, **GREEDY)
        kept = model.generate(x, capture="resid_post", **GREEDY)
    assert torch.equal(got.sequences, want.sequences) and audit[0].positions == 3 * (10 + 2 * 4)
    assert_equal([got["blocks.1.hook_resid_post"]], [want["blocks.1.hook_resid_post"]])
    assert torch.equal(bare.sequences, kept.sequences)
    assert not torch.equal(got["blocks.1.hook_resid_post"], kept["blocks.1.hook_resid_post"])
    assert not model.holds


@torch.no_grad()
def test_everything_is_kept_where_all_is_asked_for() -> None:
    model = wrapped("gpt2")
    x = prompts(model)
    out = model.generate(x, capture="all", **GREEDY)
    run = whole(model, out, Plan(), [place for place, _ in out.values])
    assert {place.name for place, _ in out.values} == {info.name for info in model.sites()} - {"logits"}
    assert out.logits is not None
    for place, value in out.values:
        agree(value, run.tape[place], out.mask[:, :-1], place)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_model_that_sees(family: str) -> None:
    model = hk.wrap(seeing.shared(family))
    batch = seeing.batch(family, [1, 2], side="left")
    plan = hk.scale(site("z", 1, pos="image"), -2.0) + hk.scale(site("resid_post", 0, pos="new"), 1.5)
    plan = plan + hk.scale(site("resid_post", 0, stack="vision"), 0.5)
    module: Any = model.module
    with model.apply(plan):
        want = module.generate(**batch, **GREEDY)
    out = model.generate(model.inputs(batch), plan, capture="resid_post", **GREEDY)
    assert torch.equal(out.sequences, want)
    assert not torch.equal(out.tokens, model.generate(model.inputs(batch), **GREEDY).tokens)
    assert bool(out[site("resid_post", 0, pos="new")].any())
    with pytest.raises(hk.SiteError, match="of the tower"):
        model.generate(model.inputs(batch), capture=site("resid_post", 0, stack="vision"), **GREEDY)


@torch.no_grad()
def test_refused_by_name() -> None:
    model = wrapped("llama")
    x = prompts(model)
    place = site("resid_post", 1)
    for name, more in (("input_ids", x.ids), ("attention_mask", x.mask), ("inputs_embeds", None)):
        with pytest.raises(hk.InputsError, match=f"takes no {name}="):
            model.generate(x, **{name: more}, **GREEDY)
    with pytest.raises(hk.InputsError, match="padded on the right"):
        model.generate(prompts(model, "right"), **GREEDY)
    with pytest.raises(hk.InputsError, match="without row_ids"):
        model.generate(Inputs.of(x.ids, x.mask, torch.tensor([3, 4])), hk.noise(place, 1.0), **GREEDY)
    with pytest.raises(hk.InputsError, match="Inputs already"):
        model.generate(x, mask=x.mask, **GREEDY)
    with pytest.raises(hk.PlanError, match="brings its own plan"):
        model.generate(hk.World(x), hk.zero(place), **GREEDY)
    with pytest.raises(hk.SiteError, match="all positions of a generation are kept"):
        model.generate(x, capture=place.at(pos=-1), **GREEDY)
    with pytest.raises(hk.PlanError, match="texts of its own"):
        model.generate(x, capture=place, guidance_scale=1.5, **GREEDY)
    with pytest.raises(hk.SiteError, match="did you mean"):
        model.generate(x, capture="blocks.1.hook_nothing", **GREEDY)
    with pytest.raises(hk.UnfiredError):
        model.generate(x, hk.zero(place.at(pos=new(9))), **GREEDY)
    with pytest.raises(hk.ModelError, match="does not generate"):
        wrapped("small_attn_only").generate([[1, 2]])
    from transformers import DynamicCache

    cache = DynamicCache(config=model.module.config)  # type: ignore[arg-type]
    y = prompts(model, lengths=(6,))
    model.module(input_ids=y.ids[:, :3], past_key_values=cache)
    with pytest.raises(hk.SiteError, match="in the cache already"):
        model.generate(y, capture=place, past_key_values=cache, **GREEDY)

    def other(module: Any, input_ids: Tensor, **_: Any) -> Tensor:
        return input_ids + 1

    with pytest.raises(hk.PlanError, match="does not begin with the prompts"):
        model.generate(x, custom_generate=other, **GREEDY)
    with pytest.raises(hk.PlanError, match="keeps no logits"):
        model.generate(x, custom_generate=lambda module, input_ids, **_: input_ids, logits=True, **GREEDY)
    with pytest.raises((TypeError, ValueError)):
        model.generate(x, hk.zero(place.at(pos=-1)), max_tokens=4)
    assert not model.holds
