"""Prompts, ids, padding, row ids, and the alignment of two batches."""

from __future__ import annotations

from collections import UserDict
from functools import cache

import numpy as np
import pytest
import torch

import hooks as hk
from hooks import Inputs, Model, World, align, site
from hooks.errors import InputsError
from tests import zoo


class Words:
    """A tokenizer of words: a beginning-of-text token in front, and "un" split off from what follows it."""

    words = ("<s>", "the", "cat", "sat", "on", "mat", "dog", "un", "happy", "done", "a", "b", "c")

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        pieces: list[str] = []
        for word in text.split():
            pieces += ["un", word[2:]] if word.startswith("un") and len(word) > 2 else [word]
        ids = [self.words.index(piece) for piece in pieces]
        return {"input_ids": [0, *ids] if add_special_tokens else ids}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return ["Ġ" + self.words[i] if i else "<s>" for i in ids]


@cache
def model() -> Model:
    return hk.wrap(zoo.make("small_ln_learned"), Words())


@cache
def wordless() -> Model:
    return hk.wrap(zoo.make("small_ln_learned"))


# What may be given


def test_a_text():
    x = model().inputs("the cat sat")
    assert x.ids.tolist() == [[0, 1, 2, 3]]
    assert x.mask.all() and x.mask.dtype == torch.bool
    assert x.tokens == (("<s>", " the", " cat", " sat"),)
    assert len(x) == 1 and x.width == 4 and not x.padded
    assert "1 row of 4 tokens" in repr(x) and "the cat" in repr(x)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_texts_of_several_lengths(padding):
    x = model().inputs(["the cat sat on the mat", "the dog", "unhappy"], padding=padding)
    assert x.lengths.tolist() == [7, 3, 3]
    assert x.padded and x.width == 7
    rows = [row[mask].tolist() for row, mask in zip(x.ids, x.mask, strict=True)]
    assert rows == [[0, 1, 2, 3, 4, 1, 5], [0, 1, 6], [0, 7, 8]]
    assert x.mask[1].tolist() == ([True] * 3 + [False] * 4 if padding == "right" else [False] * 4 + [True] * 3)
    assert x.tokens is not None and x.tokens[2] == ("<s>", " un", " happy")
    assert x.labels(1) == ("<s>", " the", " dog")


@pytest.mark.parametrize("padding", ["right", "left"])
def test_positions_count_real_tokens(padding):
    x = wordless().inputs([[3, 4, 5, 6], [7, 8]], padding=padding)
    assert [row[mask].tolist() for row, mask in zip(x.positions, x.mask, strict=True)] == [[0, 1, 2, 3], [0, 1]]
    columns = x.order
    for row, length in enumerate(x.lengths.tolist()):
        real = columns[row, :length]
        assert x.positions[row, real].tolist() == list(range(length))
        assert x.mask[row, real].all()
        assert sorted(columns[row].tolist()) == list(range(x.width))
    assert int(x.positions.min()) == 0
    assert x.labels(1) == ("7", "8")
    assert "2 rows of 2 to 4 tokens" in repr(x)


def test_a_mask_with_gaps():
    x = wordless().inputs(torch.tensor([[3, 0, 4, 0, 5]]), torch.tensor([[1, 0, 1, 0, 1]]))
    assert x.positions[0, [0, 2, 4]].tolist() == [0, 1, 2]
    assert x.order[0, :3].tolist() == [0, 2, 4]
    run = wordless().run(x, capture=site("embed", pos=(0, 1, -1)))
    expected = wordless().architecture.embed.weight[[3, 4, 5]]
    assert torch.equal(run.tape[site("embed", pos=(0, 1, -1))][0], expected)


def test_ids_in_every_form():
    expected = torch.tensor([[3, 4, 5], [6, 7, 8]])
    for given in (expected, expected.int(), expected.tolist(), np.array(expected), [np.array([3, 4, 5]), (6, 7, 8)]):
        x = wordless().inputs(given)
        assert torch.equal(x.ids, expected) and x.ids.dtype == torch.int64
        assert x.tokens is None
    for row in ([3, 4, 5], np.array([3, 4, 5]), [np.int64(3), np.int64(4), np.int32(5)], range(3, 6)):
        assert wordless().inputs(row).ids.tolist() == [[3, 4, 5]]
    ragged = wordless().inputs([torch.tensor([3, 4]), torch.tensor([5])])
    assert ragged.ids.tolist() == [[3, 4], [5, 0]] and ragged.lengths.tolist() == [2, 1]
    assert model().inputs(np.array(["the cat", "a"])).ids.tolist() == [[0, 1, 2], [0, 10, 0]]
    assert wordless().inputs(torch.tensor([3, 4, 5])).ids.tolist() == [[3, 4, 5]]
    assert Inputs.of(expected).ids.tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.float32])
def test_a_mask_in_every_dtype(dtype):
    ids, mask = zoo.random_inputs(zoo.VOCAB, [4, 2], "left")
    x = wordless().inputs(ids, mask.to(dtype))
    assert torch.equal(x.mask, mask)


def test_row_ids():
    x = wordless().inputs([[3, 4], [5, 6], [7]])
    assert x.row_ids.tolist() == [0, 1, 2]
    assert wordless().inputs([[3, 4], [5, 6]], row_ids=torch.tensor([8, 5])).row_ids.tolist() == [8, 5]
    assert model().inputs(["the cat", "a"], row_ids=torch.tensor([8, 5])).row_ids.tolist() == [8, 5]
    part = x.rows(slice(1, 3))
    assert part.row_ids.tolist() == [1, 2] and part.ids.tolist() == x.ids[1:].tolist()


def test_row_ids_are_what_random_interventions_know_rows_by():
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    one = wordless().inputs(ids, row_ids=torch.tensor([4, 9]))
    two = wordless().inputs(ids.flip(0), row_ids=torch.tensor([9, 4]))
    plan = hk.noise(site("resid_pre", 1), 1.0)
    torch.testing.assert_close(
        wordless().run(one, plan).logits.flip(0), wordless().run(two, plan).logits, rtol=0, atol=1e-10
    )
    other = wordless().run(wordless().inputs(ids), plan).logits
    assert float((wordless().run(one, plan).logits - other).abs().max()) > 1e-3


def test_a_part_keeps_its_tokens():
    x = model().inputs(["the cat sat", "a b"])
    assert x.rows(slice(1, 2)).tokens == (("<s>", " a", " b"),)


def test_inputs_do_not_change_with_the_tensor_they_were_made_of():
    ids, mask, row_ids = torch.tensor([[3, 4, 5]]), torch.tensor([[True, True, True]]), torch.tensor([7])
    x = wordless().inputs(ids, mask, row_ids=row_ids)
    before = wordless().run(x).logits
    ids[0, 1], mask[0, 0], row_ids[0] = 9, False, 8
    assert torch.equal(wordless().run(x).logits, before)
    assert x.lengths.tolist() == [3] and x.row_ids.tolist() == [7]


def test_what_stands_at_padding_does_not_matter():
    """Any token is allowed there; what is none (-100, as collators write) is as harmless, or refused."""
    ids, mask = zoo.random_inputs(zoo.VOCAB, [5, 3], "right")
    expected = wordless().run(wordless().inputs(ids, mask)).logits[mask]
    for fill in (1, zoo.VOCAB - 1, -100):
        try:
            x = wordless().inputs(torch.where(mask, ids, fill), mask)
        except InputsError:
            assert fill == -100
            continue
        torch.testing.assert_close(wordless().run(x).logits[mask], expected, rtol=0, atol=1e-10)


# What may not


def test_empty_prompts():
    for given in ([], [[]], [[3, 4], []], torch.zeros(0, 3, dtype=torch.int64), torch.zeros(2, 0, dtype=torch.int64)):
        with pytest.raises(InputsError):
            wordless().inputs(given)
    with pytest.raises(InputsError, match=r"\[1\]"):
        wordless().inputs([[3, 4], []])
    with pytest.raises(InputsError, match=r"\[0, 2\]"):
        wordless().inputs(torch.tensor([[3], [4], [5]]), torch.tensor([[0], [1], [0]]))
    no_start = hk.wrap(zoo.make("small_ln_learned"), lambda text, **_: {"input_ids": []})
    with pytest.raises(InputsError, match="empty"):
        no_start.inputs("")


@pytest.mark.parametrize("bad", [zoo.VOCAB, -1, 10**6])
def test_ids_outside_the_vocabulary(bad):
    for given in ([[3, bad]], torch.tensor([[3, bad]]), [[3, 4], [bad]]):
        with pytest.raises(InputsError, match=rf"{bad}.*{zoo.VOCAB - 1}"):
            wordless().inputs(given)
    assert wordless().inputs([[zoo.VOCAB - 1, 0]]).ids.max() == zoo.VOCAB - 1


def test_ids_that_are_no_integers_are_not_truncated():
    for given in (
        torch.tensor([[1.7, 2.2]]),
        [[1.7, 2.2]],
        [[1.0, 2.0]],
        np.array([[1.5, 2.5]]),
        torch.tensor([[True, False]]),
        [torch.tensor([1.5, 2.5])],
        [np.array([1.5, 2.5], dtype=np.float32)],
        [3, 4.0],
        [[3, None]],
    ):
        with pytest.raises(InputsError):
            wordless().inputs(given)
    for ids in (torch.tensor([0.5, 1.5]), torch.tensor([True, False])):
        with pytest.raises(InputsError, match="row_ids"):
            wordless().inputs([[3], [4]], row_ids=ids)


def test_text_without_a_tokenizer():
    for given in ("the cat", ["the cat", "a"]):
        with pytest.raises(InputsError, match="tokenizer"):
            wordless().inputs(given)
    with pytest.raises(InputsError, match="tokenizer"):
        wordless().token("cat")
    with pytest.raises(InputsError, match="tokenizer"):
        wordless().decode([3])


def test_texts_and_ids_in_one_list():
    for given in (["the cat", [3, 4]], [[3, 4], "the cat"]):
        with pytest.raises(InputsError):
            model().inputs(given)


def test_shapes_that_disagree():
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    with pytest.raises(InputsError, match=r"\[2, 2\].*\[2, 3\]"):
        wordless().inputs(ids, torch.ones(2, 2))
    with pytest.raises(InputsError, match=r"\[3\].*\[2\]"):
        wordless().inputs(ids, row_ids=torch.arange(3))
    with pytest.raises(InputsError, match=r"\[1, 2, 3\]"):
        wordless().inputs(ids[None])
    with pytest.raises(InputsError, match="padding"):
        wordless().inputs([[3], [4, 5]], padding="middle")
    with pytest.raises(InputsError, match="padding"):
        wordless().inputs(ids, padding="both")
    with pytest.raises(InputsError, match="mask"):
        wordless().inputs([[3], [4, 5]], torch.ones(2, 2))


def test_what_a_tokenizer_returns_is_not_taken_for_prompts():
    batch = {"input_ids": torch.tensor([[3, 4]]), "attention_mask": torch.tensor([[1, 1]])}
    for given in (batch, UserDict(batch)):
        with pytest.raises(InputsError, match=r"batch\['input_ids'\]"):
            model().inputs(given)


@pytest.mark.parametrize("given", [b"the cat", {3, 4}, 7, None, object()])
def test_what_is_no_prompts(given):
    with pytest.raises(InputsError, match=type(given).__name__):
        model().inputs(given)


def test_a_mask_that_is_added_to_scores_is_not_taken_for_one_of_real_tokens():
    added = torch.tensor([[0.0, 0.0, -torch.inf]])
    with pytest.raises(InputsError, match="negative"):
        wordless().inputs(torch.tensor([[3, 4, 5]]), added)


def test_inputs_of_another_vocabulary():
    x = Inputs.of(torch.tensor([[3, zoo.VOCAB]]))
    runs = (
        lambda: wordless().run(x),
        lambda: next(hk.run_worlds(wordless(), [World(x)], [site("logits")])),
        lambda: wordless().run(wordless().inputs([[3, 4]]), hk.patch(site("z", 0), World(x))),
    )
    for run in runs:
        with pytest.raises(InputsError, match=rf"{zoo.VOCAB}.*0 \.\. {zoo.VOCAB - 1}"):
            run()


def test_inputs_given_as_inputs():
    with pytest.raises(InputsError, match="already"):
        wordless().inputs(wordless().inputs([[3, 4]]))


@pytest.mark.parametrize("given", [[[3, 4]], torch.tensor([[3, 4]]), "the cat", None])
def test_what_is_no_inputs_is_refused_where_inputs_are_needed(given):
    with pytest.raises(hk.InterpError, match="Inputs"):
        wordless().run(given)
    with pytest.raises(hk.InterpError, match="Inputs"):
        World(given)


# Answers


def test_a_token():
    assert model().token("cat") == 2
    with pytest.raises(InputsError, match=r"un.*happy"):
        model().token("unhappy")
    with pytest.raises(InputsError, match="2 tokens"):
        model().token("the cat")


# Pairs


def test_aligned_batches():
    pairs = align(model().inputs(["the cat sat", "a b c"]), model().inputs(["the dog sat", "a b c"]))
    assert pairs.differs.tolist() == [[False, False, True, False], [False] * 4]
    assert pairs.first_difference.tolist() == [2, 4]
    text = str(pairs)
    assert "[ cat |  dog]" in text and "sat" in text
    assert text.count("|") == 1 and text.startswith("row 0")


@pytest.mark.parametrize(("one", "two"), [("left", "right"), ("right", "left"), ("left", "left")])
def test_alignment_is_by_position_not_by_column(one, two):
    clean = model().inputs(["the cat sat on", "a b", "the mat"], padding=one)
    corrupt = model().inputs(["the cat sat a", "a c", "the mat"], padding=two)
    pairs = align(clean, corrupt)
    assert pairs.differs.tolist() == [[False] * 4 + [True], [False, False, True, False, False], [False] * 5]
    assert pairs.first_difference.tolist() == [4, 2, 3]


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_stands_at_padding_is_no_difference(side):
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1] if side == "left" else [1, 1, 0, 0]])
    ids = torch.where(mask.bool(), torch.tensor([[3, 4, 5, 6], [7, 8, 7, 8]]), 1)
    pairs = align(Inputs.of(ids, mask), Inputs.of(torch.where(mask.bool(), ids, 2), mask))
    assert not pairs.differs.any() and pairs.first_difference.tolist() == [4, 2]


def test_unequal_lengths_print_the_tokens_that_differ():
    clean, corrupt = model().inputs(["a b", "the cat sat"]), model().inputs(["a c", "the unhappy sat"])
    with pytest.raises(InputsError) as caught:
        align(clean, corrupt)
    text = str(caught.value)
    assert "pair 1" in text and "4 clean" in text and "5 corrupt" in text
    assert "position 2" in text
    assert "[' cat', ' sat']" in text and "[' un', ' happy', ' sat']" in text
    with pytest.raises(InputsError, match="2 clean prompts and 1 corrupt"):
        align(clean, model().inputs("a b"))


def test_a_row_that_begins_like_the_other_but_goes_on():
    with pytest.raises(InputsError) as caught:
        align(model().inputs("the cat"), model().inputs("the cat sat"))
    assert "position 3" in str(caught.value) and "[' sat']" in str(caught.value) and "[]" in str(caught.value)


def test_ids_without_a_tokenizer_are_printed_as_ids():
    with pytest.raises(InputsError, match=r"'7', '8'"):
        align(wordless().inputs([[3, 4, 5]]), wordless().inputs([[3, 4, 7, 8]]))
    assert "[4 | 9]" in str(align(wordless().inputs([[3, 4]]), wordless().inputs([[3, 9]])))
