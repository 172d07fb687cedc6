"""T5: an encoder, a decoder, and the attention from one to the other, each a stack; against hooks by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import interp as ip
from experiments.families.models import FAMILIES

TEXTS, SAID = [[3, 9, 27, 31, 44, 12], [7, 8, 9, 10]], [[5, 6, 7], [8, 9]]
OTHER = [[4, 19, 27, 31, 14, 12], [7, 18, 9, 10]]
STACKS = ("encoder", "decoder", "cross")


@pytest.fixture(scope="module")
def module():
    return FAMILIES["T5"].make(torch.float64)


@pytest.fixture
def model(module) -> ip.Model:
    return ip.wrap(module)


def called(module, x: ip.Inputs) -> Tensor:
    with torch.no_grad():
        return module(input_ids=x.source.ids, attention_mask=x.source.mask.long(), decoder_input_ids=x.ids).logits


def vector(seed: int = 0, width: int = 32) -> Tensor:
    return 3 * torch.randn(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# What is edited is what hooks by hand edit


def by_hand(module, x: ip.Inputs, part, edit) -> Tensor:
    """Logits where the output of a part is edited by a function."""

    def hook(_m, _a, out):
        return (edit(out[0]), *out[1:]) if isinstance(out, tuple) else edit(out)

    handle = part.register_forward_hook(hook)
    try:
        return called(module, x)
    finally:
        handle.remove()


def at(position: int, change: Tensor):
    """Adds to a token, where rows are padded on the right."""

    def edit(value: Tensor) -> Tensor:
        value = value.clone()
        value[:, position] += change
        return value

    return edit


def test_edits_of_each_stack_are_those_of_hooks(module, model):
    x = model.inputs(TEXTS, decoded=SAID)
    plain = called(module, x)
    torch.testing.assert_close(model.run(x).logits[x.mask], plain[x.mask])
    parts = {
        ip.site("resid_post", 1, stack="encoder", pos=2): (module.encoder.block[1], at(2, vector())),
        ip.site("attn_out", 0, stack="encoder", pos=2): (
            module.encoder.block[0].layer[0].SelfAttention,
            at(2, vector()),
        ),
        ip.site("ln_final", stack="encoder", pos=3): (module.encoder.final_layer_norm, at(3, vector())),
        ip.site("resid_post", 1, pos=1): (module.decoder.block[1], at(1, vector())),
        ip.site("attn_out", 1, stack="decoder", pos=1): (
            module.decoder.block[1].layer[0].SelfAttention,
            at(1, vector()),
        ),
        ip.site("attn_out", 1, stack="cross", pos=1): (
            module.decoder.block[1].layer[1].EncDecAttention,
            at(1, vector()),
        ),
        ip.site("mlp_out", 2, pos=0): (module.decoder.block[2].layer[2].DenseReluDense, at(0, vector())),
    }
    for place, (part, edit) in parts.items():
        wanted, got = by_hand(module, x, part, edit), model.run(x, ip.steer(place, vector())).logits
        torch.testing.assert_close(got[x.mask], wanted[x.mask], rtol=0, atol=1e-9, msg=lambda m, p=place: f"{p}: {m}")
        assert float((got - plain)[x.mask].abs().max()) > 1e-3, place
        with model.apply(ip.steer(place, vector())), torch.no_grad():
            torch.testing.assert_close(called(module, x)[x.mask], wanted[x.mask])


def test_keys_of_the_cross_attention_are_the_encoders_tokens(module, model):
    x = model.inputs(TEXTS, decoded=SAID)
    places = [ip.site(name, 1, stack="cross") for name in ("q", "k", "v", "z", "pattern", "scores")]
    tape = model.run(x, capture=places).tape
    assert [list(tape[place].shape) for place in places] == [
        [2, 4, 4, 8], [2, 6, 4, 8], [2, 6, 4, 8], [2, 4, 4, 8], [2, 4, 4, 6], [2, 4, 4, 6]]  # fmt: skip
    assert list(model.run(x, capture=[ip.site("pattern", 1, stack="cross", key_pos=-1)]).tape.values[0][1].shape) == [
        2, 4, 4, 1]  # fmt: skip
    pattern = tape[places[4]]
    torch.testing.assert_close(pattern.sum(-1), torch.ones(2, 4, 4, dtype=torch.float64))
    assert not pattern[1, :, :, 4:].any()  # what is padding in the encoder
    torch.testing.assert_close(torch.einsum("bhts,bshd->bthd", pattern, tape[places[2]]), tape[places[3]])
    # A token of the encoder's that nobody attends to, in any layer, is nowhere read: as if its state were another.
    gone = ip.Plan(tuple(ip.zero(ip.site("v", layer, stack="cross", pos=2)) for layer in range(3)))
    moved = gone + ip.Plan((ip.steer(ip.site("ln_final", stack="encoder", pos=2), vector()),))
    freed = ip.Plan((ip.steer(ip.site("ln_final", stack="encoder", pos=2), vector()),))
    assert float((model.run(x, freed).logits - model.run(x).logits).abs().max()) > 1e-3
    # Its keys still take attention away, so those are held too.
    held = ip.Plan(tuple(ip.patch(ip.site("k", layer, stack="cross"), ip.World(x)) for layer in range(3)))
    torch.testing.assert_close(model.run(x, moved + held).logits, model.run(x, gone + held).logits)


def test_the_bias_of_far_tokens_is_among_the_scores(module, model):
    x = model.inputs(TEXTS, decoded=SAID)
    for stack, body in (("encoder", module.encoder), ("decoder", module.decoder)):
        layer = body.block[1].layer[0].SelfAttention
        places = [ip.site(name, 1, stack=stack) for name in ("q", "k", "scores")]
        q, k, scores = (model.run(x, capture=places).tape[place] for place in places)
        width = q.shape[1]
        bias = body.block[0].layer[0].SelfAttention.compute_bias(width, width)
        assert layer.scaling == 1.0 and float(bias.detach().abs().max()) > 0.1
        wanted = torch.einsum("bthd,bshd->bhts", q, k) + bias
        seen = scores.isfinite()
        torch.testing.assert_close(scores[seen], wanted[seen])


def test_sites_that_are_not_there_are_refused(model):
    x = model.inputs(TEXTS, decoded=SAID)
    for place, why in {
        ip.site("rot_q", 0): "no site 'rot_q'",
        ip.site("k_input", 0, stack="cross"): "what its keys and values read is what the encoder returns",
        ip.site("resid_post", 0, stack="cross"): "the stream around the attention to what is encoded is the decoder's",
        ip.site("mlp_out", 0, stack="cross"): "no site 'mlp_out'",
        ip.site("z", 0, stack="vision"): "the model has the stacks encoder, cross, decoder",
    }.items():
        with pytest.raises(ip.SiteError, match=why):
            model.run(x, ip.zero(place))
    llama = ip.wrap(FAMILIES["Llama, no head"].make())
    x = llama.inputs([[1, 2]])
    with pytest.raises(ip.SiteError, match="no encoder and decoder"):
        llama.run(x, ip.zero(ip.site("z", 0, stack="decoder")))


# Inputs


def test_inputs_say_what_is_encoded_and_what_is_decoded(model):
    x = model.inputs(TEXTS, decoded=SAID)
    assert x.ids.tolist() == [[0, 5, 6, 7], [0, 8, 9, 0]] and x.lengths.tolist() == [4, 3]
    assert x.source.lengths.tolist() == [6, 4] and "after Inputs(2 rows" in repr(x)
    assert model.inputs(TEXTS).ids.tolist() == [[0], [0]]
    assert x.rows(slice(1, 2)).source.ids.tolist() == [[7, 8, 9, 10, 0, 0]]
    assert ip.World(x) == ip.World(model.inputs(TEXTS, decoded=SAID)) != ip.World(model.inputs(OTHER, decoded=SAID))
    with pytest.raises(ip.InputsError, match="1 rows are decoded, of 2"):
        model.inputs(TEXTS, decoded=[[5]])
    llama = ip.wrap(FAMILIES["Llama, no head"].make())
    with pytest.raises(ip.InputsError, match="encodes nothing"):
        llama.inputs(TEXTS, decoded=SAID)
    with pytest.raises(ip.InputsError, match="has a text to encode"):
        llama.run(x)
    with pytest.raises(ip.InputsError, match="has no text to encode"):
        model.run(llama.inputs(TEXTS))
    for call in (lambda: model.compile(), lambda: model.fork(combine=lambda logits, moment: logits[0])):
        with pytest.raises(ip.ModelError, match="decodes what it encodes"):
            call()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_either_text_changes_nothing(model, side):
    x = model.inputs(TEXTS, decoded=SAID, padding=side)
    plan = ip.Plan((ip.steer(ip.site("resid_post", 1, stack="encoder", pos=-1), vector()),
                    ip.scale(ip.site("pattern", 1, stack="cross", pos=1, key_pos=-2), 0.1),
                    ip.scale(ip.site("v", 0, stack="cross", pos=1), 2.0)))  # fmt: skip
    for row in range(2):
        alone = model.run(model.inputs(TEXTS[row : row + 1], decoded=SAID[row : row + 1]), plan).logits[0]
        torch.testing.assert_close(model.run(x, plan).logits[row][x.mask[row]], alone)
        assert not torch.allclose(alone, model.run(x).logits[row][x.mask[row]])


def test_saved_plans_keep_what_is_encoded(model, tmp_path):
    x = model.inputs(TEXTS, decoded=SAID)
    plan = ip.Plan((ip.patch(ip.site("z", 1, stack="encoder"), ip.World(model.inputs(OTHER, decoded=SAID))),))
    plan.save(tmp_path / "plan")
    torch.testing.assert_close(model.run(x, ip.Plan.load(tmp_path / "plan")).logits, model.run(x, plan).logits)


# Sweeps


def test_sweeps_go_through_each_stack(module, model):
    clean, corrupt = model.inputs(TEXTS, decoded=SAID), model.inputs(OTHER, decoded=SAID)
    metric = ip.logit_diff(3, 4)
    base = called(module, corrupt)
    for stack, width in (("encoder", 4), ("decoder", 3), ("cross", 3)):
        grid = ip.grid("z", layer=[0, 2], pos=list(range(width)), stack=stack)
        found = {e: ip.sweep(model, clean, corrupt, grid, metric=metric, executor=e).effect
                 for e in ("sequential", "batched", "auto")}  # fmt: skip
        np.testing.assert_allclose(found["batched"], found["sequential"], rtol=0, atol=1e-9)
        np.testing.assert_allclose(found["auto"], found["sequential"], rtol=0, atol=1e-9)
        place = ip.site("z", 0, stack=stack, pos=1)
        now = model.run(corrupt, ip.patch(place, ip.World(clean))).logits
        last = corrupt.lengths - 1
        want = [(now - base)[row, last[row], 3] - (now - base)[row, last[row], 4] for row in range(2)]
        np.testing.assert_allclose(found["sequential"][0, 1], torch.stack(want).detach().numpy(), rtol=0, atol=1e-9)
        assert np.abs(found["sequential"]).max() > 1e-3
    keys = ip.sweep(model, clean, corrupt, ip.grid("pattern", layer=1, key_pos="all", stack="cross"), metric=metric,
                    intervention=lambda place: ip.scale(place, 0.0), direction="noising")  # fmt: skip
    assert keys.effect.shape == (6, 2) and np.isnan(keys.effect[4:, 1]).all() and np.nanmax(np.abs(keys.effect)) > 1e-3
    with pytest.raises(ip.InputsError, match="do not correspond"):
        ip.sweep(model, clean, model.inputs([TEXTS[0][:5], TEXTS[1]], decoded=SAID), ip.grid("z", layer=0),
                 metric=metric)  # fmt: skip


# Decoding

OPTIONS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True,
           "output_logits": True}  # fmt: skip


def everywhere() -> ip.Plan:
    return ip.Plan((
        ip.steer(ip.site("resid_post", 1), vector(1)),
        ip.steer(ip.site("resid_post", 1, stack="encoder", pos=2), vector(2)),
        ip.scale(ip.site("z", 1, stack="cross", head=2), 3.0),
        ip.scale(ip.site("v", 0, stack="cross", pos=1), 2.0),
        ip.scale(ip.site("pattern", 2, stack="cross", key_pos=0), 0.1),
        ip.scale(ip.site("v", 1, head=1), 2.0),
        ip.steer(ip.site("resid_post", 0, pos="new"), vector(3)),
    ))  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, pytest.param({"num_return_sequences": 2, "num_beams": 2}, marks=pytest.mark.full)],
    ids=str,
)
def test_generation_under_a_plan_is_recomputation(module, model, options):
    x = model.inputs(TEXTS)
    call = {"input_ids": x.source.ids, "attention_mask": x.source.mask.long(), **OPTIONS, **options}
    said, audits = [], []
    for use_cache in (True, False):
        with model.apply(everywhere()) as audit, torch.no_grad():
            said.append(module.generate(**call, use_cache=use_cache))
        audits.append([(entry.rows, entry.positions) for entry in audit])
    free = module.generate(**call)
    assert torch.equal(said[0].sequences, said[1].sequences)
    assert not torch.allclose(free.logits[0], said[0].logits[0])
    assert audits[0] == audits[1]
    if options:
        torch.testing.assert_close(torch.stack(said[0].logits), torch.stack(said[1].logits))
        return
    # The whole text, with the tokens that are new spelled out.
    y = model.inputs(TEXTS, decoded=said[0].sequences[:, 1:-1].tolist())
    plan = ip.Plan(everywhere()[:-1]) + ip.Plan((ip.steer(ip.site("resid_post", 0, pos=slice(1, None)), vector(3)),))
    whole = model.run(y, plan).logits.transpose(0, 1)
    torch.testing.assert_close(torch.stack(said[0].logits).to(whole.dtype), whole, rtol=0, atol=1e-5)
    assert audits[0][1] == (2, 2) and audits[0][3] == (2, 2) and audits[0][0] == (2, 10)


def test_generation_reads_other_worlds(module, model):
    """What is frozen of the encoder and of the attention to it is what it is without the plan."""
    x = model.inputs(TEXTS)
    call = {"input_ids": x.source.ids, "attention_mask": x.source.mask.long(), **OPTIONS}
    steered = ip.Plan((ip.steer(ip.site("resid_post", 0, stack="encoder"), vector(4)),))
    for place in (ip.site("z", 2, stack="encoder"), ip.site("z", 1, stack="cross")):
        plan = steered + ip.Plan((ip.freeze(place),))
        said = []
        for use_cache in (True, False):
            with model.apply(plan), torch.no_grad():
                said.append(module.generate(**call, use_cache=use_cache))
        with model.apply(steered), torch.no_grad():
            other = module.generate(**call)
        torch.testing.assert_close(torch.stack(said[0].logits), torch.stack(said[1].logits))
        assert not torch.allclose(said[0].logits[0], other.logits[0])
        whole = model.run(model.inputs(TEXTS, decoded=said[0].sequences[:, 1:-1].tolist()), plan).logits
        got = torch.stack(said[0].logits).transpose(0, 1)
        torch.testing.assert_close(got.to(whole.dtype), whole, rtol=0, atol=1e-5)


def test_a_loop_of_the_users_own(module, model):
    """Encoded once, decoded step by step with a cache, under a plan around all of it."""
    x = model.inputs(TEXTS)
    plan = ip.Plan((ip.scale(ip.site("z", 1, stack="cross", head=2), 3.0), ip.scale(ip.site("v", 1, head=1), 2.0)))
    said = [[5, 6], [8, 9]]
    whole = model.run(model.inputs(TEXTS, decoded=said), plan).logits
    mask, cache, steps = x.source.mask.long(), None, []
    encoded = module.encoder(input_ids=x.source.ids, attention_mask=mask)
    with model.apply(plan), torch.no_grad():
        for ids in (torch.zeros(2, 1, dtype=torch.int64), *torch.tensor(said).T[..., None]):
            out = module(encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=ids, past_key_values=cache,
                         use_cache=True)  # fmt: skip
            cache = out.past_key_values
            steps.append(out.logits[:, 0])
    torch.testing.assert_close(torch.stack(steps, 1), whole)
    with pytest.raises(ip.UnfiredError), model.apply(ip.zero(ip.site("z", 0, stack="encoder"))), torch.no_grad():
        module(encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=torch.zeros(2, 1, dtype=torch.int64))


@pytest.mark.full
def test_training_under_a_plan(module, model):
    x = model.inputs(TEXTS)
    labels = torch.tensor([[5, 6, 7], [8, 9, 3]])
    plan = ip.steer(ip.site("resid_post", 1, stack="encoder"), vector())
    with model.apply(plan):
        loss = module(input_ids=x.source.ids, attention_mask=x.source.mask.long(), labels=labels).loss
        loss.backward()
    logits = model.run(model.inputs(TEXTS, decoded=labels[:, :-1].tolist()), plan).logits
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss.detach(), wanted.detach())
    assert float(module.encoder.block[0].layer[0].SelfAttention.q.weight.grad.abs().max()) > 0
    module.zero_grad()


@pytest.mark.full
@pytest.mark.parametrize("stem", ["MT5"])
def test_relatives(stem):
    from experiments.families.models import Family

    options = {**FAMILIES["T5, gated"].options}
    ip.conformance(ip.wrap(Family(stem, options, "ForConditionalGeneration").make())).require()
    ip.conformance(ip.wrap(Family("T5", FAMILIES["T5"].options, "Model").make())).require()
