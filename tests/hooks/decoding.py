"""The oracle of generation: the whole text is run anew at every step, under a plan that spells out its positions."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hooks import Inputs, Intervention, Model, New, Plan, Site, Span, Tape, World, as_plan, listed
from tests import zoo

CACHED = [family for family in zoo.FAMILIES if not family.startswith("small")]
"""The families that can generate."""
OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
ATOL = 1e-10


def assert_equal(got: Sequence[Tensor], want: Sequence[Tensor], atol: float = ATOL) -> None:
    """As many tensors, of the same shapes, with the same values; nan equals nothing."""
    assert len(got) == len(want) > 0
    for number, (one, two) in enumerate(zip(got, want, strict=True)):
        assert one.shape == two.shape, (number, one.shape, two.shape)
        # So that a difference, or a tolerance, that is nan fails.
        assert bool(((one - two).abs() <= atol).all()), (number, float((one - two).abs().max()))


def spelled(plan: Plan, real: Tensor, rows: Tensor, width: int) -> Plan:
    """A plan for a generation as one for a run of the whole text, whose positions are those of its columns.

    Args:
        plan: for prompts.
        real: bool [R, P], the columns of the prompts.
        rows: int64 [B], the prompt of each row of the text.
        width: columns of the text.
    """
    items = (_spelled(item, real, rows, width) for item in plan)
    return Plan(tuple(item for item in items if item is not None))


def _spelled(item: Intervention, real: Tensor, rows: Tensor, width: int) -> Intervention | None:
    prompt = real.shape[1]
    where: dict[str, Any] = {}
    for axis in ("pos", "key_pos"):
        index = getattr(item.site, axis)
        if axis not in item.site.axes or index is None:
            continue
        columns = [_columns(index, real, int(row), width) for row in rows]
        if listed(index):
            numbers = [
                [int(real[row, :column].sum()) for column in found] for row, found in zip(rows, columns, strict=True)
            ]
            where[axis] = torch.tensor(numbers)
            continue
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for row, found in enumerate(columns):
            mask[row, found] = True
        if not mask.any():
            return None
        where[axis] = mask
    only, weight = item.only, item.weight
    if only is not None:
        only = only[rows]
        if only.ndim == 2:
            only = torch.cat([only, torch.zeros(len(rows), width - prompt, dtype=torch.bool)], 1)
            if not only.any():
                return None
    if isinstance(weight, Tensor) and weight.ndim:
        weight = weight[rows]
    reads = tuple(replace(read, source=_of_rows(read.source, rows)) if read.aligned else read for read in item.reads)
    return replace(item, site=item.site.at(**where), only=only, weight=weight, reads=reads)


def _columns(index: Any, real: Tensor, row: int, width: int) -> list[int]:
    """The columns that an index means in one row of the text."""
    prompt = real.shape[1]
    tokens = [column for column in range(prompt) if real[row, column]]
    if isinstance(index, New):
        numbers = range(index.start, width - prompt if index.stop is None else min(index.stop, width - prompt))
        return [prompt + number for number in numbers[:: index.step]]
    if isinstance(index, Span):
        return tokens[slice(index.start, index.stop)]
    if isinstance(index, Tensor) and index.dtype == torch.bool:
        return [column for column in tokens if index[row, column]]
    if isinstance(index, Tensor):
        return [tokens[int(p)] for p in index[row].reshape(-1)]
    return [tokens[p] for p in (index if isinstance(index, tuple) else (index,))]


def _of_rows(source: Any, rows: Tensor) -> Any:
    def of(inputs: Inputs) -> Inputs:
        return Inputs.of(inputs.ids[rows], inputs.mask[rows], inputs.row_ids[rows])

    if isinstance(source, World):
        return World(of(source.inputs), source.plan)
    if isinstance(source, Tape):
        return Tape(of(source.inputs), tuple((place, v[rows]) for place, v in source.values), source.sizes)
    return source


@dataclass
class Recorded:
    """What a model was called for: the logits of the last token of each call, as it computed them."""

    logits: list[Tensor] = field(default_factory=list)
    tokens: Tensor = field(default_factory=lambda: torch.zeros(0))
    output: Any = None


def recorded(module: nn.Module, run: Callable[[], Any]) -> Recorded:
    """Call something that generates, and keep the logits."""
    found = Recorded()

    own = module._update_model_kwargs_for_generation

    def note(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        found.logits.append(outputs.logits.detach()[:, -1].clone())
        return own(outputs, *args, **kwargs)

    # What a hook would see, too, are the calls that are made once more for a world that is read.
    module._update_model_kwargs_for_generation = note
    try:
        found.output = run()
    finally:
        del module._update_model_kwargs_for_generation
    found.tokens = found.output if isinstance(found.output, Tensor) else found.output.sequences
    return found


def oracle(
    model: Model, real: Tensor, plan: Any, expand: int = 1, seed: int = 0, at: Callable[[int], Plan] | None = None
) -> nn.Module:
    """A copy of a model's module whose forward runs the whole text under the plan, spelled out.

    Args:
        real: bool [R, P], the columns of the prompts.
        expand: how many rows are generated of each.
        at: the plan spelled out for a width of the text, where it is to be another.
    """
    twin, plan = copy.deepcopy(model.module), as_plan(plan)
    rows = torch.arange(len(real)).repeat_interleave(expand)

    @functools.wraps(model.module.forward)
    def forward(input_ids: Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        width = input_ids.shape[1]
        mask = torch.cat([real[rows], torch.ones(len(rows), width - real.shape[1], dtype=torch.bool)], 1)
        inputs = Inputs.of(input_ids, mask, rows)
        whole = spelled(plan, real, rows, width) if at is None else at(width)
        run = model.run(inputs, whole, seed=seed)
        return CausalLMOutputWithPast(logits=run.logits)

    twin.forward = forward
    return twin


def generated(
    model: Model, x: Inputs, plan: Any, *, seed: int = 0, draws: int | None = None, **options: Any
) -> tuple[Recorded, Any]:
    """Generate under a plan; returns what was recorded, and the audit."""
    module = model.module
    arguments = {"input_ids": x.ids, "attention_mask": x.mask.long()} | OPTIONS | options
    with model.apply(plan, seed=seed) as audit:
        if draws is not None:
            torch.manual_seed(draws)
        found = recorded(module, lambda: module.generate(**arguments))
    return found, audit


def recomputed(
    model: Model, x: Inputs, plan: Any, *, seed: int = 0, draws: int | None = None, **options: Any
) -> Recorded:
    """Generate by the oracle, which has no cache."""
    options = {k: v for k, v in options.items() if k not in ("cache_implementation", "prefill_chunk_size", "use_cache")}
    expand = max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    twin = oracle(model, x.mask, plan, expand, seed)
    arguments = {"input_ids": x.ids, "attention_mask": x.mask.long(), "use_cache": False} | OPTIONS | options
    if draws is not None:
        torch.manual_seed(draws)
    return recorded(twin, lambda: twin.generate(**arguments))


def prompts(model: Model, padding: str = "left", seed: int = 1, lengths: Sequence[int] = (6, 4)) -> Inputs:
    """Prompts, longer than a sliding window."""
    return model.inputs(*zoo.random_inputs(zoo.VOCAB, list(lengths), padding, seed))


def has(model: Model, place: Site) -> bool:
    """Whether a model has a site."""
    return place.key in model.sizes
