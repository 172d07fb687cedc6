"""Measures of heads against loops, on models whose heads are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import interp as ip
from hooks.errors import MetricError, SiteError
from interp import training as tr
from interp.models import Transformer, TransformerConfig
from tests import oracle, zoo

EXACT = {"rtol": 0.0, "atol": 1e-10}
FAMILIES = ["gpt2", "llama", "gemma2", "neox", "small_rms_rotary_gqa"]

each_family = pytest.mark.parametrize("family", FAMILIES)


def example(model: ip.Model) -> ip.Inputs:
    return model.inputs(*zoo.random_inputs(6, [7, 5], "left", 3))


def tokens(x: ip.Inputs, row: int) -> tuple[list[int], list[int]]:
    """The ids and the columns of a row."""
    columns = x.mask[row].nonzero().flatten().tolist()
    return [int(x.ids[row, c]) for c in columns], columns


@each_family
def test_strengths_are_means_of_attention(family):
    model = ip.wrap(zoo.make(family))
    x = example(model)
    _, cache = oracle.forward(model.module, x.ids, x.mask)
    pairs, found, queries = {"previous": [], "prefix": []}, {}, {"previous": set(), "prefix": set()}
    for b in range(2):
        ids, at = tokens(x, b)
        for t in range(len(ids)):
            for s in range(t + 1):
                if s == t - 1:
                    pairs["previous"].append((b, at[t], at[s]))
                    queries["previous"].add((b, t))
                if s >= 1 and ids[s - 1] == ids[t]:
                    pairs["prefix"].append((b, at[t], at[s]))
                    queries["prefix"].add((b, t))
    for name, listed in pairs.items():
        layers = [sum(cache["pattern", n][b, :, q, k] for b, q, k in listed) for n in range(model.n_layers)]
        found[name] = torch.stack(layers) / len(queries[name])
    torch.testing.assert_close(tr.previous_token_strength(model, x), found["previous"].detach(), **EXACT)
    torch.testing.assert_close(tr.prefix_matching(model, x), found["prefix"].detach(), **EXACT)
    assert float(found["prefix"].detach().std()) > 1e-3


@each_family
def test_induction_strength(family):
    model = ip.wrap(zoo.make(family))
    x = example(model)
    query, right, wrong = x.lengths - 1, torch.tensor([2, 3]), torch.tensor([[1, 4], [1, 2]])
    _, cache = oracle.forward(model.module, x.ids, x.mask)
    expected = torch.zeros(4).double()
    for b in range(2):
        _, at = tokens(x, b)
        row = cache["pattern", 1][b, :, at[-1]].detach()
        expected += (row[:, at[int(right[b])]] - sum(row[:, at[k]] for k in wrong[b].tolist())) / 2
    torch.testing.assert_close(tr.induction_strength(model, x, 1, query, right, wrong), expected, **EXACT)
    # In a world where the head does just that, its strength is 1, whatever the others do.
    world = ip.World(x, tr.match_pattern(1, 2, query, right))
    assert float(tr.induction_strength(model, world, 1, query, right, wrong)[2]) == pytest.approx(1.0, abs=1e-12)


@each_family
def test_copying_is_what_a_head_adds_to_the_logit(family):
    """A head's part of the logits: with the final norm's scale held, what is lost when its output is taken away."""
    model = ip.wrap(zoo.make(family))
    x = example(model)
    scores = tr.copying(model, x)
    _, cache = oracle.forward(model.module, x.ids, x.mask)
    spec = oracle.read(model.module)
    total, queries = torch.zeros_like(scores), 0
    for b in range(2):
        ids, at = tokens(x, b)
        for t in range(len(ids)):
            right = [ids[s] for s in range(1, t + 1) if ids[s - 1] == ids[t]]
            if not right:
                continue
            queries += 1
            final = cache["resid_post", model.n_layers - 1][b, at[t]]
            for n, layer in enumerate(spec.layers):
                for h in range(4):
                    out = torch.einsum("d,dm->m", cache["z", n][b, at[t], h], layer.attn.W_O[h])
                    whole = torch.einsum("hd,hdm->m", cache["z", n][b, at[t]], layer.attn.W_O) + layer.attn.b_O
                    if layer.post1 is not None:
                        out = linear_part(layer.post1, whole, out)
                    logits = spec.W_U @ linear_part(spec.norm, final, out)
                    total[n, h] += (logits[right].mean() - logits.mean()).detach()
    torch.testing.assert_close(scores, total / queries, **EXACT)
    assert float(scores.std()) > 1e-3


def linear_part(norm: oracle.Norm, whole: Tensor, part: Tensor) -> Tensor:
    """A part of what a norm reads, through the norm at the scale that the whole has."""
    if norm.centered:
        whole, part = whole - whole.mean(), part - part.mean()
    return part / torch.sqrt((whole * whole).mean() + norm.eps) * norm.weight


def induction_model(vocabulary: int = 12) -> ip.Model:
    """A network without norms whose head 0 of layer 0 looks back by one and head 1 of layer 1 is an induction head.

    Positions are one-hot in the residual; layer 0 writes the token before into a space of its own, where layer 1's keys
    find it, and layer 1 copies the token that stands there into a space that the unembedding reads.
    """
    V, T = vocabulary, 32
    width = 3 * V + T
    module = Transformer(TransformerConfig(V, 2, width, 2, d_head=max(V, T), n_ctx=T, norm="none", bias=False)).double()
    token, before, out, place = slice(0, V), slice(V, 2 * V), slice(2 * V, 3 * V), slice(3 * V, width)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
        module.embed.weight[:, token] = torch.eye(V).double()
        module.pos_embed.weight[:, place] = torch.eye(T).double()
        module.unembed.weight[:, out] = torch.eye(V).double()
        one, two = (block.attn for block in module.blocks)
        D = one.head_dim
        sharp = 50 * D**0.5
        one.q_proj.weight[0 : T - 1, place][:, 1:] = sharp * torch.eye(T - 1).double()
        one.k_proj.weight[0:T, place] = torch.eye(T).double()
        one.v_proj.weight[0:V, token] = torch.eye(V).double()
        one.o_proj.weight[before, 0:V] = torch.eye(V).double()
        two.q_proj.weight[D : D + V, token] = sharp * torch.eye(V).double()
        two.k_proj.weight[D : D + V, before] = torch.eye(V).double()
        two.v_proj.weight[D : D + V, token] = torch.eye(V).double()
        two.o_proj.weight[out, D : D + V] = torch.eye(V).double()
    return ip.wrap(module)


def test_an_induction_head_that_is_known():
    model = induction_model()
    x = tr.repeated_tokens(model, 4, 6, seed=1, first=0)
    previous, prefix, copies = tr.previous_token_strength(model, x), tr.prefix_matching(model, x), tr.copying(model, x)
    assert float(previous[0, 0]) == pytest.approx(1.0, abs=1e-6) and float(previous[1, 1]) < 0.5
    assert float(prefix[1, 1]) == pytest.approx(1.0, abs=1e-6) and float(prefix[0].max()) < 0.3
    assert float(copies[1, 1]) == pytest.approx(1 - 1 / 12, abs=1e-6) and float(copies[0].abs().max()) < 1e-6
    assert tr.under(model, x, ip.accuracy([int(i) for i in x.ids[:, 12]], pos=11), None) == 1.0


def test_heads_alone_and_without():
    model = induction_model()
    x = tr.repeated_tokens(model, 8, 6, seed=2)
    right = ip.accuracy([int(i) for i in x.ids[:, 9]], pos=8)
    assert tr.heads_alone(model, x, 1, right).tolist()[1] == 1.0
    assert tr.heads_alone(model, x, 1, right).tolist()[0] < 1.0
    without = tr.heads_without(model, x, 1, right).tolist()
    assert without[0] == 1.0 and without[1] < 1.0
    # Without the first layer nothing is found, unless the second is told where to look.
    broken = ip.Plan() + tr.ablate_heads(0, None)
    assert tr.heads_alone(model, x, 1, right, plan=broken).tolist()[1] < 1.0
    told = broken + tr.match_pattern(1, 1, 8, 3)
    assert tr.heads_alone(model, x, 1, right, plan=told).tolist()[1] == 1.0


def test_progress_under_a_clamp():
    """The loss of a network without an induction head falls where one is put in by hand."""
    model = induction_model()
    with torch.no_grad():
        model.module.blocks[1].attn.q_proj.weight.zero_()
        model.module.blocks[1].attn.o_proj.weight.mul_(20)
    x = tr.repeated_tokens(model, 8, 6, seed=3)
    given = tr.under(model, x, ip.cross_entropy(), lambda inputs: tr.induction_pattern(1, 1, inputs))
    assert given < tr.under(model, x, ip.cross_entropy(), None) - 1.0
    static = tr.induction_pattern(1, 1, x)
    assert tr.under(model, x, ip.cross_entropy(), static) == pytest.approx(given)
    with model.apply(static):
        assert tr.under(model, x, ip.cross_entropy(), None) == pytest.approx(given)


def test_repeated_tokens():
    model = induction_model()
    x = tr.repeated_tokens(model, 3, 5, seed=0, first=0)
    assert x.ids.shape == (3, 11) and torch.equal(x.ids[:, 1:6], x.ids[:, 6:]) and bool((x.ids[:, 0] == 0).all())
    assert all(len(set(row)) == 5 and 0 not in row for row in x.ids[:, 1:6].tolist())
    assert not torch.equal(x.ids, tr.repeated_tokens(model, 3, 5, seed=1, first=0).ids)
    assert torch.equal(x.ids, tr.repeated_tokens(model, 3, 5, seed=0, first=0).ids)
    assert len(tr.repeated_tokens(model, 1, 11, first=0).ids) == 1
    for length in (0, 12):
        with pytest.raises(MetricError, match="different tokens"):
            tr.repeated_tokens(model, 1, length, first=0)


def test_prompts_with_nothing_to_measure():
    model = induction_model()
    x = model.inputs([[1, 2, 3], [3, 2, 1]])
    for measure in (tr.prefix_matching, tr.copying):
        with pytest.raises(MetricError):
            measure(model, x)
    with pytest.raises(MetricError):
        tr.previous_token_strength(model, model.inputs([[1], [2]]))
    with pytest.raises(SiteError, match=r"layers 0 \.\. 1"):
        tr.heads_alone(model, x, 9, ip.logit(3))
    with pytest.raises(MetricError, match="one query a row"):
        tr.attention(model, x, 0, torch.tensor([[1, 2]]), 0)
    with pytest.raises(MetricError, match="each of 2"):
        tr.attention(model, x, 0, torch.tensor([1, 2, 2]), 0)


# Phase changes


def test_phase_change_by_hand():
    losses = [1.0, 0.9, 0.2, 1.0, 0.3, 0.2, 0.1]
    assert tr.phase_change(losses, 0.5) == 2
    assert tr.phase_change(losses, 0.5, smooth=2) == 5 and tr.phase_change(losses, 0.05) is None
    assert tr.phase_change(losses, 0.4, plateau=(0, 2)) == 2 and tr.phase_change(losses, 0.4, plateau=(0, 3)) == 5
    assert tr.phase_change(losses, 0.5, steps=range(0, 70, 10)) == 20
    assert tr.phase_change([], 0.5) is None and tr.phase_change([math.nan, 0.1], 0.5) == 1


@pytest.mark.parametrize("smooth", [1, 3, 10])
@pytest.mark.parametrize("plateau", [None, (5, 20), (200, 300)])
@pytest.mark.parametrize("every", [1, 7])
def test_online_equals_offline(smooth, plateau, every):
    found = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        fall = torch.sigmoid((torch.arange(80) - 40 - seed) / 3.0)
        losses = (1 - 0.95 * fall + 0.1 * torch.randn(80, generator=generator)).tolist()
        steps = list(range(0, 80 * every, every))
        watch = tr.PhaseChange(0.5, plateau=plateau, smooth=smooth)
        for step, loss in zip(steps, losses, strict=True):
            logged = watch.loss(None, step, loss)
            assert logged == ({"phase_change": step} if watch.step == step else {})
            # In the middle, as if training had been interrupted.
            other = tr.PhaseChange(0.5, plateau=plateau, smooth=smooth)
            other.load_state_dict(watch.state_dict())
            watch = other
        offline = tr.phase_change(losses, 0.5, plateau=plateau, smooth=smooth, steps=steps)
        assert watch.step == offline
        found.append(offline)
    assert plateau == (200, 300) or len({t for t in found if t is not None}) > 3


def test_a_plateau_that_was_not_seen_is_told():
    watch = tr.PhaseChange(0.5, plateau=(10, 20))
    assert watch.loss(None, 0, 1.0) == {}  # type: ignore[arg-type]
    with pytest.raises(MetricError, match="steps 10 to 20"):
        watch.loss(None, 50, 0.1)  # type: ignore[arg-type]
    assert tr.phase_change([1.0], 0.5, plateau=(10, 20)) is None


def test_phase_times():
    times = tr.phase_times([100, 200, 300, 400, 500], 1000)
    assert times.median == 300 and 100 <= times.low < 300 < times.high <= 500
    assert (times.changed, times.censored) == (5, 0) and "never" not in str(times)
    some = tr.phase_times([100, 200, 300, None, None], 1000)
    assert some.median == 300 and some.high == math.inf and some.censored == 2
    assert "2 of 5 runs never changed" in str(some) and "more than 1000" in str(some)
    most = tr.phase_times([100, None, math.nan], 1000)
    assert most.median == math.inf and most.changed == 1
    even = tr.phase_times([400, 100, 300, 200], 1000)
    assert even.median == 250 and 100 <= even.low < 250 < even.high <= 400
    assert tr.phase_times([100, 300], 1000).median == 200
    assert tr.phase_times([100, 200, None, None], 1000).median == math.inf
    one = tr.phase_times([7], 10)
    assert (one.low, one.median, one.high) == (7, 7, 7)
    assert tr.phase_times([1, 2, 9], 10, seed=1) == tr.phase_times([1, 2, 9], 10, seed=1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: tr.phase_times([], 10),
        lambda: tr.phase_times([11], 10),
        lambda: tr.phase_times([1], 10, level=1.0),
        lambda: tr.phase_change([1.0], math.nan),
        lambda: tr.phase_change([1.0], 0.5, smooth=0),
        lambda: tr.phase_change([1.0], 0.5, plateau=(3, 3)),
        lambda: tr.phase_change([1.0], 0.5, steps=[1, 2]),
        lambda: tr.phase_change([1.0, 0.1], 0.5, steps=[5, 2]),
        lambda: tr.phase_change([1.0, 0.1], 0.5, steps=[0, 50], plateau=(10, 20)),
        lambda: tr.PhaseChange("low"),  # type: ignore[arg-type]
        lambda: tr.PhaseChange(0.5, smooth=True),
        lambda: tr.PhaseChange(0.5, plateau=3),  # type: ignore[arg-type]
        lambda: tr.PhaseChange(0.5, plateau=(3,)),  # type: ignore[arg-type]
        lambda: tr.PhaseChange(0.5, plateau=(0.5, 2.5)),  # type: ignore[arg-type]
        lambda: tr.phase_times([-1], 10),
        lambda: tr.PhaseChange(0.5, smooth=3).load_state_dict(tr.PhaseChange(0.5, smooth=2).state_dict()),
    ],
)
def test_what_is_refused(make):
    with pytest.raises(MetricError):
        make()
