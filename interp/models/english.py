"""The templated English that `ioi-mini` is trained on: three tasks, what is held out of them, and prompt pairs.

What is held out, and in no training text:

- **names**: two names whose places in `NAMES` sum to a multiple of 8 never meet in a text (about one pair in eight);
- **slots**: nor do a place and an object whose places in `PLACES` and `OBJECTS` sum to a multiple of 8;
- **template**: one template of the indirect objects, one of the pronouns, and one length of the repeated sequences.

Each split holds out one of the three and is otherwise like the training text, every word of which occurs in it.
Everything is a pure function of its arguments: the same seed gives the same texts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from random import Random

from hooks import InputsError, nearest


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SHE = _words(
    "Mary Anna Alice Emma Julia Laura Sarah Kate Lucy Rose Helen Jane "
    "Clara Diana Emily Grace Karen Linda Nancy Olivia Rachel Susan Sophia Lily"
)
HE = _words(
    "John Tom Tim James Peter Paul Mark David Daniel George Henry Jack "
    "Kevin Leo Martin Oscar Robert Samuel Simon Steven Thomas Victor William Adam"
)
NAMES = SHE + HE
PLACES = _words(
    "store park school garden kitchen library market station museum office beach bakery "
    "cafe church farm forest harbor hospital hotel river theater village zoo lake"
)
OBJECTS = _words(
    "drink book ball ring letter basket bottle cake camera card coat coin "
    "cup flower gift hat key lamp map pen phone picture ticket toy"
)
GAVE = ("gave", "handed", "passed", "lent", "offered", "brought", "sent", "showed")

SPLITS = ("train", "names", "slots", "template")
EVERY = 8

# {A} and {B} are the two names in the order in which they enter, {S} the one that gives: the answer is the other.
# A template is a setting, what joins it to what follows, and the giving.
_CLAUSES = (
    "When {A} and {B} went to the {place}",
    "After {A} and {B} came home from the {place}",
    "While {A} and {B} were working at the {place}",
    "Before {A} and {B} left the {place}",
    "Because {A} and {B} liked the {place}",
    "When {A} met {B} at the {place}",
    "While {A} was looking for {B} near the {place}",
    "After {A} left the {place} with {B}",
)
_SENTENCES = (
    "{A} and {B} met at the {place}",
    "{A} and {B} had a long talk at the {place}",
    "In the morning {A} and {B} were at the {place}",
    "The {place} was quiet when {A} and {B} arrived",
    "It was late when {A} and {B} came to the {place}",
    "At the {place} there were {A} and {B}",
    "Everyone at the {place} liked {A} and {B}",
    "{A} was at the {place} when {B} arrived",
    "{A} was happy at the {place} and {B} was tired",
    "{A} was tired. {B} went to the {place}",
    "One day {A} went to the {place} with {B}",
    "Last week {A} saw {B} near the {place}",
    "At the {place}, {A} was looking for {B}",
)
_JOINTS = (", and ", ", so ", ", but ", ". Later ", ". Then ", ". There ", ". In the evening ")
_GIVING = (
    "{S} {gave} a {object} to",
    "{S} {gave} the {object} to",
    "{S} wanted to give a {object} to",
    "{S} decided to give the {object} to",
    "{S} had a {object} and {gave} it to",
    "{S} took the {object} and {gave} it to",
    "it was {S} who {gave} the {object} to",
)
INDIRECT_OBJECT = tuple(
    setting + joint + giving
    for settings, joints in ((_CLAUSES, (", ",)), (_SENTENCES, _JOINTS))
    for setting, joint, giving in product(settings, joints, _GIVING)
)
INDIRECT_OBJECT_HELD_OUT = "After a long day at the {place}, {A} and {B} were tired, but {S} {gave} the {object} to"
_ENDINGS = (".", " in the morning.", " and went home.", ", who was happy.")

# The pronoun is that of {N}; {M} is someone else, of either gender.
_ABOUT = (
    "{N} went to the {place}",
    "{N} stayed at the {place}",
    "{N} was happy at the {place}",
    "Everyone at the {place} liked {N}",
    "{N} looked for the {object} at the {place}",
    "{N} took a {object} to the {place}",
    "One evening {N} lost the {object} near the {place}",
    "In the morning {N} found a {object} at the {place}",
    "At the {place} {N} asked for a {object}",
    "Last week {N} left the {place} with the {object}",
    "{N} met {M} at the {place}",
    "{N} asked {M} for the {object}",
    "{N} went to the {place} with {M}",
    "One day {N} saw {M} near the {place}",
    "{N} took the {object} from {M} at the {place}",
)
_REASONS = (" because", " before", " until", " while", ", and then")
_WHEN = ("When", "While", "After", "Before")
_FIRST = (
    " {N} was at the {place},",
    " {N} left the {object} at the {place},",
    " {N} came home with {M},",
    " {N} took the {object} from {M},",
)
PRONOUNS = tuple(a + b for parts in ((_ABOUT, _REASONS), (_WHEN, _FIRST)) for a, b in product(*parts))
PRONOUNS_HELD_OUT = "In the evening {N} came home from the {place} with a {object} because"
_DONE = ("was tired", "was late", "went home", "needed a {object}", "found the {object}", "left the {place}")

LENGTHS = (4, 5, 6, 8, 9, 10)  # words of a sequence that is repeated
LENGTH_HELD_OUT = 7


@dataclass(frozen=True)
class Example:
    """A pair of prompts with as many tokens, whose answers are each other's foils.

    Attributes:
        clean: a prompt.
        corrupt: the prompt with one word changed, so that its answer is `foil`.
        answer: the word that follows `clean`.
        foil: the word that follows `corrupt`.
        text: the clean prompt, continued to its full stop.
    """

    clean: str
    corrupt: str
    answer: str
    foil: str
    text: str


def held_out(a: str, b: str) -> bool:
    """Whether two words, in either order, never meet in a training text: two names, or a place and an object."""
    if a in NAMES and b in NAMES:
        return (NAMES.index(a) + NAMES.index(b)) % EVERY == 0
    if a in OBJECTS:
        a, b = b, a
    return a in PLACES and b in OBJECTS and (PLACES.index(a) + OBJECTS.index(b)) % EVERY == 0


def indirect_object(
    n: int, seed: int, split: str = "train", *, template: str | None = None, order: str | None = None
) -> list[Example]:
    """Draw sentences in which one of two people gives something to the other (Wang et al. 2022, Interpretability in
    the wild); corrupt has the other name in the giver's place.

    Args:
        n: how many, drawn independently.
        seed: of the draw.
        split: "train", "names", "slots" or "template".
        template: one of `INDIRECT_OBJECT`, so that all examples align; default any of the split's.
        order: "ABBA", where the answer enters first, "BABA", where it enters second; default either.

    Raises:
        InputsError: a split, template or order that there is not.
    """
    if order not in (None, "ABBA", "BABA"):
        raise InputsError(f"order is 'ABBA', 'BABA' or None, not {order!r}")
    choices = _templates(split, INDIRECT_OBJECT, INDIRECT_OBJECT_HELD_OUT, template)
    return _draw(n, seed, split, lambda rng: _indirect_object(rng, split, choices, order))


def pronouns(n: int, seed: int, split: str = "train", *, template: str | None = None) -> list[Example]:
    """Draw sentences that go on with the pronoun of the person they are about; corrupt is about one of the other
    gender. In the split "names" they all name a second person; in "slots" they all have a place and an object.

    Args:
        n: how many, drawn independently.
        seed: of the draw.
        split: "train", "names", "slots" or "template".
        template: one of `PRONOUNS`, so that all examples align; default any that the split can use.

    Raises:
        InputsError: a split or template that there is not.
    """
    needs = {"names": ("{M}",), "slots": ("{place}", "{object}")}.get(split, ())
    usable = tuple(prompt for prompt in PRONOUNS if all(slot in prompt for slot in needs))
    choices = _templates(split, usable, PRONOUNS_HELD_OUT, template)
    return _draw(n, seed, split, lambda rng: _pronoun(rng, split, choices))


def repeats(n: int, seed: int, split: str = "train", *, length: int | None = None) -> list[Example]:
    """Draw sequences of different names, places and objects, said once and then again from anywhere in them; corrupt
    has another word in the first copy where the answer was. In "names" and "slots" the held-out words are the answer
    and the word before it.

    Args:
        n: how many, drawn independently.
        seed: of the draw.
        split: "train", "names", "slots" or "template" (a held-out length).
        length: words in the sequence, 2 to 20 (training has `LENGTHS`); default any of the split's.

    Raises:
        InputsError: a split that there is not, or a length that is too short or too long.
    """
    _check(split)
    if length is not None and not 2 <= length <= 20:
        raise InputsError(f"a repeated sequence has 2 to 20 words, not {length!r}")
    lengths = (length,) if length else (LENGTH_HELD_OUT,) if split == "template" else LENGTHS
    return _draw(n, seed, split, lambda rng: _repeat(rng, split, lengths))


TASKS: dict[str, Callable[..., list[Example]]] = {
    "indirect_object": indirect_object,
    "pronouns": pronouns,
    "repeats": repeats,
}


def documents(seed: int) -> Iterator[str]:
    """Yield training texts without end: half indirect objects, a quarter pronouns, a quarter repeated sequences."""
    rng = Random(f"documents/{seed}")
    while True:
        kind = rng.randrange(4)
        if kind < 2:
            yield _indirect_object(rng, "train", INDIRECT_OBJECT, None).text
        elif kind == 2:
            yield _pronoun(rng, "train", PRONOUNS).text
        else:
            yield _repeat(rng, "train", LENGTHS).text


def vocabulary() -> tuple[str, ...]:
    """Every word and sign of the texts: signs, the words of the templates by letter, names, places, objects."""
    parts = [*INDIRECT_OBJECT, *GAVE, *_ENDINGS, *PRONOUNS, *_DONE, "he she"]
    found = set(re.findall(r"\w+|[^\w\s]", re.sub(r"\{\w+\}", "", " ".join(parts))))
    signs = sorted(piece for piece in found if not piece.isalpha())
    return (*signs, *sorted(found.difference(signs), key=lambda word: (word.lower(), word)), *NAMES, *PLACES, *OBJECTS)


def _indirect_object(rng: Random, split: str, templates: tuple[str, ...], order: str | None) -> Example:
    template = rng.choice(templates)
    first, second = _pair(rng, NAMES, NAMES, split == "names")
    place, thing = _pair(rng, PLACES, OBJECTS, split == "slots")
    answer_first = rng.random() < 0.5 if order is None else order == "ABBA"
    answer, foil = (first, second) if answer_first else (second, first)
    slots = {"A": first, "B": second, "place": place, "object": thing, "gave": rng.choice(GAVE)}
    clean, corrupt = template.format(S=foil, **slots), template.format(S=answer, **slots)
    return Example(clean, corrupt, answer, foil, f"{clean} {answer}{rng.choice(_ENDINGS)}")


def _pronoun(rng: Random, split: str, templates: tuple[str, ...]) -> Example:
    prompt = rng.choice(templates)
    answer, foil, same, other = rng.choice((("she", "he", SHE, HE), ("he", "she", HE, SHE)))
    place, thing = _pair(rng, PLACES, OBJECTS, split == "slots")
    # Both names that the prompts are about must stand to the second person as the split says.
    name, second = _pair(rng, same, NAMES, split == "names")
    instead = rng.choice([x for x in other if x != second and held_out(x, second) == (split == "names")])
    slots = {"M": second, "place": place, "object": thing}
    clean, corrupt = prompt.format(N=name, **slots), prompt.format(N=instead, **slots)
    return Example(clean, corrupt, answer, foil, f"{clean} {answer} {rng.choice(_DONE).format(**slots)}.")


def _repeat(rng: Random, split: str, lengths: tuple[int, ...]) -> Example:
    words = NAMES + PLACES + OBJECTS
    length = rng.choice(lengths)
    kinds = {"names": (NAMES, NAMES), "slots": (PLACES, OBJECTS)}.get(split, (words, words))
    held = split in ("names", "slots")
    before, answer = _pair(rng, *kinds, held)
    foil = rng.choice([x for x in kinds[1] if x not in (before, answer) and held_out(before, x) == held])
    others: list[str] = []
    while len(others) < length - 2:
        word = rng.choice(words)
        used = [before, answer, foil, *others]
        if word not in used and not any(held_out(word, x) for x in used):
            others.append(word)
    at = rng.randrange(1, length)  # where in the sequence the answer is
    begin = rng.randrange(at)  # where the second copy sets in: its first word is a surprise, the others are not
    first = [*others[: at - 1], before, answer, *others[at - 1 :]]
    changed = [*others[: at - 1], before, foil, *others[at - 1 :]]
    begun, rest = " ".join(first[begin:at]), " ".join(first[begin:])
    clean, corrupt = f"{' '.join(first)}. {begun}", f"{' '.join(changed)}. {begun}"
    return Example(clean, corrupt, answer, foil, f"{' '.join(first)}. {rest}.")


def _pair(rng: Random, first: tuple[str, ...], second: tuple[str, ...], held: bool) -> tuple[str, str]:
    """Two different words that are held out, or that are not."""
    while True:
        a, b = rng.choice(first), rng.choice(second)
        if a != b and held_out(a, b) == held:
            return a, b


def _draw(n: int, seed: int, split: str, make: Callable[[Random], Example]) -> list[Example]:
    rng = Random(f"{split}/{seed}")
    return [make(rng) for _ in range(n)]


def _check(split: str) -> None:
    if split not in SPLITS:
        raise InputsError(f"there is no split {split!r}: {', '.join(SPLITS)}{nearest(split, SPLITS)}")


def _templates(split: str, templates: tuple[str, ...], held: str, given: str | None) -> tuple[str, ...]:
    """The templates that a split uses, or the one that was asked for."""
    _check(split)
    usable = (held,) if split == "template" else templates
    if given is None:
        return usable
    if given not in usable:
        raise InputsError(f"the split {split!r} has no template {given!r}{nearest(given, usable)}")
    return (given,)
