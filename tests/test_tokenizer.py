"""The word-level tokenizer: reading, writing, and what it refuses."""

from __future__ import annotations

import json
from itertools import islice

import pytest

from hooks.errors import InterpError
from interp.models import WordTokenizer
from interp.models.english import documents, vocabulary


@pytest.fixture(scope="module")
def words() -> WordTokenizer:
    return WordTokenizer(vocabulary())


def test_a_text_begins_with_the_first_token_unless_told_otherwise(words):
    ids = words("When Mary went home.")["input_ids"]
    assert ids[0] == words.bos_token_id == 0
    assert words("When Mary went home.", add_special_tokens=False)["input_ids"] == ids[1:]
    assert words.convert_ids_to_tokens(ids) == ["<s>", " When", " Mary", " went", " home", "."]


def test_a_word_is_one_token_with_or_without_its_space(words):
    assert words.token("Mary") == words.token(" Mary") == words.token("  Mary ")
    assert words.token(",") != words.token(".")
    assert words.token("<s>") == 0
    assert words.token("he") != words.token("she")


def test_case_matters(words):
    assert words.token("When") != words.token("when")


def test_text_survives_the_round_trip(words):
    texts = list(islice(documents(5), 300))
    for text in texts:
        ids = words(text)["input_ids"]
        assert words.decode(ids) == text
        assert words.decode(ids[1:]) == text
    assert any(", " in text for text in texts) and any(". " in text for text in texts)


def test_spaces_make_no_difference(words):
    assert words("  Mary met\nJohn .") == words("Mary met John.")


def test_what_follows_the_first_token_written_out_is_the_text(words):
    """As `hooks.Model.decode` writes it."""
    ids = words("Then Mary went home.")["input_ids"]
    assert "".join(words.convert_ids_to_tokens(ids)) == "<s> Then Mary went home."
    assert words("<s> Then Mary went home.", add_special_tokens=False)["input_ids"] == ids


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Maryy", r"'Maryy' is not a word of this model, did you mean 'Mary'\?"),
        ("mary went home", r"'mary' is not a word of this model, did you mean 'Mary'\?"),
        ("Mary went home!", "'!' is not a word"),
        ("Xyzzyx", r"'Xyzzyx' is not a word of this model$"),
        ("Mary went", r"'Mary went' is 2 tokens, \[' Mary', ' went'\], and not one"),
        ("", r"'' is 0 tokens"),
    ],
)
def test_what_is_no_token(words, text, message):
    with pytest.raises(InterpError, match=message):
        words.token(text)


def test_an_unknown_word_in_a_text_is_named(words):
    with pytest.raises(InterpError, match="'shop' is not a word"):
        words("Mary went to the shop")


def test_only_one_text_at_a_time(words):
    with pytest.raises(InterpError, match="one text, not list"):
        words(["Mary", "John"])


@pytest.mark.parametrize("ids", [[-1], [10_000]])
def test_ids_that_are_no_tokens(words, ids):
    with pytest.raises(InterpError, match=f"token id {ids[0]} is outside the vocabulary"):
        words.decode(ids)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["Mary", "Mary"], "'Mary' is in the list of words twice"),
        (["<s>"], "'<s>' is in the list of words twice"),
        (["the store"], "one word or one punctuation sign; got 'the store'"),
        ([""], "got ''"),
        (["..."], "got '...'"),
    ],
)
def test_lists_that_are_no_vocabulary(entries, message):
    with pytest.raises(InterpError, match=message):
        WordTokenizer(entries)


def test_saving_and_loading(words, tmp_path):
    path = tmp_path / "tokenizer.json"
    words.save(path)
    assert WordTokenizer.load(path).words == words.words
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]
    assert json.loads(path.read_text())["words"][-1] == "toy"
    assert len(words) == len(vocabulary()) + 1
    assert repr(words) == f"WordTokenizer({len(words)} tokens)"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ("[1]", "is not a saved WordTokenizer"),
        ('{"version": "1.0", "model": {}}', "is not a saved WordTokenizer"),
        ('{"schema": "interp.words/1"}', "has no list of words"),
        ('{"schema": "interp.words/1", "words": [1]}', "has no list of words"),
    ],
)
def test_files_that_are_no_tokenizer(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(InterpError, match=message):
        WordTokenizer.load(path)
