"""Decoding under a plan with one graph for every step, which a GPU replays."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .audit import Audit
from .backends.exposing import INSIDE
from .backends.sources import all_reads
from .compiling import Graphs
from .errors import ModelError, PlanError, UnfiredError
from .fed import Decoding, Fed
from .generated import Generated, until_end
from .generation import ends_of, require_generates, texts_of
from .hold import hold, holds_on
from .lowering import Lowered, Lowering
from .plan.inputs import Inputs
from .plan.plan import Intervention, Plan, World
from .program import Program, State
from .resolving import resolve
from .text import Text


class Stepper:
    """The steps of one text with a static cache, each a call of the same graph.

    The program of a step is made anew only where another intervention comes in or goes, or one depends on the position.

    Attributes:
        cache: of transformers, static; `text` what it holds, with the tokens that are fed next.
        audit: of the plan.
    """

    def __init__(self, graphs: Graphs, plan: Plan, prompts: Inputs, cache: Any, width: int, audit: Audit, seed: int):
        self.graphs, self.plan, self.prompts, self.cache = graphs, plan, prompts, cache
        self.audit, self.seed, self.text = audit, seed, Text.of(prompts.mask)
        self._decoding = Decoding()
        begun = Fed(prompts, self.text.layout(0, None, {}), self._decoding, self.text, cache, True, True)
        begun.note_counted(plan, audit.entries, graphs.network.sizes)
        self._decoding.counted = prompts.width
        self._known: tuple[tuple[int, ...], Program, Lowered] | None = None
        device = graphs.network.device
        real = prompts.mask.to(device)
        self._positions = real.sum(1, keepdim=True) - 1
        # Which keys may be attended to; the rest of the cache is not written yet.
        self._allowed = torch.zeros(len(real), 1, 1, width, dtype=torch.bool, device=device)
        self._allowed[:, 0, 0, : prompts.width] = real

    def step(self, ids: Tensor) -> Tensor:
        """Feed one token a row, ids [B, 1] on the model's device; returns the logits [B, V] that follow it."""
        network, rows = self.graphs.network, len(ids)
        past = self.text.width
        self.text = self.text.fed(torch.ones(rows, 1, dtype=torch.bool))
        program, lowered = self._program(past)
        self._positions = self._positions + 1
        self._allowed[..., past] = True
        arguments: dict[str, Any] = {
            "input_ids": ids,
            "position_ids": self._positions + network.architecture.first_position,
            "attention_mask": self._allowed,
            "past_key_values": self.cache,
            "use_cache": True,
        }
        tried = World(self.prompts, Plan(tuple(item.at(pos=None) for item in program.plan)))
        logits, changes = self.graphs.stepped(arguments, rows, program.touched, lowered, tried, self.seed)
        live = self._known[0] if self._known is not None else ()
        report = program.report(State({}, changes))
        for number, entry in zip(live, report, strict=True):
            self.audit[number].absorb(entry)
        return logits[:, -1]

    def _program(self, past: int) -> tuple[Program, Lowered]:
        network = self.graphs.network
        # A token of a prompt's, or of another turn, is in the cache already.
        layout = self.text.layout(past, None, {})
        inputs = Inputs.of(torch.zeros(len(self.text.rows), 1, dtype=torch.int64))
        fed = Fed(inputs, layout, self._decoding, self.text, self.cache, True, True)
        live = tuple(fed.live(self.plan, network.sizes))
        items = tuple(self.plan[number] for number in live)
        for item in items:
            _require_stepped(item)
        if self._known is None or self._known[0] != live or any(item.op.looks for item in items):
            world = World(inputs, Plan(items))
            if all_reads([world]):
                raise PlanError(
                    "the plan reads other worlds, or this one unedited, for new tokens: hold it with apply() and call "
                    "generate(), where each world has a cache"
                )
            made = resolve(world, network.sizes, {}, device=network.device, seed=self.seed, layout=layout)
            entries = tuple(self.audit[number] for number in live)
            first = fed.counted(made, entries, network.sizes)
            lowering = Lowering(layout, network.device, network.dtype, False)
            lowering.padded = False  # all that is fed is real
            lowered = lowering.program(made)
            self._known = (live, _without_rows(first), lowered)
            self._decoding.counted = self.text.width
            return first, lowered
        self._decoding.counted = self.text.width
        return self._known[1], self._known[2]


def _without_rows(program: Program) -> Program:
    """The same for the steps after, which touch the rows that were counted."""
    steps = {key: tuple(replace(step, rows=0) for step in found) for key, found in program.steps.items()}
    return replace(program, steps=steps)


def _require_stepped(item: Intervention) -> None:
    """Refuse what differs from step to step in more than its tensors.

    Raises:
        PlanError: a site inside attention, whose keys grow.
    """
    if item.site.name in INSIDE:
        raise PlanError(
            f"{item}: the keys of a step grow, and a graph is of one size: scores, patterns and rotated queries and "
            "keys of new tokens are edited under apply(), in generate()"
        )


@torch.no_grad()
def decoded(
    graphs: Graphs, plan: Plan, prompts: Inputs, tokens: int, seed: int, tokenizer: Any, options: Mapping[str, Any]
) -> Generated:
    """Decode greedily, each step a call of one graph; see `Compiled.generate`."""
    from transformers import StaticCache

    network = graphs.network
    network.refresh()
    module = require_generates(network, prompts, options, plan)
    if holds_on(network.module) is not None:
        raise PlanError("a plan is held on the model, which the graph of a step does not know: give it to generate()")
    config = module.config.get_text_config(decoder=True)
    window = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    kinds = set(getattr(config, "layer_types", None) or [window])
    if kinds != {"full_attention"}:
        raise ModelError(
            f"layers of {network.architecture.family} slide or keep a state ({', '.join(sorted(kinds))}), whose masks "
            "differ: generate() of the model itself decodes them under a plan"
        )
    if prompts.pictures is not None:
        raise ModelError("prompts with images are decoded by generate() of the model itself: a graph has no tower")
    width, device = prompts.width + tokens, network.device
    cache = StaticCache(config=config, max_cache_len=width)
    arguments: dict[str, Any] = {"input_ids": prompts.ids.to(device), "past_key_values": cache, "use_cache": True}
    if not bool(prompts.mask.all()):
        arguments["attention_mask"] = prompts.mask.long().to(device)
        arguments["position_ids"] = (prompts.positions + network.architecture.first_position).to(device)
    with suppress(UnfiredError), hold(network, plan, seed) as audit:  # new tokens come later
        first = module(**arguments).logits[:, -1]
    stepper = Stepper(graphs, plan, prompts, cache, width, audit, seed)
    ids, logits = first.argmax(-1, keepdim=True), [first]
    new = [ids]
    for _ in range(tokens - 1):
        logits.append(stepper.step(ids))
        ids = logits[-1].argmax(-1, keepdim=True)
        new.append(ids)
    audit.require_fired()
    said = torch.cat(new, 1).cpu()
    answered = until_end(said, ends_of(module, options)[0], None)
    mask = torch.cat([prompts.mask, answered], 1)
    return Generated(
        prompts,
        torch.cat([prompts.ids, said], 1),
        mask,
        torch.arange(len(said)),
        texts_of(tokenizer, said, answered),
        torch.stack(logits, 1),
        audit,
        None,
    )
