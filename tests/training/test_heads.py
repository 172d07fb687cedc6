"""What is held at heads, against a forward pass written by hand whose loops over rows and positions do what it says."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

import interp as ip
from hooks.errors import CycleError, InputsError, PlanError, ShapeError, SiteError
from interp import training as tr
from tests import oracle, zoo

FAMILIES = ["gpt2", "llama", "small_attn_only"]
EXACT = {"rtol": 0.0, "atol": 1e-10}
HEAD = 2

each_family = pytest.mark.parametrize("family", FAMILIES)
each_padding = pytest.mark.parametrize("padding", ["none", "left", "right"])


@cache
def wrapped(family: str) -> ip.Model:
    return ip.wrap(zoo.make(family))


def example(model: ip.Model, padding: str = "none", rows: int = 2) -> ip.Inputs:
    lengths = [6] * rows if padding == "none" else [6, 5, 6][:rows]
    return model.inputs(*zoo.random_inputs(9, lengths, "right" if padding == "none" else padding, 1))


def call(model: ip.Model, x: ip.Inputs) -> Tensor:
    out = model.module(input_ids=x.ids, attention_mask=x.mask.long(), position_ids=x.positions)
    return out if isinstance(out, Tensor) else out.logits


def compare(model: ip.Model, x: ip.Inputs, plan, edits: dict) -> None:
    """The plan in a run and held on the model, against the hand-written pass under the edits; it must do something."""
    expected, _ = oracle.forward(model.module, x.ids, x.mask, edits)
    base, _ = oracle.forward(model.module, x.ids, x.mask)
    assert float((expected - base)[x.mask].detach().abs().max()) > 1e-3
    made = plan(x) if callable(plan) else plan
    ran = model.run(x, made)
    torch.testing.assert_close(ran.logits[x.mask], expected[x.mask], **EXACT)
    assert all(entry.status == "fired" for entry in ran.audit)
    with torch.no_grad(), model.apply(plan) as audit:
        for _ in range(2):
            torch.testing.assert_close(call(model, x)[x.mask], expected[x.mask], **EXACT)
    assert [entry.calls for entry in audit] == [2] * len(audit) and len(audit) == len(ip.Plan() + made)
    torch.testing.assert_close(call(model, x)[x.mask], base[x.mask], **EXACT)


def columns(x: ip.Inputs, row: int) -> list[int]:
    """The columns of a row's tokens, in order."""
    return x.mask[row].nonzero().flatten().tolist()


def pattern_edit(x: ip.Inputs, rows: Callable[[int, int], dict[int, float] | None], head: int = HEAD):
    """An edit of a pattern: `rows(row, query position)` is the weight of each key position, or None to leave it."""

    def edit(pattern: Tensor) -> Tensor:
        new = pattern.clone()
        for b in range(len(x)):
            place = columns(x, b)
            for t, column in enumerate(place):
                weights = rows(b, t)
                if weights is not None:
                    new[b, head, column] = 0.0
                    for key, weight in weights.items():
                        new[b, head, column, place[key]] = weight
        return new

    return edit


# Patterns


@each_family
@each_padding
@pytest.mark.parametrize("offset", [1, 2])
def test_previous_token(family, padding, offset):
    model = wrapped(family)
    x = example(model, padding)
    edit = pattern_edit(x, lambda b, t: {t - offset if t >= offset else t: 1.0})
    compare(model, x, tr.previous_token(0, HEAD, offset=offset), {("pattern", 0): edit})


@each_family
@each_padding
def test_previous_token_at_some_queries(family, padding):
    model = wrapped(family)
    x = example(model, padding)
    edit = pattern_edit(x, lambda b, t: {t - 1: 1.0} if t in (1, 3) else None)
    compare(model, x, tr.previous_token(0, HEAD, pos=(1, 3)), {("pattern", 0): edit})


@each_family
@each_padding
@pytest.mark.parametrize("sharpness", [1.0, 0.7, 0.0])
def test_match(family, padding, sharpness):
    model = wrapped(family)
    x = example(model, padding)
    query, right, wrong = x.lengths - 1, torch.tensor([1, 3]), torch.tensor([3, 1])
    plan = tr.match_pattern(1, HEAD, query, right, wrong, sharpness=sharpness)

    def rows(b: int, t: int) -> dict[int, float] | None:
        if t != len(columns(x, b)) - 1:
            return None
        return {int(right[b]): sharpness, int(wrong[b]): 1 - sharpness}

    compare(model, x, plan, {("pattern", 1): pattern_edit(x, rows)})


def test_match_of_several_keys_and_a_sharpness_for_each_row():
    model = wrapped("llama")
    x = example(model)
    s = torch.tensor([0.25, 0.75])
    plan = tr.match_pattern(1, HEAD, 5, torch.tensor([[0, 2], [1, 4]]), 3, sharpness=s)

    def rows(b: int, t: int) -> dict[int, float] | None:
        right = [[0, 2], [1, 4]][b]
        return {right[0]: float(s[b]) / 2, right[1]: float(s[b]) / 2, 3: 1 - float(s[b])} if t == 5 else None

    compare(model, x, plan, {("pattern", 1): pattern_edit(x, rows)})


def occurrences(ids: list[int], t: int) -> list[int]:
    return [s for s in range(1, t + 1) if ids[s - 1] == ids[t] and s - 1 < t]


@each_family
@each_padding
@pytest.mark.parametrize("sharpness", [1.0, 0.6])
def test_induction(family, padding, sharpness):
    model = wrapped(family)
    ids, mask = zoo.random_inputs(4, [7, 6], "left" if padding == "left" else "right", 3)
    x = model.inputs(ids, mask if padding != "none" else None)
    found = [occurrences([int(x.ids[b, c]) for c in columns(x, b)], t) for b in range(2) for t in range(6)]
    assert any(found) and not all(found)

    def rows(b: int, t: int) -> dict[int, float] | None:
        right = occurrences([int(x.ids[b, c]) for c in columns(x, b)], t)
        wrong = [s for s in range(t + 1) if s not in right]
        if not right:
            return None
        s = sharpness if wrong else 1.0
        return {k: s / len(right) for k in right} | {k: (1 - s) / len(wrong) for k in wrong}

    plan = lambda inputs: tr.induction_pattern(1, HEAD, inputs, sharpness=sharpness)  # noqa: E731
    compare(model, x, plan, {("pattern", 1): pattern_edit(x, rows)})


def test_a_part_of_a_given_pattern():
    """Restricted to some keys, a query is still given its row or not as a whole."""
    model = wrapped("gpt2")
    x = example(model)
    plan = tr.match_pattern(0, HEAD, 5, 1).at(key_pos=(0, 1))

    def edit(pattern: Tensor) -> Tensor:
        new = pattern.clone()
        new[:, HEAD, 5, 0], new[:, HEAD, 5, 1] = 0.0, 1.0
        return new

    compare(model, x, plan, {("pattern", 0): edit})


# Scores


@each_family
@each_padding
def test_forbidden_attention(family, padding):
    model = wrapped(family)
    x = example(model, padding)

    def edit(scores: Tensor) -> Tensor:
        new = scores.clone()
        for b in range(len(x)):
            place = columns(x, b)
            for t in (1, 3):
                new[b, HEAD, place[t], place[t - 1]] = -torch.inf
        return new

    compare(model, x, tr.forbid_previous(0, HEAD, pos=(1, 3)), {("scores", 0): edit})


def test_forbidding_what_is_all_there_is():
    """A query left without a key has a zero pattern, and gradients are numbers."""
    model = wrapped("gpt2")
    x = example(model)
    plan = tr.forbid_previous(0, HEAD, offset=0) + tr.forbid_previous(0, HEAD, offset=1)
    run = model.run(x, plan, capture=ip.site("pattern", 0, head=HEAD), grad=True)
    pattern = run.tape[ip.site("pattern", 0, head=HEAD)][:, 0].detach()
    assert float(pattern[:, :2].max()) == 0.0 and float(pattern[:, 2:].sum(-1).min()) == pytest.approx(1)
    gradients = torch.autograd.grad(run.logits.logsumexp(-1).sum(), list(model.module.parameters()))
    assert all(bool(g.isfinite().all()) for g in gradients)


@each_family
@each_padding
@pytest.mark.parametrize("t", [0.5, 3.0])
def test_temperature(family, padding, t):
    model = wrapped(family)
    x = example(model, padding)

    def edit(scores: Tensor) -> Tensor:
        new = scores.clone()
        new[:, HEAD] = scores[:, HEAD] / t
        return new

    compare(model, x, tr.temperature(1, HEAD, t), {("scores", 1): edit})


# Ablations


@each_family
@pytest.mark.parametrize("at", ["z", "v"])
def test_ablation(family, at):
    model = wrapped(family)
    x = example(model)

    def edit(value: Tensor) -> Tensor:
        new = value.clone()
        new[:, :, 1] = 0.0
        return new

    compare(model, x, tr.ablate_heads(0, 1, at=at), {(at, 0): edit})


@each_family
def test_all_but_one(family):
    model = wrapped(family)
    x = example(model)

    def edit(z: Tensor) -> Tensor:
        new = torch.zeros_like(z)
        new[:, :, HEAD] = z[:, :, HEAD]
        return new

    compare(model, x, tr.all_but(model, 0, HEAD), {("z", 0): edit})
    assert len(tr.all_but(model, 0, range(4))) == 0


@each_family
def test_all_but_heads_that_are_counted_from_the_end(family):
    """Head -1 is the last: it is kept, alone and beside others."""
    model = wrapped(family)
    x = example(model)
    for keep, named in ((-1, 3), ((-1, 0), (3, 0)), ([-4, 3], [0, 3])):
        counted, plain = (model.run(x, tr.all_but(model, 0, heads)).logits for heads in (keep, named))
        torch.testing.assert_close(counted, plain, rtol=0, atol=0)
        assert float((plain - model.run(x).logits).abs().max()) > 1e-3
    (item,) = tr.all_but(model, 0, -1)
    assert item.site.head == (0, 1, 2)
    assert len(tr.all_but(model, 0, (0, 1, -2, -1))) == 0


@each_family
@each_padding
@pytest.mark.parametrize(("what", "name"), [("pattern", "pattern"), ("value", "v"), ("query", "q"), ("key", "k")])
def test_preserving(family, padding, what, name):
    """The definition: a first pass without the ablation, whose patterns (values, ...) the second is given."""
    model = wrapped(family)
    x = example(model, padding)

    def ablate(z: Tensor) -> Tensor:
        new = z.clone()
        new[:, :, HEAD] = 0.0
        return new

    _, first = oracle.forward(model.module, x.ids, x.mask)
    kept = {("z", 0): ablate, (name, 1): lambda _: first[name, 1]}
    plan = tr.preserving(what, tr.ablate_heads(0, HEAD), 1)
    compare(model, x, plan, kept)
    plain, _ = oracle.forward(model.module, x.ids, x.mask, {("z", 0): ablate})
    preserved, _ = oracle.forward(model.module, x.ids, x.mask, kept)
    assert float((plain - preserved)[x.mask].detach().abs().max()) > 1e-3


@each_family
def test_preserving_under_other_plans(family):
    """Both worlds have the plans that are in force besides."""
    model = wrapped(family)
    x = example(model)
    previous = pattern_edit(x, lambda b, t: {max(t - 1, 0): 1.0}, head=1)

    def ablate(z: Tensor) -> Tensor:
        new = z.clone()
        new[:, :, HEAD] = 0.0
        return new

    _, first = oracle.forward(model.module, x.ids, x.mask, {("pattern", 0): previous})
    edits = {("pattern", 0): previous, ("z", 0): ablate, ("pattern", 1): lambda _: first["pattern", 1]}
    base = tr.previous_token(0, 1)
    plan = tr.preserving("pattern", tr.ablate_heads(0, HEAD), 1, base=base)
    compare(model, x, plan, edits)
    _, bare = oracle.forward(model.module, x.ids, x.mask)
    assert float((bare["pattern", 1] - first["pattern", 1]).abs().max()) > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "small_attn_only"])
@pytest.mark.parametrize("stop", [True, False])
def test_gradients_through_both_worlds_or_one(family, stop):
    model = ip.wrap(zoo.make(family))
    x = example(model)
    parameters = list(model.module.parameters())
    plan = tr.preserving("pattern", tr.ablate_heads(0, HEAD), 1, stop_gradient=stop)

    def ablated(z: Tensor) -> Tensor:
        mask = torch.ones(z.shape[2]).double()
        mask[HEAD] = 0.0
        return z * mask[:, None]

    _, first = oracle.forward(model.module, x.ids, x.mask)
    kept = first["pattern", 1].detach() if stop else first["pattern", 1]
    logits, _ = oracle.forward(model.module, x.ids, x.mask, {("z", 0): ablated, ("pattern", 1): lambda _: kept})
    expected = torch.autograd.grad(logits.logsumexp(-1).sum(), parameters, allow_unused=True)

    def held() -> Tensor:
        with model.apply(plan):
            return call(model, x)

    for way in (lambda: model.run(x, plan, grad=True).logits, held):
        got = torch.autograd.grad(way().logsumexp(-1).sum(), parameters, allow_unused=True)
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(
                torch.zeros(1).double() if g is None else g,
                torch.zeros(1).double() if e is None else e,
                rtol=1e-9,
                atol=1e-9,
            )
    # The two ways differ: the first layer's queries reach the second's patterns in the world that is read alone.
    other, _ = oracle.forward(
        model.module,
        x.ids,
        x.mask,
        {("z", 0): ablated, ("pattern", 1): lambda _: first["pattern", 1] if stop else first["pattern", 1].detach()},
    )
    different = torch.autograd.grad(other.logsumexp(-1).sum(), parameters, allow_unused=True)
    gaps = [(a - b).abs().max() for a, b in zip(expected, different, strict=True) if a is not None and b is not None]
    assert max(map(float, gaps)) > 1e-6


# Copies


@each_family
@each_padding
def test_copy_to_logits(family, padding):
    model = wrapped(family)
    x = example(model, padding)
    query, keys = x.lengths - 1, torch.tensor([[1, 3], [3, 2]])
    tokens = torch.tensor([[7, 11], [11, 8]])
    plan = tr.copy_to_logits(1, HEAD, query, keys, tokens)
    _, cache = oracle.forward(model.module, x.ids, x.mask)

    def edit(logits: Tensor) -> Tensor:
        new = logits.clone()
        for b in range(len(x)):
            place = columns(x, b)
            new[b, place[-1]] = -1e9
            for key, token in zip(keys[b].tolist(), tokens[b].tolist(), strict=True):
                new[b, place[-1], token] = cache["scores", 1][b, HEAD, place[-1], place[key]]
        return new

    compare(model, x, plan, {("logits", None): edit})


def test_gradients_flow_through_copied_scores():
    model = ip.wrap(zoo.make("small_attn_only"))
    x = example(model)
    plan = tr.copy_to_logits(1, HEAD, 5, [1, 3], [7, 11])
    logits = model.run(x, plan, grad=True).logits[:, 5]
    q, v = (getattr(model.module.blocks[1].attn, f"{n}_proj").weight for n in "qv")
    to_q, to_v = torch.autograd.grad(logits[:, [7, 11]].log_softmax(-1)[:, 0].sum(), (q, v), allow_unused=True)
    assert float(to_q.abs().max()) > 1e-6
    assert to_v is None or float(to_v.abs().max()) == 0.0


@each_family
def test_attention_from_other_positions(family):
    """Patterns of layer 1 from the residual of other positions, values from the plain embeddings."""
    model = wrapped(family)
    x = example(model)
    source = (0, 0, 1, 2, 4, 5)
    plan = tr.attention_from(1, source) + tr.attention_from(1, range(6), parts=("v",))
    _, cache = oracle.forward(model.module, x.ids, x.mask)
    first = cache["resid_pre", 0]
    moved = first[:, list(source)]

    def heads(value: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda old: value[:, :, None].expand_as(old)

    edits = {("q_input", 1): heads(moved), ("k_input", 1): heads(moved), ("v_input", 1): heads(first)}
    compare(model, x, plan, edits)


@each_family
def test_a_residual_stream_that_the_first_layer_does_not_reach(family):
    """Patterns of layer 1 from one token to the left, and all else, the output too, from the plain embeddings."""
    model = wrapped(family)
    x = example(model)
    source = (0, 0, 1, 2, 3, 5)
    plan = ip.Plan() + tr.residual_from(1, range(6)) + tr.attention_from(1, source)
    _, cache = oracle.forward(model.module, x.ids, x.mask)
    first = cache["resid_pre", 0]

    def heads(old: Tensor) -> Tensor:
        return first[:, list(source), None].expand_as(old)

    edits = {("resid_pre", 1): lambda old: first, ("q_input", 1): heads, ("k_input", 1): heads}
    compare(model, x, plan, edits)
    assert not torch.equal(model.run(x, plan).logits, model.run(x, tr.attention_from(1, source)).logits)


# Grafts


@each_family
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_graft(family, layer):
    model, donor = ip.wrap(zoo.make(family, 0)), ip.wrap(zoo.make(family, 1))
    x = example(model)
    before = {name: w.clone() for name, w in model.module.state_dict().items()}
    _, lower = oracle.forward(donor.module, x.ids, x.mask)
    place = ("resid_pre", layer) if layer < model.n_layers else ("resid_post", layer - 1)
    expected, _ = oracle.forward(model.module, x.ids, x.mask, {place: lambda _: lower[place]})
    with tr.graft(model, donor, upto=layer) as names:
        torch.testing.assert_close(call(model, x), expected, **EXACT)
    assert all(name in before for name in names)
    _, own = oracle.forward(model.module, x.ids, x.mask)
    expected, _ = oracle.forward(donor.module, x.ids, x.mask, {place: lambda _: own[place]})
    with tr.graft(model, donor.module.state_dict(), start=layer):
        torch.testing.assert_close(call(model, x), expected, **EXACT)
    assert float((expected - call(model, x)).abs().max()) > 1e-3
    after = model.module.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def test_a_grafted_layer_is_not_trained():
    model, donor = ip.wrap(zoo.make("gpt2", 0)), ip.wrap(zoo.make("gpt2", 1))
    x = example(model)
    own = {name: w.detach().clone() for name, w in model.module.named_parameters()}
    given = {name: w.detach().clone() for name, w in donor.module.named_parameters()}
    optimizer = torch.optim.Adam(model.module.parameters(), lr=0.1)
    with pytest.raises(KeyboardInterrupt), tr.graft(model, donor, upto=1):  # noqa: PT012
        call(model, x).logsumexp(-1).sum().backward()
        optimizer.step()
        raise KeyboardInterrupt
    changed = {name for name, w in model.module.named_parameters() if not torch.equal(w, own[name])}
    assert changed and not any(name.startswith(("transformer.h.0", "transformer.wpe")) for name in changed)
    assert any(name.startswith("transformer.h.1") for name in changed)
    assert all(torch.equal(w, given[name]) for name, w in donor.module.named_parameters())


@each_family
def test_graft_of_activations(family):
    model, donor = wrapped(family), ip.wrap(zoo.make(family, 1))
    x = example(model, "left")
    _, lower = oracle.forward(donor.module, x.ids, x.mask)
    expected, _ = oracle.forward(model.module, x.ids, x.mask, {("resid_pre", 1): lambda _: lower["resid_pre", 1]})
    with torch.no_grad(), model.apply(tr.graft_residual(1, donor)):
        torch.testing.assert_close(call(model, x)[x.mask], expected[x.mask], **EXACT)


# Gradients


def plans(model: ip.Model) -> dict[str, ip.Plan]:
    return {
        "previous_token": ip.Plan() + tr.previous_token(0, 1),
        "match": ip.Plan() + tr.match_pattern(1, HEAD, 5, 1, 3, sharpness=0.8),
        "half": (ip.Plan() + tr.previous_token(0, 1)).strength(0.5),
        "forbid": ip.Plan() + tr.forbid_previous(0, 1),
        "temperature": ip.Plan() + tr.temperature(1, HEAD, 2.0),
        "ablate": tr.all_but(model, 1, HEAD),
        "preserving": tr.preserving("pattern", tr.ablate_heads(0, HEAD), 1, stop_gradient=False),
        "values": tr.preserving("value", tr.ablate_heads(0, HEAD), 1, stop_gradient=False),
        "copy": ip.Plan() + tr.copy_to_logits(1, HEAD, 5, [1, 3], [7, 11]),
        "layer 1": ip.Plan() + tr.residual_from(1, range(5)) + tr.attention_from(1, (0, 0, 1, 2, 4)),
        "all": tr.all_but(model, 1, HEAD) + tr.previous_token(0, 1) + tr.copy_to_logits(1, HEAD, 5, [1, 3], [7, 11]),
    }


@pytest.mark.parametrize("family", ["small_attn_only", "llama"])
@pytest.mark.parametrize("name", list(plans(wrapped("llama"))))
def test_gradients_against_finite_differences(family, name):
    """The derivative of a training loss under a plan along random directions in weight space."""
    model = ip.wrap(zoo.make(family))
    x, plan = example(model), plans(model)[name]
    parameters = list(model.module.parameters())

    def loss() -> Tensor:
        with model.apply(plan):
            out = call(model, x)
        return torch.nn.functional.cross_entropy(out[:, 5, [7, 11, 8]], torch.tensor([0, 1]))

    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    generator = torch.Generator().manual_seed(3)
    biggest = 0.0
    for _ in range(3):
        directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True) if g is not None)
        ends = []
        for h in (1e-6, -1e-6):
            with torch.no_grad():
                for p, d in zip(parameters, directions, strict=True):
                    p.add_(d, alpha=h)
                ends.append(float(loss()))
                for p, d in zip(parameters, directions, strict=True):
                    p.sub_(d, alpha=h)
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(slope, rel=1e-4, abs=1e-6)
        biggest = max(biggest, abs(slope))
    assert biggest > 1e-3


# Refusals


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda m: tr.match_pattern(0, 0, 2, 3), ShapeError, "after its query"),
        (lambda m: tr.match_pattern(0, 0, 3, 1, sharpness=0.5), ShapeError, "wrong"),
        (lambda m: tr.match_pattern(0, 0, 3, 1, 1, sharpness=0.5), ShapeError, "twice"),
        (lambda m: tr.match_pattern(0, 0, 3, 1, 2, sharpness=1.5), ShapeError, "0 to 1"),
        (lambda m: tr.match_pattern(0, 0, -1, 1), ShapeError, "lengths - 1"),
        (lambda m: tr.match_pattern(0, 0, torch.tensor([3, 3]), torch.tensor([1, 1, 1])), ShapeError, "rows"),
        (lambda m: tr.match_pattern(0, 0, 3.5, 1), ShapeError, "int"),
        (lambda m: tr.previous_token(0, 0, offset=0), ShapeError, "offset"),
        (lambda m: tr.temperature(0, 0, 0.0), ShapeError, "positive"),
        (lambda m: tr.temperature(0, 0, torch.tensor([1.0, 0.0])), ShapeError, "positive"),
        (lambda m: tr.temperature(0, 0, "hot"), ShapeError, "positive"),
        (lambda m: tr.preserving("pattern", ip.Plan(), 1), PlanError, "empty"),
        (lambda m: tr.attention_from(1, (0, 0), parts=()), PlanError, "one or more"),
        (lambda m: tr.attention_from(1, (0, 0.5)), ShapeError, "2 positions"),
        (lambda m: tr.induction_pattern(0, 0, torch.ones(1, 3)), InputsError, "not Tensor"),
        (lambda m: tr.ablate_heads(0, 0, at="q"), SiteError, "'z' or 'v'"),
        (lambda m: tr.all_but(m, 0, 9), SiteError, "no head 9"),
        (lambda m: tr.preserving("patern", tr.ablate_heads(0, 0), 1), PlanError, "'pattern'"),
        (lambda m: tr.preserving("pattern", tr.ablate_heads(1, 0), 1), PlanError, "layer 1"),
        (lambda m: tr.copy_to_logits(1, 0, 5, [1, 2], [3]), ShapeError, "one for each"),
        (lambda m: tr.copy_to_logits(1, 0, 5, [1, 2], [3, 3]), ShapeError, "twice"),
        (lambda m: tr.copy_to_logits(1, 0, 1, [1, 2], [3, 4]), ShapeError, "before"),
        (lambda m: tr.attention_from(1, (0, 5)), ShapeError, "2 positions"),
        (lambda m: tr.attention_from(1, (0, 1), parts=("z",)), PlanError, "q, k and v"),
        (
            lambda m: m.run(example(m), tr.attention_from(0, (0, 0), residual="blocks.1.hook_resid_pre")),
            CycleError,
            "not computed before",
        ),
        (lambda m: m.run(example(m), tr.match_pattern(0, 0, [3, 3, 3], 1)), ShapeError, "3 rows"),
        (lambda m: m.run(example(m), tr.copy_to_logits(1, 0, 5, [[1]] * 3, [[2]] * 3)), ShapeError, "rows|row"),
    ],
)
def test_what_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        make(wrapped("small_attn_only"))


def test_grafts_that_are_refused():
    model, wider = wrapped("gpt2"), wrapped("small_attn_only")
    weights = {k: v for k, v in model.module.state_dict().items() if k != "transformer.h.0.ln_1.weight"}
    for donor, words, kw in [
        (weights, "no 'transformer.h.0.ln_1.weight'", {"upto": 1}),
        (wider, "no 'transformer", {"upto": 1}),
        (model, "either", {}),
        (model, "either", {"upto": 1, "start": 1}),
        (model, "0 to 2", {"upto": 3}),
        (model, "0 to 2", {"upto": True}),
        (5, "not a int", {"upto": 1}),
        ({k: v.float() for k, v in model.module.state_dict().items()}, "float32", {"start": 1}),
    ]:
        with pytest.raises(ip.InterpError, match=words), tr.graft(model, donor, **kw):
            pass
