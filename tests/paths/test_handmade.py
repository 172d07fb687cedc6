"""Networks written by hand, whose paths are known: what is found must be those, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

import interp as ip
from interp import paths
from tests.paths import networks
from tests.paths.networks import INDUCTION, PREVIOUS, START, A, B, C, D, X

# Two linear blocks

UP, DOWN = [[networks.UP]], [[networks.DOWN]]
STEPS = ["a0.h1->logits", "a0.h0->a1.h1<v>", "input->a0.h0<v>"]


def linear() -> tuple[ip.Model, ip.Inputs, ip.Inputs]:
    model = ip.wrap(networks.linear_blocks())
    return model, model.inputs(UP), model.inputs(DOWN)


@pytest.mark.parametrize(("count", "expected"), [(1, [-19, -41]), (2, [-13, -25]), (3, [-9, -13])])
def test_edges_of_two_linear_blocks_patched_one_after_another(count, expected):
    model, clean, corrupt = linear()
    for column, value in enumerate(expected):
        result = paths.path_patch(model, clean, corrupt, STEPS[:count], semantics="set", metric=ip.logit(column))
        assert (result.base[0], result.source[0]) == ((-25, 25) if column == 0 else (-49, 49))
        assert result.base[0] + result.effect[0] == pytest.approx(value, abs=1e-10)


@pytest.mark.parametrize("column", [0, 1])
def test_every_edge_of_two_linear_blocks(column):
    """With weights w of the heads and gains 1 + w0 + w1 of a block, each effect is a product; q and k have none."""
    model, clean, corrupt = linear()
    result = paths.edge_sweep(model, clean, corrupt, metric=ip.logit(column))
    effect = dict(zip(result.axes[0].values, result.effect[:, 0], strict=True))
    w = networks.LINEAR[:, column].double().numpy()
    gain = 1 + w.sum()
    expected = {"input->logits": 2.0}
    for h in (0, 1):
        expected[f"input->a0.h{h}<v>"] = 2 * w[h] * gain
        expected[f"input->a1.h{h}<v>"] = 2 * w[h]
        expected[f"a0.h{h}->logits"] = 2 * w[h]
        expected[f"a1.h{h}->logits"] = 2 * gain * w[h]
        for g in (0, 1):
            expected[f"a0.h{h}->a1.h{g}<v>"] = 2 * w[h] * w[g]
    assert len(effect) == 5 + 6 * (1 + 3)
    for name, value in effect.items():
        if name in expected:
            assert value == pytest.approx(expected.pop(name), abs=1e-10), name
        else:
            assert name.endswith(("<q>", "<k>")) and value == 0.0, name
    assert not expected


def test_paths_of_two_linear_blocks():
    """A path's effect is the product of what its heads multiply by, and all paths together are the total."""
    model, clean, corrupt = linear()
    nodes = [[None, 0, 1], [None, 0, 1]]
    total = 0.0
    for first in nodes[0]:
        for second in nodes[1]:
            heads = [(layer, h) for layer, h in enumerate((first, second)) if h is not None]
            path = "->".join(["input", *(f"a{layer}.h{h}<v>" for layer, h in heads), "logits"])
            result = paths.path_patch(model, clean, corrupt, path, semantics="frozen", metric=ip.logit(1))
            expected = 2 * np.prod([float(networks.LINEAR[h, 1]) for _, h in heads])
            assert result.effect[0] == pytest.approx(expected, abs=1e-10)
            total += result.effect[0]
    assert total == pytest.approx(98, abs=1e-10)


# Induction

CLEAN = [START, A, B, D, C, A]  # continues with B, which followed A
INPUT_TO_PREVIOUS = f"input->{PREVIOUS}<v>"
COMPOSITION = f"{PREVIOUS}->{INDUCTION}<k>"
OUTPUT = f"{INDUCTION}->logits"
QUERY, VALUE = f"input->{INDUCTION}<q>", f"input->{INDUCTION}<v>"
POSITIONS = [f"input->{PREVIOUS}<q>", f"input->{PREVIOUS}<k>"]

# What is changed in the prompt decides which edges have anything to carry. The metric is the logit of B minus C's.
PAIRS = {
    # Another token stands before B: the previous-token head copies it, the induction head's keys hold it, and no key
    # answers the A at the end, which then attends evenly. What the induction head would copy from there (its values at
    # that place, A or X) is neither B nor C, and the token at the end is the same: nothing goes by q or v.
    "the first A": ([START, X, B, D, C, A], [INPUT_TO_PREVIOUS, COMPOSITION, OUTPUT]),
    # Another token asks: the keys are the same wherever the last position may look, so it goes by q alone. D asks for
    # C. As a key the last position holds the token before it, the same in both.
    "the last A": ([START, A, B, D, C, D], [QUERY, OUTPUT]),
    # Another token follows A, and B follows D: keys that answer A are where they were, and what is found there is C.
    # What the previous-token head copies differs at the places after B and C, for which nobody asks.
    "what followed A": ([START, A, C, D, B, A], [VALUE, OUTPUT]),
}


@pytest.mark.parametrize("changed", PAIRS)
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_the_sweep_finds_the_induction_circuit_and_nothing_else(changed, direction):
    model = ip.wrap(networks.induction())
    corrupt, intended = PAIRS[changed]
    result = paths.edge_sweep(
        model, model.inputs([CLEAN]), model.inputs([corrupt]), metric=ip.logit_diff(B, C), direction=direction
    )
    total = float((result.source - result.base)[0])
    assert abs(total) >= 9.9
    share = dict(zip(result.axes[0].values, result.effect[:, 0] / total, strict=True))
    assert sorted(name for name, value in share.items() if abs(value) > 0.01) == sorted(intended)
    assert [share[name] for name in intended] == pytest.approx([1.0] * len(intended), abs=1e-6)
    assert max(abs(value) for name, value in share.items() if name not in intended) < 1e-6


def test_cutting_each_edge_finds_the_whole_induction_circuit():
    """No pair of prompts differs in its positions, so what they carry shows only where an edge is cut to zero."""
    model = ip.wrap(networks.induction())
    result = paths.edge_sweep(model, model.inputs([CLEAN]), None, metric=ip.logit_diff(B, C), values="zero")
    share = dict(zip(result.axes[0].values, -result.effect[:, 0] / result.base[0], strict=True))
    intended = [INPUT_TO_PREVIOUS, *POSITIONS, COMPOSITION, QUERY, VALUE, OUTPUT]
    assert sorted(name for name, value in share.items() if abs(value) > 0.01) == sorted(intended)
    assert min(share[name] for name in intended) > 0.9


@pytest.mark.parametrize("semantics", ["frozen", "set"])
def test_the_path_of_the_induction_circuit_is_all_of_it(semantics):
    """Alone it makes all of the difference, and without its middle edge nothing."""
    model = ip.wrap(networks.induction())
    clean, corrupt = model.inputs([CLEAN]), model.inputs([PAIRS["the first A"][0]])
    metric = ip.logit_diff(B, C)
    if semantics == "set":
        through, beside = (PREVIOUS, [f"{INDUCTION}<k>"]), (PREVIOUS, [f"{INDUCTION}<q>", f"{INDUCTION}<v>", "logits"])
    else:
        through = f"input->{PREVIOUS}<v>->{INDUCTION}<k>->logits"
        beside = f"input->{PREVIOUS}<v>->{INDUCTION}<q>->logits"
    effects = []
    for what in (through, beside):
        result = paths.path_patch(model, clean, corrupt, what, semantics=semantics, metric=metric)
        effects.append(float(result.effect[0] / (result.source - result.base)[0]))
    assert effects == pytest.approx([1.0, 0.0], abs=1e-6)


def test_the_induction_circuit_by_position():
    """The edge between the heads is at B, where the key is; the query and the prediction are at the end."""
    model = ip.wrap(networks.induction())
    corrupt, intended = PAIRS["the first A"]
    graph = paths.Graph.of(model, positions={"first": 1, "second": 2, "end": -1})
    result = paths.edge_sweep(
        model, model.inputs([CLEAN]), model.inputs([corrupt]), metric=ip.logit_diff(B, C), graph=graph
    )
    share = dict(zip(result.axes[0].values, result.effect[:, 0] / (result.source - result.base)[0], strict=True))
    places = {intended[0]: "first", intended[1]: "second", intended[2]: "end"}
    found = {name for name, value in share.items() if abs(value) > 0.01}
    assert found == {f"{edge}@{place}" for edge, place in places.items()}


# Two heads

OFF, ON = [[networks.OFF]], [[networks.ON]]
HEADS = ["a0.h0", "a0.h1"]


def measured(model: ip.Model, what: list[str], direction: str) -> float:
    """The effect of a set of edges between the prompt that is on and the one that is off."""
    result = paths.path_patch(
        model,
        model.inputs(ON),
        model.inputs(OFF),
        what,
        semantics="set",
        metric=ip.logit(networks.WANTED),
        direction=direction,
    )
    return float(result.effect[0])


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_heads_that_cancel(direction):
    """The total is zero and so is the pair's effect, but no sum of absolute values hides either head."""
    model = ip.wrap(networks.two_heads(-1.0, None))
    sign = 1 if direction == "denoising" else -1
    for stage in ([f"{head}->logits" for head in HEADS], [f"input->{head}<v>" for head in HEADS]):
        assert [measured(model, [edge], direction) for edge in stage] == pytest.approx([sign, -sign], abs=1e-12)
        assert measured(model, stage, direction) == pytest.approx(0, abs=1e-12)


def test_heads_of_which_either_is_enough():
    """An OR: cutting one changes nothing, cutting both everything; restoring one restores everything."""
    model = ip.wrap(networks.two_heads(1.0, 2))
    for stage in ([f"{head}->m0" for head in HEADS], [f"input->{head}<v>" for head in HEADS]):
        assert [measured(model, [edge], "noising") for edge in stage] == pytest.approx([0, 0], abs=1e-12)
        assert measured(model, stage, "noising") == pytest.approx(-1, abs=1e-12)
        assert [measured(model, [edge], "denoising") for edge in stage] == pytest.approx([1, 1], abs=1e-12)
        assert measured(model, stage, "denoising") == pytest.approx(1, abs=1e-12)


def test_a_sweep_of_an_or_finds_neither_head_alone():
    model = ip.wrap(networks.two_heads(1.0, 2))
    result = paths.edge_sweep(
        model, model.inputs(ON), model.inputs(OFF), metric=ip.logit(networks.WANTED), direction="noising"
    )
    found = {name for name, value in zip(result.axes[0].values, result.effect[:, 0], strict=True) if abs(value) > 1e-12}
    assert found == {"m0->logits"}
