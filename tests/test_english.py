"""The templated English: what is held out stays out of training, and prompt pairs differ where they should."""

from __future__ import annotations

import re
from itertools import combinations, islice

import pytest

from hooks.errors import InterpError
from interp.models import english
from interp.models.english import NAMES, OBJECTS, PLACES, SPLITS, TASKS, held_out

N = 300
each_task = pytest.mark.parametrize("task", TASKS)
each_split = pytest.mark.parametrize("split", SPLITS)


def pieces(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return list(islice(english.documents(0), 6000))


# What is held out


def test_no_training_text_holds_what_is_held_out(corpus):
    for text in corpus:
        words = set(pieces(text))
        names, places, objects = (sorted(words.intersection(group)) for group in (NAMES, PLACES, OBJECTS))
        assert not any(held_out(a, b) for a, b in combinations(names, 2)), text
        assert not any(held_out(place, thing) for place in places for thing in objects), text
        assert not re.search(r"After a long day|evening \w+ came home", text)


def test_no_training_sequence_has_the_held_out_length(corpus):
    bare = set(NAMES + PLACES + OBJECTS)
    firsts = [text.split(".")[0].split() for text in corpus]
    lengths = {len(first) for first in firsts if bare.issuperset(first)}
    assert lengths == set(english.LENGTHS)
    assert english.LENGTH_HELD_OUT not in lengths


@each_task
@each_split
def test_every_word_of_every_split_is_in_the_training_texts(task, split, corpus):
    known = {word for text in corpus for word in pieces(text)}
    assert known == set(english.vocabulary())
    for example in TASKS[task](N, 0, split):
        assert known.issuperset(pieces(example.text)) and known.issuperset(pieces(example.corrupt))
        assert {example.answer, example.foil} <= known


def test_the_held_out_templates_are_what_the_corpus_is_searched_for():
    assert re.search("After a long day", english.INDIRECT_OBJECT_HELD_OUT)
    assert re.search(r"evening \w+ came home", english.PRONOUNS_HELD_OUT.format(N="Mary", place="", object=""))


def test_a_share_is_held_out_and_every_word_keeps_partners():
    pairs = list(combinations(NAMES, 2))
    assert 0.1 < sum(held_out(a, b) for a, b in pairs) / len(pairs) < 0.15
    for place in PLACES:
        assert sum(held_out(place, thing) for thing in OBJECTS) == 3
    for name in NAMES:
        for group in (english.SHE, english.HE):
            assert any(held_out(name, x) for x in group if x != name)
            assert any(not held_out(name, x) for x in group if x != name)


def test_held_out_asks_for_no_order():
    assert held_out("Alice", "Lucy") == held_out("Lucy", "Alice")
    assert held_out("store", "drink") and held_out("drink", "store")
    assert not held_out("store", "book") and not held_out("Mary", "store")


@each_task
def test_the_splits_are_disjoint(task):
    texts = {split: {x.clean for x in TASKS[task](N, 0, split)} for split in SPLITS}
    for a, b in combinations(SPLITS, 2):
        assert not texts[a] & texts[b]


@each_task
@pytest.mark.parametrize("split", ["names", "slots"])
def test_every_held_out_prompt_holds_what_is_held_out(task, split):
    for example in TASKS[task](N, 0, split):
        for text in (f"{example.clean} {example.answer}", f"{example.corrupt} {example.foil}"):
            met = [pair for pair in combinations(sorted(set(pieces(text))), 2) if held_out(*pair)]
            kinds = {"names" if a in NAMES else "slots" for a, b in met}
            assert kinds == {split}, text


@each_task
@pytest.mark.parametrize("split", ["train", "template"])
def test_the_other_splits_hold_nothing_else_that_is_held_out(task, split):
    for example in TASKS[task](N, 0, split):
        for text in (example.text, example.corrupt):
            assert not any(held_out(a, b) for a, b in combinations(set(pieces(text)), 2)), text


# Prompt pairs


@each_task
@each_split
def test_pairs_differ_in_one_word(task, split):
    for example in TASKS[task](N, 1, split):
        clean, corrupt = pieces(example.clean), pieces(example.corrupt)
        assert len(clean) == len(corrupt)
        assert sum(a != b for a, b in zip(clean, corrupt, strict=True)) == 1
        assert example.answer != example.foil
        assert example.text.startswith(f"{example.clean} {example.answer}")
        assert example.text.endswith(".")


@each_split
def test_the_answer_is_the_name_said_once(split):
    for example in TASKS["indirect_object"](N, 2, split):
        for prompt, answer, foil in (
            (example.clean, example.answer, example.foil),
            (example.corrupt, example.foil, example.answer),
        ):
            names = [word for word in pieces(prompt) if word in NAMES]
            assert sorted(names) == sorted([answer, foil, foil])
            assert names[-1] == foil


@each_split
def test_the_pronoun_is_that_of_the_first_name(split):
    for example in TASKS["pronouns"](N, 2, split):
        for prompt, answer in ((example.clean, example.answer), (example.corrupt, example.foil)):
            first = next(word for word in pieces(prompt) if word in NAMES)
            assert answer == ("she" if first in english.SHE else "he")


@each_split
def test_the_answer_follows_the_last_word_in_the_first_copy(split):
    for example in TASKS["repeats"](N, 2, split):
        for prompt, answer in ((example.clean, example.answer), (example.corrupt, example.foil)):
            first, begun = (part.split() for part in prompt.split("."))
            assert len(set(first)) == len(first)
            start = first.index(begun[0])
            assert first[start : start + len(begun)] == begun
            assert first[start + len(begun)] == answer


def test_answers_are_balanced():
    """No constant answer does well: both orders, both genders, every name."""
    given = english.indirect_object(1000, 0)
    early = sum(x.clean.index(x.answer) < x.clean.index(x.foil) for x in given)
    assert 400 < early < 600
    assert {x.answer for x in given} == set(NAMES)
    assert 400 < sum(x.answer == "she" for x in english.pronouns(1000, 0)) < 600
    assert len({x.answer for x in english.repeats(2000, 0)}) == len(NAMES + PLACES + OBJECTS)


# Choices


def test_one_template_aligns_all_rows():
    template = english.INDIRECT_OBJECT[0]
    given = english.indirect_object(50, 0, "names", template=template, order="ABBA")
    assert {len(pieces(x.clean)) for x in given} == {len(pieces(template.replace("{", "").replace("}", "")))}
    for x in given:
        words = pieces(x.clean)
        assert words[0] == "When" and words[1] == x.answer and words[3] == words[9] == x.foil
    for x in english.indirect_object(50, 0, template=template, order="BABA"):
        assert pieces(x.clean)[3] == x.answer
    prompts = english.pronouns(20, 0, template=english.PRONOUNS[0])
    assert all(re.fullmatch(r"\w+ went to the \w+ because", x.clean) for x in prompts)
    assert all(len(x.clean.split(".")[0].split()) == 5 for x in english.repeats(20, 0, length=5))


@each_task
@each_split
def test_the_same_seed_gives_the_same_examples(task, split):
    draw = TASKS[task]
    assert draw(20, 3, split) == draw(20, 3, split)
    assert draw(5, 3, split) == draw(20, 3, split)[:5]
    assert draw(20, 3, split) != draw(20, 4, split)


def test_the_same_seed_gives_the_same_texts():
    assert list(islice(english.documents(3), 50)) == list(islice(english.documents(3), 50))
    assert list(islice(english.documents(3), 50)) != list(islice(english.documents(4), 50))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: english.repeats(1, 0, "name"), "no split 'name'.*did you mean 'names'"),
        (lambda: english.indirect_object(1, 0, "test"), "no split 'test': train, names, slots, template"),
        (lambda: english.indirect_object(1, 0, order="AABB"), "order is 'ABBA', 'BABA' or None, not 'AABB'"),
        (
            lambda: english.indirect_object(1, 0, template=english.INDIRECT_OBJECT_HELD_OUT),
            "the split 'train' has no template 'After a long day",
        ),
        (lambda: english.pronouns(1, 0, "names", template=english.PRONOUNS[0]), "split 'names' has no template"),
        (lambda: english.repeats(1, 0, length=1), "2 to 20 words, not 1"),
        (lambda: english.repeats(1, 0, length=0), "2 to 20 words, not 0"),
    ],
)
def test_choices_that_there_are_not(call, message):
    with pytest.raises(InterpError, match=message):
        call()
