"""The circuit of two steps: what is asked, what is found, and that what is found is what carries the answer."""

from __future__ import annotations

import numpy as np
import pytest

import interp as ip
from interp.two_steps import LENGTH, SAID_AGAIN, draw, repeated_lists, two_steps, word_for


@pytest.fixture(scope="module")
def model():
    return ip.load("ioi-mini")


@pytest.fixture(scope="module")
def found(model):
    return two_steps(model, pairs=6)


def test_lists_differ_in_the_word_before_the_answer(model):
    lists = repeated_lists(model, 20)
    for clean, corrupt, answer, foil in zip(*(lists[k] for k in ("clean", "corrupt", "answer", "foil")), strict=True):
        a, b = clean.replace(".", "").split(), corrupt.replace(".", "").split()
        assert [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y] == [SAID_AGAIN - 1]
        assert a[LENGTH:] == a[:SAID_AGAIN] and len(set(a[:LENGTH])) == LENGTH and b[SAID_AGAIN - 1] not in a
        assert a[SAID_AGAIN] == answer.strip() and a[SAID_AGAIN + 1] == foil.strip()
    clean, corrupt = model.inputs(lists["clean"]), model.inputs(lists["corrupt"])
    assert clean.lengths.unique().numel() == 1 and (clean.ids != corrupt.ids).sum(1).tolist() == [1] * 20
    assert lists == repeated_lists(model, 20) != repeated_lists(model, 20, seed=1)


def test_the_sender_looks_back_and_its_receivers_match_prefixes(model, found):
    """Found by effects alone, they attend as the names of their kinds say."""
    clean = model.inputs(repeated_lists(model, 6)["clean"])
    before, matching = ip.training.previous_token_strength(model, clean), ip.training.prefix_matching(model, clean)
    layer, head = (int(n) for n in found.sender[1:].split(".h"))
    assert (layer, head) == np.unravel_index(int(before.argmax()), before.shape)
    assert found.to_previous == pytest.approx(float(before[layer, head]), abs=1e-5)
    for name in found.receivers:
        later, other = (int(n) for n in name[1:].split(".h"))
        assert later > layer and float(matching[later, other]) > 0.5
    assert found.right == 1.0 and found.lost > 0.15 and found.others < 0.05


def test_what_is_lost_is_lost_through_the_keys_alone(model, found):
    """The same cut by hand: keys of the receivers computed of a residual that lacks the sender's clean part."""
    lists = repeated_lists(model, 6)
    clean, corrupt = model.inputs(lists["clean"]), model.inputs(lists["corrupt"])
    metric = ip.logit_diff(lists["answer"], lists["foil"])
    layer, head = (int(n) for n in found.sender[1:].split(".h"))
    result = ip.site("result", layer=layer, head=head)
    parts = [model.run(x, capture=result).tape[result] for x in (clean, corrupt)]
    change = (parts[1] - parts[0]).squeeze(2)
    plan = ip.Plan()
    for name in found.receivers:
        later, other = (int(n) for n in name[1:].split(".h"))
        plan = plan + ip.steer(ip.site("k_input", layer=later, head=other), change)
    base, other = (ip.evaluate(model, x, metric).mean() for x in (clean, corrupt))
    cut = ip.evaluate(model, ip.World(clean, plan), metric).mean()
    assert found.lost == pytest.approx(float((base - cut) / (base - other)), abs=1e-4)


def test_words_and_sentences(model, found):
    assert word_for(model, "school") is not None and word_for(model, "Zebedee") is None
    assert found.sender[1:].replace(".h", ".") in found.headline() and "\n" not in found.headline()
    figure = draw(model, found)
    assert len(figure.axes) == 2 and "came before" in figure.axes[0].get_title()


@pytest.mark.real
def test_on_a_real_model(smollm2):
    found = two_steps(smollm2, pairs=4)
    assert found.right == 1.0 and found.lost > 3 * found.others and found.lost > 0.02
    assert int(found.receivers[0][1:].split(".h")[0]) > int(found.sender[1:].split(".h")[0])
