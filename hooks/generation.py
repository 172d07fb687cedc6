"""A model's `generate` under a plan, as one call: what it is given, and what is made of what it returns."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .audit import Audit
from .backends.caching import require_makeable
from .capturing import captured
from .errors import InputsError, ModelError, PlanError, SiteError
from .generated import Generated, until_end
from .hold import hold
from .keeping import Keeping
from .models.network import Network
from .plan.inputs import Inputs
from .plan.plan import as_plan
from .plan.prompts import decode_ids
from .plan.sites import KEY, POS, Site

_OURS = {
    "inputs": "the prompt is the first argument",
    "input_ids": "the prompt is the first argument",
    "attention_mask": "the prompt brings its mask (mask= for a tensor of ids)",
    "position_ids": "positions follow from the prompt's mask",
    "pixel_values": "give images=, or what the processor makes of texts and images as the prompt",
    "inputs_embeds": "a prompt of embeddings has no tokens: hold the plan with apply() and call generate yourself",
    "output_logits": "say logits=True",
    "return_dict_in_generate": "what generate returned is `output` of what this returns",
}
_DRAWING = ("noise", "resample", "intervene")
_KEEPS_NO_STEP = ("guidance_scale", "custom_generate")


def generate(
    model: Network,
    prompts: Inputs,
    plan: Any,
    capture: Any,
    logits: bool,
    seed: int,
    tokenizer: Any,
    options: Mapping[str, Any],
) -> Generated:
    """Generate from prompts under a plan; see `Model.generate`."""
    module = require_generates(model, prompts, options, plan)
    sites = _sites(model, capture, options)
    if any(place.name == "logits" for place in sites):
        sites, logits = tuple(place for place in sites if place.name != "logits"), True
    ids, mask = prompts.ids, prompts.mask
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long()}
    if model.architecture.tower is not None:
        arguments |= model.architecture.tower.arguments(ids, mask, prompts.pictures)
    arguments = {name: v.to(model.device) if isinstance(v, Tensor) else v for name, v in arguments.items()}
    call: dict[str, Any] = {**arguments, **options}
    told = {"return_dict_in_generate": True, "output_logits": logits}
    if options.get("generation_config") is None:
        call |= told
    else:
        # The user's stays as it is, and transformers takes arguments beside one no more.
        call["generation_config"] = copy.deepcopy(options["generation_config"])
        call["generation_config"].update(**told)
    keeping, audit = Keeping(sites), Audit()
    if plan is None and not sites:
        output = module.generate(**call)
    else:
        with hold(model, () if plan is None else plan, seed, keeping) as audit:
            output = module.generate(**call)
    sequences = (output if isinstance(output, Tensor) else output.sequences).to("cpu")
    _require_known(prompts, sequences, output, logits)
    rows = torch.arange(len(prompts)).repeat_interleave(len(sequences) // len(prompts))
    new = sequences[:, prompts.width :]
    ends, pad = ends_of(module, options)
    answered = until_end(new, ends, pad)
    whole = torch.cat([mask[rows], answered], 1)
    beams = getattr(output, "beam_indices", None)
    beams = None if beams is None else beams.to("cpu")
    values: tuple[Tensor, ...] = ()
    if sites:
        if not keeping.calls or keeping.calls[0].start:
            raise SiteError("the beginning of the prompt was in the cache already, so its values are gone: leave out "
                            "capture=, or past_key_values=")  # fmt: skip
        values = keeping.values(sequences.shape[1] - 1, beams, whole[:, :-1])
    return Generated(
        prompts,
        sequences,
        whole,
        rows,
        texts_of(tokenizer, new, answered),
        _logits(output, beams, answered) if logits else None,
        audit,
        output,
        tuple(zip(sites, values, strict=True)),
        {place.key: model.sizes[place.key] for place in sites},
    )


def _draws(plan: Any) -> bool:
    """Whether what a plan does may depend on the numbers of rows, as far as one can tell."""
    if plan is None or callable(plan):
        return plan is not None
    return any(item.op.name in _DRAWING for item in as_plan(plan))


def require_generates(model: Network, prompts: Inputs, options: Mapping[str, Any], plan: Any) -> Any:
    """The module, where it can generate from the prompts.

    Raises:
        ModelError: it does not generate.
        InputsError: rows that are padded on the right, or have names of their own; an argument that is ours.
        PlanError: a cache that cannot be made here.
    """
    module: Any = model.module
    can, arch = getattr(module, "can_generate", None), model.architecture
    if arch.images is not None or arch.readout is not None or not hasattr(module, "generate") or (can and not can()):
        raise ModelError(
            f"{type(module).__name__} does not generate: decode in a loop of your own, with the plan held by apply()"
        )
    for name, why in _OURS.items():
        if name in options:
            raise InputsError(f"generate() takes no {name}=: {why}")
    told = options.get("generation_config") or getattr(module, "generation_config", None)
    kind, how = (
        options.get(f"cache_{name}", getattr(told, f"cache_{name}", None)) for name in ("implementation", "config")
    )
    require_makeable(kind, how, module)
    mask = prompts.mask
    if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise InputsError(
            "the prompts are padded on the right, and what a model writes follows the last column: give texts or "
            "lists of ids, or model.inputs(..., padding='left')"
        )
    if _draws(plan) and not torch.equal(prompts.row_ids, torch.arange(len(prompts))):
        raise InputsError(
            "a generation numbers its rows 0 .. B-1, and the plan draws by these numbers: make inputs without row_ids"
        )
    if model.tool is not None:
        model.tool.require(prompts.ids, mask)
    return module


def _require_known(prompts: Inputs, sequences: Tensor, output: Any, logits: bool) -> None:
    """Refuse what a way of decoding returns that is not the prompts and what follows them.

    Raises:
        PlanError: it is something else, or its logits were asked for and it keeps none.
    """
    many, odd = divmod(len(sequences), len(prompts))
    begins = sequences[:, : prompts.width]
    whole = prompts.ids.repeat_interleave(many, 0)
    if odd or begins.shape != whole.shape or not torch.equal(begins, whole):
        raise PlanError(
            "what generate() returned does not begin with the prompts (token_healing changes them): "
            "hold the plan with apply() and call generate yourself"
        )
    if logits and getattr(output, "logits", None) is None:
        raise PlanError("this way of decoding keeps no logits: leave out logits=True")


def _sites(model: Network, capture: Any, options: Mapping[str, Any]) -> tuple[Site, ...]:
    """What is to be kept of every step, each whole: a part of it is taken out on reading.

    Raises:
        SiteError: a site of the tower, or some positions alone.
        PlanError: a way of decoding whose steps are not kept.
    """
    sites = captured(model, capture)
    for place in sites:
        if place.stack == "vision" or place.key[2] is not None:
            raise SiteError(f"{place} is of the tower, which runs once, before the text: take it with run(capture=...)")
        if place.name == "logits" and place.restricted:
            raise SiteError("logits are kept whole, of every step: logits=True")
        if any(getattr(place, axis) is not None for axis in (POS, KEY) if axis in place.axes):
            raise SiteError(
                f"{place}: all positions of a generation are kept; take some of them from what it returns, as "
                f"out[{str(place)!r}]"
            )
    told = options.get("generation_config") or getattr(model.module, "generation_config", None)
    for name in _KEEPS_NO_STEP if sites else ():
        value = options.get(name, getattr(told, name, None))
        if value not in (None, 1, 1.0):
            raise PlanError(f"{name}={value!r} calls the model on texts of its own: leave out capture=")
    return tuple(dict.fromkeys(Site(place.name, place.layer) for place in sites))


def ends_of(module: Any, options: Mapping[str, Any]) -> tuple[list[int], int | None]:
    """The tokens that end a row, and what fills up rows that end otherwise."""
    told = options.get("generation_config") or module.generation_config

    def of(name: str) -> Any:
        # What is left open there is the model's own.
        if name in options:
            return options[name]
        found = getattr(told, name, None)
        return getattr(module.generation_config, name, None) if found is None else found

    ends = of("eos_token_id")
    listed = [] if ends is None else torch.as_tensor(ends).reshape(-1).tolist()
    otherwise = of("stop_strings") or options.get("stopping_criteria")
    pad = of("pad_token_id")
    # Without a token that ends rows, one that a criterion has stopped goes on until all have.
    return listed, int(torch.as_tensor(pad)) if listed and otherwise and pad is not None else None


def texts_of(tokenizer: Any, tokens: Tensor, answered: Tensor) -> tuple[str, ...] | None:
    """The text of each row of tokens [R, S], of those that are its answer, without special ones."""
    if tokenizer is None:
        return None
    special = set(getattr(tokenizer, "all_special_ids", ()))
    rows = [[i for i in row[m].tolist() if i not in special] for row, m in zip(tokens, answered, strict=True)]
    return tuple(decode_ids(tokenizer, row) if row else "" for row in rows)


def _logits(output: Any, beams: Tensor | None, answered: Tensor) -> Tensor:
    """The logits [R, S, V] that each token was chosen from."""
    steps: Sequence[Tensor] = output.logits[: answered.shape[1]]
    each = []
    for step, found in enumerate(steps):
        rows = torch.arange(len(found)) if beams is None else beams[:, min(step, beams.shape[1] - 1)].clamp_min(0)
        each.append(found[rows.to(found.device)])
    stacked = torch.stack(each, 1)
    return stacked.masked_fill(~answered[:, : len(each), None].to(stacked.device), torch.nan)
