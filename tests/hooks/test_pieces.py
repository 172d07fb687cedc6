"""The text of tokens: what the tokenizer decodes, of every kind of tokenizer; and words that it does not know."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

import hooks as hk
from hooks.errors import InputsError
from hooks.plan.pieces import joined
from tests import zoo

TEXT = "Zoë kauft Äpfel, für 3 € 日本 🙂"


def fast(made: Any, **special: str) -> Any:
    import transformers

    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)


def trained(made: Any, trainer: Any) -> Any:
    made.train_from_iterator([TEXT, "John kauft Äpfel"] * 20, trainer)
    return made


def byte_level(merges: bool = True, prefix: bool = False) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=prefix), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = 330 if merges else 257
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    return fast(trained(made, trainer), eos_token="<|end|>")


def metaspace(merges: bool = True) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    vocab = {"<unk>": 0, "<s>": 1}
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    pairs = [("▁", "J"), ("▁J", "o"), ("▁Jo", "h"), ("▁Joh", "n"), ("o", "ë")] if merges else []
    for piece in [*"▁abcefhklnoprtuZ,3Jë", *(a + b for a, b in pairs)]:
        vocab.setdefault(piece, len(vocab))
    made = Tokenizer(models.BPE(vocab, pairs, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    tokenizer = fast(made, unk_token="<unk>", bos_token="<s>")
    tokenizer.add_tokens([AddedToken("Äther", normalized=False)])
    return tokenizer


def word_level(unknown: str | None = "<unk>", declared: bool = True) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"Mary": 1, "John": 2, ",": 3} | ({unknown: 0} if unknown else {})
    made = Tokenizer(models.WordLevel(words, **({"unk_token": unknown} if unknown else {})))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return fast(made, **({"unk_token": unknown} if unknown and declared else {}))


def word_piece() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2, "he": 3, "[CLS]": 4}, unk_token="[UNK]"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    return fast(made, unk_token="[UNK]", cls_token="[CLS]")


def unigram(declared: bool = True, prefix: str = "always") -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁a", -1.0), ("b", -1.0), ("▁", -2.0)], 0))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(prepend_scheme=prefix), decoders.Metaspace()
    return fast(made, **({"unk_token": "<unk>"} if declared else {}))


def suffixed() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {"a": 0, "b": 1, "b</w>": 2, "ab</w>": 3, "a</w>": 4}
    made = Tokenizer(models.BPE(vocab, [("a", "b</w>")], end_of_word_suffix="</w>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.WhitespaceSplit(), decoders.BPEDecoder()
    return fast(made)


@cache
def module() -> Any:
    return zoo.make("small_ln_learned")


def labels(tokenizer: Any, text: str | list[int]) -> tuple[str, ...]:
    model = hk.wrap(module(), tokenizer)
    model._described = Wide(model.architecture)  # type: ignore[assignment]
    return model.inputs([text]).labels()


class Wide:
    """A model's parts, but of a vocabulary as large as any tokenizer's."""

    vocabulary = token_ids = 10_000

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@pytest.mark.parametrize("merges", [True, False])
@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_the_labels_of_a_row_are_its_text(make: Callable, merges):
    tokenizer = make(merges)
    found = labels(tokenizer, TEXT)
    ids = tokenizer(TEXT)["input_ids"]
    assert len(found) == len(ids) and all(found)
    assert joined(found).removeprefix(" ") == TEXT
    assert hk.wrap(module(), tokenizer).decode(ids).removeprefix(" ") == TEXT
    if merges:
        assert "Zoë" in "".join(found) and "Ã" not in "".join(found)


def test_byte_level_pieces():
    tokenizer = byte_level()
    found = labels(tokenizer, "Zoë kauft Äpfel")
    assert "".join(found) == "Zoë kauft Äpfel"
    assert any(label.startswith(" ") and len(label) > 1 for label in found)
    assert "".join(labels(byte_level(prefix=True), "Zoë")) == " Zoë"
    end = tokenizer.eos_token_id
    assert labels(tokenizer, [*tokenizer("a\nb")["input_ids"], end]) == ("a", "\n", "b", "<|end|>")


def test_parts_of_a_character_can_be_told_apart():
    tokenizer = byte_level(merges=False)
    assert labels(tokenizer, "aëü") == ("a", "<0xC3>", "<0xAB>", "<0xC3>", "<0xBC>")
    model = hk.wrap(module(), tokenizer)
    euro = tokenizer("€")["input_ids"]
    assert [model.decode([i]) for i in euro] == ["<0xE2>", "<0x82>", "<0xAC>"]
    assert model.decode(euro) == "€" and model.decode(euro[:2]) == "<0xE2><0x82>" and model.decode(euro[1:]) != "€"
    fallback = hk.wrap(module(), metaspace())
    assert [fallback.decode([i]) for i in fallback.tokenizer("€", add_special_tokens=False)["input_ids"][1:]] == [
        "<0xE2>", "<0x82>", "<0xAC>"
    ]  # fmt: skip


def test_a_name_of_a_byte_in_the_text_stays():
    assert joined(("<0x41>", "a", "<0xC3>")) == "<0x41>a<0xC3>"
    assert joined(("a", "<0xC3>", "<0xAB>", "b<0xE2><0x82><0xAC>")) == "aëb€"


def test_pieces_with_a_space_before_them():
    found = labels(metaspace(), "John Zoë\nJohn")
    assert found == (" John", " ", "Z", "oë", "\n", "J", "o", "h", "n")
    tokenizer = metaspace()
    begin = tokenizer.bos_token_id
    assert labels(tokenizer, [begin, *tokenizer("a Äther")["input_ids"]])[0] == "<s>"
    assert "Äther" in labels(tokenizer, "a Äther")  # added, and so written as it is
    assert labels(unigram(), "ab ab") == (" a", "b", " a", "b")


def test_words_and_what_continues_them():
    assert labels(word_level(), "Mary John , Zebra") == ("Mary", " John", " ,", "<unk>")
    assert labels(word_piece(), "playing he") == ("play", "ing", " he")
    assert labels(suffixed(), "aab ab a") == ("a", "ab", " ab", " a")


def test_tokenizers_that_only_convert_ids():
    class Plain:
        pieces = ("<s>", "Ġthe", "▁cat", "Ċ")

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [0, 1, 2, 3]}

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [self.pieces[i] for i in ids]

    assert labels(Plain(), "the cat") == ("<s>", " the", " cat", "\n")


# Words that are not known


@pytest.mark.parametrize(
    ("make", "known", "unknown"),
    [
        (word_level, "Mary", "Zebra"),
        (lambda: word_level("[UNK]"), "Mary", "Zebra"),
        (lambda: word_level("[UNK]", declared=False), "Mary", "Zebra"),
        (lambda: word_level("<what>", declared=False), "Mary", "Zebra"),
        (lambda: word_level(None), "Mary", "Zebra"),
        (word_piece, "he", "Zebra"),
        (lambda: unigram(prefix="never"), "b", "zz"),
        (lambda: unigram(False, "never"), "b", "zz"),
    ],
)
def test_an_answer_that_the_tokenizer_does_not_know(make, known, unknown):
    model = hk.wrap(module(), make())
    assert isinstance(model.token(known), int)
    with pytest.raises(InputsError, match=f"does not know .*{unknown}"):
        model.token(unknown)


def test_the_unknown_token_itself_may_be_meant():
    model = hk.wrap(module(), word_level())
    assert model.token("<unk>") == model.token(" <unk>") == 0


def test_bytes_and_added_tokens_are_known():
    model = hk.wrap(module(), metaspace())
    assert model.token("Äther") == model.tokenizer.convert_tokens_to_ids("Äther")
    with pytest.raises(InputsError, match=r"tokens.*<0xE2>.*<0x82>"):
        model.token("€")
    model = hk.wrap(module(), byte_level())  # which has no unknown token
    assert model.decode([model.token("Z")]) == "Z" and model.token("<|end|>") == model.tokenizer.eos_token_id


def test_letters_that_a_tokenizer_drops():
    from tokenizers import Tokenizer, models, normalizers

    made = Tokenizer(models.BPE({"Z": 0, "o": 1, "Zo": 2, "e": 3, "zoe": 4}, [("Z", "o")]))
    with pytest.raises(InputsError, match="leaves out 'ë'"):
        hk.wrap(module(), fast(made)).token("Zoë")
    made = Tokenizer(models.WordLevel({"zoe": 0, "<unk>": 1}, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()])
    model = hk.wrap(module(), fast(made, unk_token="<unk>"))
    assert model.token("Zoë") == model.token("zoe") == model.token("Zoe\u0308") == 0
