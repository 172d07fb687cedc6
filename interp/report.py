"""What the demo found, as data and as a text for people."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from interp.two_steps import TwoSteps

FEW = 6
"""With fewer pairs than this no test can call an effect significant: 2^-5 is the smallest p of a sign flip with five.
"""


@dataclass(frozen=True)
class Check:
    """What the heads found do together, as shares of the clean-corrupt difference, and what random heads do.

    Attributes:
        put_back: the share that patching them into the corrupt run recovers.
        knocked_out: the share that is lost when the clean run gets the corrupt run's values there.
        random_put_back, random_knocked_out: the same for as many heads drawn at random from the others, mean of the
            draws.
        draws: how many draws.
    """

    put_back: float
    knocked_out: float
    random_put_back: float
    random_knocked_out: float
    draws: int


@dataclass(frozen=True)
class Report:
    """What `run_demo` found; `str()` is the text for people."""

    question: str
    model: str
    pairs: int
    example: dict[str, str]
    clean_metric: float
    corrupt_metric: float
    clean_probability: float
    accuracy: float
    all_heads: int
    heads: list[dict[str, Any]]
    positions: list[dict[str, Any]]
    blocks: list[dict[str, Any]]
    check: Check | None
    noise_floor: float
    lists: TwoSteps | None = None
    figures: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        second = [] if self.lists is None else ["", "A CIRCUIT OF TWO STEPS", *self.lists.lines()]
        parts = [self._short(), "", *self._asked(), "", *self._found(), *second, "", *self._sure(), "", *self._next()]
        return "\n".join(parts)

    def _short(self) -> str:
        """What came out, in two sentences."""
        said = "No single attention head carries a measurable part of the answer."
        if self.heads and self.check is not None:
            c, n = self.check, len(self.heads)
            names = [f"{h['layer']}.{h['head']}" for h in self.heads]
            them = f"Head {names[0]}" if n == 1 else f"Heads {', '.join(names[:-1])} and {names[-1]}"
            put = "carries" if n == 1 else "together carry"
            said = (
                f"{them}, of {self.all_heads}, {put} {c.put_back:.0%} of the answer into a run that lacks it (as many "
                f"at random: {c.random_put_back:.0%}), and without {'it' if n == 1 else 'them'} {c.knocked_out:.0%} is "
                "lost."
            )
        return textwrap.fill(said if self.lists is None else f"{said} {self.lists.headline()}", 100)

    def _asked(self) -> list[str]:
        e = self.example
        return [
            "WHAT WAS ASKED",
            f"  {self.question}",
            f"  model:   {self.model}",
            f"  clean:   {e['clean']!r} -> {e['answer']!r}",
            f"  corrupt: {e['corrupt']!r} -> {e['foil']!r}",
            f"  {_count(self.pairs, 'pair')} of prompts like these. The measure is how much higher the model scores",
            f"  the clean answer than the other: {self.clean_metric:+.2f} on clean prompts (right in",
            f"  {self.accuracy:.0%}), {self.corrupt_metric:+.2f} on corrupt ones.",
            "  A part is given the value that it has on the clean prompt, while the rest runs on the corrupt one.",
            "  What that recovers of the difference is its effect: 0% is nothing, 100% is all of it.",
        ]

    def _found(self) -> list[str]:
        lines = ["WHAT WAS FOUND"]
        if self.heads:
            lines.append("  Attention heads that matter, by layer and head:")
            for head in self.heads:
                lines.append(f"    head {head['layer']}.{head['head']}  {_share(head)}")
        else:
            lines.append("  No single attention head carries a measurable part of the difference.")
        lines.append(
            "  Where the difference is, from the first layer to the last (the strongest position of each layer):"
        )
        for place in self.positions:
            where = f"position {place['pos']} ({place['token'].strip()})"
            lines.append(f"    before layer {place['layer']}: {where}  {_share(place)}")
        lines.append("  Whole layers of attention and MLP, strongest first:")
        for block in self.blocks:
            lines.append(f"    {block['site']} of layer {block['layer']}  {_share(block)}")
        return lines

    def _sure(self) -> list[str]:
        lines = ["HOW SURE"]
        if self.check is not None:
            c, n = self.check, len(self.heads)
            them = "that head" if n == 1 else f"those {n} heads"
            lines += [
                f"  Putting {them} back into the corrupt run recovers {c.put_back:.0%} of the difference;",
                f"  knocking {'it' if n == 1 else 'them'} out of the clean run loses {c.knocked_out:.0%}.",
                f"  As many other heads at random (mean of {c.draws} draws): {c.random_put_back:.0%} and "
                f"{c.random_knocked_out:.0%}.",
            ]
        if self.pairs < FEW:
            lines.append(f"  With {_count(self.pairs, 'pair')} there is no interval and no test: add pairs for those.")
        else:
            lines.append(
                f"  Brackets are 95% bootstrap intervals over {self.pairs} pairs; heads are reported when significant"
            )
            lines.append("  at a false-discovery rate of 5% (sign-flip permutation, Benjamini-Hochberg).")
        lines.append(f"  Rounding alone moves the measure by at most {self.noise_floor:.1g}.")
        return lines

    def _next(self) -> list[str]:
        lines = ["WHAT TO DO NEXT"]
        if self.figures:
            lines.append("  Look at the figures:")
            lines += [f"    {path}  ({what})" for what, path in self.figures.items()]
        if self.heads:
            first = self.heads[0]
            lines.append(f"  See where head {first['layer']}.{first['head']} acts:")
            lines.append(
                f'    ip.sweep(model, clean, corrupt, ip.grid("z", layer={first["layer"]}, head={first["head"]}, '
                'pos="all"), metric=metric)'
            )
        lines.append("  Do the same to a model of your own: python -m interp demo --help")
        return lines


def _share(cell: dict[str, Any]) -> str:
    interval = "" if np.isnan(cell["low"]) else f"  [{cell['low']:+.0%}, {cell['high']:+.0%}]"
    return f"{cell['share']:+.0%}{interval}"


def _count(n: int, what: str) -> str:
    return f"{n} {what}" + ("" if n == 1 else "s")
