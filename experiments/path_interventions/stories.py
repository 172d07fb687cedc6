"""`she` or `he` in a small Llama trained on stories: ``python -m experiments.path_interventions.stories FOLDER``."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import interp as ip
from experiments.path_interventions.pipeline import analyse, told, write

OUT = Path(__file__).parent / "results"
GIRLS = ("Lily", "Mia", "Sue", "Anna", "Amy", "Jane", "Lucy", "Sara", "Emma", "Kate", "Mary", "Rose")
BOYS = ("Tim", "Tom", "Ben", "Max", "Sam", "Jack", "Bob", "Leo", "Joe", "Bill", "Mark", "Dan")
TEMPLATES = (
    "Once upon a time, there was a little {kind} named {name}. One day,",
    "Once upon a time, there was a {kind} named {name}. Every day,",
    "{name} was a little {kind}. One day,",
    "There was a little {kind} who liked to play. The name was {name}. One day,",
)
SIDES = {"girl": GIRLS, "boy": BOYS}


def pairs(model: ip.Model, template: str) -> list[tuple[str, str]]:
    """Prompts about a girl and a boy, of the same number of tokens."""
    found, used = [], set()
    for girl, boy in itertools.product(GIRLS, BOYS):
        one, two = (template.format(kind=kind, name=name) for kind, name in (("girl", girl), ("boy", boy)))
        if len(model.encode(one)) == len(model.encode(two)) and girl not in used and boy not in used:
            found.append((one, two))
            used |= {girl, boy}
    return found


def both_ways(model: ip.Model, listed: Sequence[tuple[str, str]]) -> tuple[ip.Inputs, ip.Inputs, ip.Metric]:
    """Each pair with the girl's prompt as the clean one, and with the boy's."""
    clean = [girl for girl, _ in listed] + [boy for _, boy in listed]
    corrupt = [boy for _, boy in listed] + [girl for girl, _ in listed]
    answers = ["she"] * len(listed) + ["he"] * len(listed)
    return model.inputs(clean), model.inputs(corrupt), ip.logit_diff(answers, answers[::-1])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study and write its results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the model's folder")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    model = ip.load(options.folder)
    train = [pair for template in TEMPLATES[:2] for pair in pairs(model, template)]
    held_out = [pair for template in TEMPLATES[2:] for pair in pairs(model, template)]
    _, record = analyse(model, both_ways(model, train), both_ways(model, held_out), options.out, "stories")
    record["templates"] = {"scored on": TEMPLATES[:2], "measured on": TEMPLATES[2:]}
    record["examples"] = {"scored on": train[0], "measured on": held_out[0]}
    write(record, options.out, "stories")
    print(told(record))


if __name__ == "__main__":
    main()
