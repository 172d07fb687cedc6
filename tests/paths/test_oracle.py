"""The oracle of path interventions against the other oracle, the models themselves, and networks with known answers."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from tests import oracle as sites
from tests import zoo
from tests.paths import networks, oracle
from tests.paths.cases import all_edges, logit_diff
from tests.paths.networks import INDUCTION, PREVIOUS, A, B, C, D, X

CLOSE = {"rtol": 0.0, "atol": 1e-10}
LENGTHS = (5, 3, 6)
each_family = pytest.mark.parametrize("family", zoo.FAMILIES)


def prompts(padding: str = "right", seed: int = 0, lengths=LENGTHS) -> oracle.Prompts:
    return oracle.Prompts(*zoo.random_inputs(zoo.VOCAB, lengths, padding, seed))


def pair(padding: str = "right") -> tuple[oracle.Prompts, oracle.Prompts]:
    return prompts(padding, 0), prompts(padding, 1)


def patched(model, edited: oracle.Prompts, other: oracle.Prompts) -> dict[str, Tensor]:
    return oracle.replaced(model, edited, "patch", other)


def alone(ids: list[int]) -> oracle.Prompts:
    return oracle.Prompts(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))


@each_family
@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_the_run_is_the_models(family, padding):
    model, given = zoo.make(family), prompts(padding)
    trace, spec = oracle.forward(model, given), sites.read(model)
    logits, cache = sites.forward(model, given.ids, given.mask)
    torch.testing.assert_close(trace.logits, logits, **CLOSE)
    position = sites.positions(given.mask)
    out = model(given.ids, attention_mask=given.mask, position_ids=position)
    torch.testing.assert_close(trace.logits[given.mask], getattr(out, "logits", out)[given.mask], **CLOSE)
    for name, value in trace.writers.items():
        if name.startswith("a"):
            layer, head = (int(part) for part in name[1:].split(".h"))
            w = spec.layers[layer]
            scale = 1 if w.post1 is None else oracle.gain(w.post1, cache["result", layer].sum(2) + w.attn.b_O)
            torch.testing.assert_close(value, cache["result", layer][:, :, head] * scale, **CLOSE)
        elif name.startswith("m"):
            torch.testing.assert_close(value, cache["mlp_out", int(name[1:])], **CLOSE)
    wide = oracle.forward(model, given, query_heads=True)
    torch.testing.assert_close(wide.logits, trace.logits, **CLOSE)


@each_family
@torch.no_grad()
def test_writers_and_biases_add_up_to_what_is_read(family):
    model, given = zoo.make(family), prompts()
    trace, spec = oracle.forward(model, given), sites.read(model)
    for reader, read in trace.readers.items():
        senders = [e.split("->")[0] for e in oracle.edges(model) if e.endswith(f"->{reader}")]
        layers = {name.split(".")[0] for name in senders if name.startswith("a")}
        biases = sum(spec.layers[int(name[1:])].attn.b_O for name in layers)
        torch.testing.assert_close(sum(trace.writers[u] for u in senders) + biases, read, **CLOSE)


SITES = {"q": "q_input", "k": "k_input", "v": "v_input"}


@each_family
@torch.no_grad()
def test_an_edge_is_an_edit_of_one_readers_input(family):
    """The other oracle knows no edges: there the reader's row of `q_input`, `mlp_in`, ... is changed by hand."""
    model, (clean, corrupt) = zoo.make(family), pair()
    last = len(sites.read(model).layers) - 1
    base, copied = oracle.forward(model, corrupt), patched(model, corrupt, clean)
    every = oracle.edges(model)
    for which in random.sample(every, 25):
        sender, reader = which.split("->")
        difference = copied[sender] - base.writers[sender]
        name, _, letter = reader.rstrip(">").partition("<")
        key = ("resid_post", last)
        if letter:
            layer, head = (int(part) for part in name[1:].split(".h"))
            key = (SITES[letter], layer)
        elif name != "logits":
            key = ("mlp_in", int(name[1:]))

        def edit(x: Tensor, difference=difference, head=head if letter else None) -> Tensor:
            if head is None:
                return x + difference
            return torch.stack([x[:, :, h] + difference * (h == head) for h in range(x.shape[2])], 2)

        expected, _ = sites.forward(model, corrupt.ids, corrupt.mask, {key: edit})
        got = oracle.edge(model, corrupt, copied, which, base=base)
        torch.testing.assert_close(got[corrupt.mask], expected[corrupt.mask], **CLOSE)
        torch.testing.assert_close(oracle.edge_set(model, corrupt, copied, [which]), got, **CLOSE)


@each_family
@torch.no_grad()
def test_many_edges_at_once_are_one_after_another(family):
    model, (clean, corrupt), spans = zoo.make(family), pair(), {"some": (0, 2)}
    copied, real = patched(model, corrupt, clean), corrupt.mask
    for query_heads, place in ((False, ""), (True, "@some")):
        base = oracle.forward(model, corrupt, query_heads=query_heads)
        given = {"base": base, "spans": spans, "query_heads": query_heads}
        which = [edge + place for edge in oracle.edges(model, query_heads)]
        together = all_edges(model, corrupt, copied, which, **given)
        assert ((together - base.logits)[:, real].flatten(1).abs().amax(1) > 1e-6).all()
        for i in random.sample(range(len(which)), 40):
            alone = oracle.edge(model, corrupt, copied, which[i], **given)
            torch.testing.assert_close(together[i][real], alone[real], **CLOSE)


@each_family
@pytest.mark.parametrize("query_heads", [False, True])
@torch.no_grad()
def test_all_edges_make_the_other_run_and_none_makes_this_one(family, query_heads):
    model, clean, corrupt = zoo.make(family), prompts("right", 0), prompts("left", 1)
    every, copied = oracle.edges(model, query_heads), patched(model, corrupt, clean)
    edited = oracle.edge_set(model, corrupt, copied, every, query_heads=query_heads)
    torch.testing.assert_close(edited[corrupt.mask], oracle.forward(model, clean).logits[clean.mask], **CLOSE)
    torch.testing.assert_close(
        oracle.edge_set(model, corrupt, copied, []), oracle.forward(model, corrupt).logits, **CLOSE
    )


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
@torch.no_grad()
def test_padding_changes_nothing(family):
    model, right, left = zoo.make(family), pair("right"), pair("left")
    measure = logit_diff(7, 9)
    for which in random.sample(oracle.edges(model), 8):
        for values, options in (("patch", {}), ("mean", {"pooled": True}), ("zero", {})):
            found = []
            for clean, corrupt in (right, left):
                copied = oracle.replaced(model, corrupt, values, clean, **options)
                found.append(measure(oracle.edge(model, corrupt, copied, which), corrupt.mask))
            torch.testing.assert_close(*found, **CLOSE)


@pytest.mark.parametrize("family", ["llama", "qwen3", "small_rms_rotary_gqa"])
@torch.no_grad()
def test_an_edge_into_a_key_value_head_is_those_into_its_query_heads(family):
    model, (clean, corrupt) = zoo.make(family), pair()
    copied = patched(model, corrupt, clean)
    for letter in "kv":
        whole = oracle.edge(model, corrupt, copied, f"a0.h2->a1.h1<{letter}>")
        parts = [f"a0.h2->a1.h{h}<{letter}>" for h in (2, 3)]
        edited = oracle.edge_set(model, corrupt, copied, parts, query_heads=True)
        torch.testing.assert_close(edited, whole, **CLOSE)
        one = oracle.edge(model, corrupt, copied, parts[0], query_heads=True)
        assert (one - whole)[corrupt.mask].abs().max() > 1e-6


@each_family
@torch.no_grad()
def test_paths_of_which_nothing_leaves_are_edges(family):
    """A direct path is its edge; a path through a node that only the logits read is the edge into that node."""
    model, (clean, corrupt) = zoo.make(family), pair()
    copied, real = patched(model, corrupt, clean), corrupt.mask
    last = len(sites.read(model).layers) - 1
    final = f"m{last}" if f"m{last}->logits" in oracle.edges(model) else f"a{last}.h1<q>"
    for path, which, norms in (
        ("a0.h1->logits", "a0.h1->logits", "recompute"),
        ("a0.h1->logits", "a0.h1->logits", "frozen"),
        (f"input->{final}->logits", f"input->{final}", "recompute"),
    ):
        got = oracle.frozen_path(model, corrupt, copied, path, norms=norms)
        expected = oracle.edge(model, corrupt, copied, which, norms=norms)
        torch.testing.assert_close(got[real], expected[real], **CLOSE)


@torch.no_grad()
def test_frozen_norms_are_linear_into_the_logits():
    """With the final norm's scale held, the logits are affine in what is read, so effects of disjoint sets add."""
    for family in ("gpt2", "llama"):
        model, (clean, corrupt) = zoo.make(family), pair()
        base, copied = oracle.forward(model, corrupt).logits, patched(model, corrupt, clean)
        direct = [e for e in oracle.edges(model) if e.endswith("->logits")]
        both = oracle.edge_set(model, corrupt, copied, direct, norms="frozen") - base
        parts = [oracle.edge(model, corrupt, copied, e, norms="frozen") - base for e in direct]
        torch.testing.assert_close(sum(parts), both, **CLOSE)
        free = [oracle.edge(model, corrupt, copied, e) - base for e in direct]
        assert (sum(free) - both)[corrupt.mask].abs().max() > 1e-3


@torch.no_grad()
def test_what_is_written_instead():
    """Means are over the tokens that there are, on whichever side the padding is."""
    model, edited = zoo.make("llama"), prompts("left")
    for padding in ("left", "right"):
        reference = prompts(padding, 2, (6, 4, 5, 6))
        writers = oracle.forward(model, reference).writers["m0"]
        rows = [x[real] for x, real in zip(writers, reference.mask, strict=True)]
        mean = oracle.replaced(model, edited, "mean", reference)["m0"]
        torch.testing.assert_close(mean[1, 3], sum(x[0] for x in rows) / 4, **CLOSE)
        torch.testing.assert_close(mean[2, 5], (rows[0][5] + rows[3][5]) / 2, **CLOSE)
        pooled = oracle.replaced(model, edited, "mean", reference, pooled=True)["m0"]
        torch.testing.assert_close(pooled[0, 4], torch.cat(rows).mean(0), **CLOSE)
        drawn = oracle.replaced(model, edited, "resample", reference, donors=[2, 0, 3])["m0"]
        torch.testing.assert_close(drawn[1, 3:], rows[0][:3], **CLOSE)


# Networks by hand


def logits_of(network, token: int, which: list[str] = (), instead: int | None = None) -> Tensor:
    edited = alone([token])
    copied = patched(network, edited, alone([token if instead is None else instead]))
    return oracle.edge_set(network, edited, copied, which)[0, -1]


@torch.no_grad()
def test_the_published_numbers_of_two_linear_blocks():
    network = networks.linear_blocks()
    steps = ["a0.h1->logits", "a0.h0->a1.h1<v>", "input->a0.h0<v>"]
    assert logits_of(network, networks.UP).tolist() == [25, 49]
    assert logits_of(network, networks.DOWN).tolist() == [-25, -49]
    for count, expected in ((1, [-19, -41]), (2, [-13, -25]), (3, [-9, -13])):
        assert logits_of(network, networks.DOWN, steps[:count], networks.UP).tolist() == expected


@torch.no_grad()
def test_the_induction_circuit_predicts():
    network = networks.induction()
    ids = torch.tensor([[0, A, B, D, C, A], [0, A, B, D, C, D], [0, C, D, A, X, A], [0, X, B, D, C, A]])
    logits = network(ids)[:, -1]
    assert logits[:3].argmax(-1).tolist() == [B, C, X]
    assert logits[:3].max(-1).values.tolist() == pytest.approx([10, 10, 10])
    assert logits[3, B] == pytest.approx(float(logits[3, C]))
    trace = oracle.forward(network, oracle.Prompts(ids, torch.ones_like(ids, dtype=torch.bool)))
    for name in oracle.forward(network, alone([0, A])).writers:
        assert trace.writers[name].abs().max() > 0.1, name
    copied = patched(network, alone(ids[3].tolist()), alone(ids[0].tolist()))
    whole = oracle.frozen_path(network, alone(ids[3].tolist()), copied, f"input->{PREVIOUS}<v>->{INDUCTION}<k>->logits")
    torch.testing.assert_close(whole[0, -1, [B, C]], logits[0, [B, C]], rtol=0, atol=1e-6)


@torch.no_grad()
def test_two_heads():
    opposite = networks.two_heads(-1.0, None)
    for network, expected in ((opposite, (0, 0)), (networks.two_heads(1.0, 2), (0, 1))):
        values = [logits_of(network, token)[networks.WANTED] for token in (networks.OFF, networks.ON)]
        assert tuple(float(v) for v in values) == expected
