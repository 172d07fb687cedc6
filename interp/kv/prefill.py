"""A context read in chunks under a budget, and answers generated from what is kept of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hooks import Inputs, InputsError, Model, ModelError
from interp.evaluation import require_eval
from interp.kv.cache import Evicted, new_cache
from interp.kv.eviction import Eviction
from interp.kv.policies import Policy
from interp.kv.seam import attending
from interp.progress import tqdm


@torch.no_grad()
def prefill(
    model: Model,
    inputs: Inputs,
    policy: Policy | None = None,
    eviction: Eviction | int | None = None,
    *,
    progress: bool | None = False,
    **settings: Any,
) -> Any:
    """Read a context in chunks, letting keys go after each, so that memory follows budget + chunk and not the context.

    Each chunk of the context but its last `local` tokens is fed against what is kept; its keys, values and scores
    are added,
    and every layer and head keeps its budget of the highest scores, the most recent `stabilizers` in any case,
    except after
    the last chunk. Then the last `local` tokens are fed (Huang et al. 2024, arXiv 2410.01805, algorithm 1).

    Args:
        model: a wrapped decoder of transformers, in evaluation mode.
        inputs: from ``model.inputs``; rows of other lengths are padded on the left.
        policy: what scores keys; None where all are kept.
        eviction: the budget and how it is kept, or the budget alone.
        progress: show a bar of chunks.
        settings: of `Eviction`, in place of what `eviction` says.

    Returns:
        An `EvictedCache`, a `transformers.Cache`; use it within ``ip.kv.attending(cache)``. `cache.logits` are those
        of the
        context's last token, [B, V].

    Raises:
        InputsError: a budget without a policy, one that is smaller than what is kept in any case, right padding, or
            a context
            that is no longer than its `local` tokens.
        MetricError, ShapeError: a policy gives nan or another shape.
    """
    require_eval(model, "prefill")
    model.check_inputs(inputs)
    if not isinstance(eviction, Eviction):
        eviction = Eviction(eviction, **settings)
    elif settings:
        eviction = eviction.but(**settings)
    require_fit(model, inputs, eviction.positions)
    cache = new_cache(model, eviction)
    if cache.budgets is not None and not isinstance(policy, Policy):
        raise InputsError(f"a budget needs a policy that says what is kept, not {policy!r}: ip.kv.snapkv(), say")
    if not bool((inputs.mask[:, 1:] >= inputs.mask[:, :-1]).all()):
        raise InputsError(
            "what follows a context comes right after it: pad on the left, model.inputs(..., padding='left')"
        )
    if eviction.local >= inputs.shortest:
        raise InputsError(
            f"a context of {inputs.shortest} tokens has none before the last {eviction.local}, which are kept"
        )
    cache.policy = policy
    before = inputs.width - eviction.local
    starts = list(range(0, before, eviction.chunk))
    with (
        attending(cache, policy) as state,
        tqdm(total=before, disable=None if progress is None else not progress) as bar,
    ):
        for start in starts:
            last = start == starts[-1]
            state.prefilling = policy is not None
            # Keys that the last chunk leaves are all chosen by their scores.
            state.stabilizers = 0 if last else eviction.stabilizers
            cache.logits = feed(model, cache, inputs, slice(start, min(start + eviction.chunk, before)))
            bar.update(min(start + eviction.chunk, before) - start)
        if eviction.local:
            # These are kept, whatever they score, which counts where keys go while decoding.
            state.keeping, state.prefilling = True, False
            cache.logits = feed(model, cache, inputs, slice(before, inputs.width))
    return cache


@torch.no_grad()
def require_fit(model: Model, inputs: Inputs, positions: str) -> None:
    """Check that a model can be attended to by the keys that it keeps; the first time, it is compared with itself.

    Raises:
        ModelError: it attends to later tokens, has no rotary positions to move, or its attention is something else.
    """
    if not hasattr(model.module, "prepare_inputs_for_generation"):
        raise ModelError(f"a cache is one of transformers, and {model!r} is not a decoder of theirs")
    attentions = [block.attention for block in model.architecture.blocks]
    if not all(attention.causal for attention in attentions):
        raise ModelError(f"{model!r} attends to later tokens, too: there is no cache of keys to let go")
    if any(attention.opaque or not hasattr(attention.module, "config") for attention in attentions):
        raise ModelError(
            f"{model!r} does not attend through the attention interface of transformers, by which keys that heads keep "
            "are attended to"
        )
    if positions == "slot" and any(attention.rotary is None for attention in attentions):
        raise ModelError("keys move to slots by their rotary angles, and this model has none: use positions='absolute'")
    if inputs.pixels is not None:
        raise InputsError("a context is text here, and these inputs have images")
    known = model.trusted
    if ("kv", positions) not in known:
        ids = inputs.ids[:1, inputs.mask[0]][:, :12]
        ids = ids if ids.shape[1] > 2 else ids.repeat(1, 3)
        whole = model.module(input_ids=ids.to(model.device), use_cache=False).logits[0, -1]
        cache = new_cache(model, Eviction(None, positions=positions))
        with attending(cache):
            for some in (ids[:, :2], ids[:, 2:]):
                out = model.module(input_ids=some.to(model.device), past_key_values=cache, use_cache=True).logits[0, -1]
        wide = torch.promote_types(out.dtype, torch.float32)
        apart = (out.to(wide) - whole.to(wide)).abs().max() / whole.to(wide).abs().max().clamp_min(1)
        limit = {torch.float64: 1e-5, torch.float32: 1e-3}.get(out.dtype, 0.1)
        known["kv", positions] = "" if float(apart) <= limit else f"{float(apart):.1e}"
    if known["kv", positions]:
        raise ModelError(
            f"with every key kept in place, {model!r} is {known['kv', positions]} away from its own forward: "
            f"its attention "
            "does something (a bias by distance, say) that keys which are kept are not attended with"
        )


def feed(model: Model, cache: Any, inputs: Inputs, columns: slice) -> Tensor:
    """Feed some columns to a model that attends to a cache, and return the logits [B, V] of the last."""
    ids, mask = inputs.ids[:, columns].to(model.device), inputs.mask[:, : columns.stop].to(model.device)
    out = model.module(
        input_ids=ids, attention_mask=mask.long(), past_key_values=cache, use_cache=True, logits_to_keep=1
    )
    return out.logits[:, -1]


def require_own(model: Model, cache: Any) -> None:
    """Check that a cache is of a model.

    Raises:
        ModelError: it is another one's, or none of `prefill`.
    """
    if not isinstance(cache, Evicted):
        raise ModelError(f"a cache here is what ip.kv.prefill() returned, not {type(cache).__name__}")
    if cache.model.module is not model.module:
        raise ModelError(f"this cache was made for another model, {cache.model!r}: prefill one with {model!r}")


@torch.no_grad()
def follow(model: Model, cache: Any, ids: Tensor) -> Tensor:
    """Feed what follows a context, int64 [B, T], to a copy-free cache, and return its logits [B, T, V].

    The cache holds it afterwards.

    Raises:
        ModelError: the cache is another model's.
    """
    require_own(model, cache)
    with attending(cache):
        return model.module(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True).logits


@torch.no_grad()
def generate(model: Model, cache: Any, inputs: Inputs, **settings: Any) -> Tensor:
    """``model.generate`` from an evicted cache: context and question `inputs`, of which the cache has read the
    beginning.

    The cache is used up: it holds what is generated afterwards, one row for each beam or sample.

    Returns:
        int64 [B, T + new], as `generate` does.

    Raises:
        InputsError: the cache has read all of them: something is to be left to feed.
        ModelError: the cache is another model's.
    """
    require_own(model, cache)
    if inputs.width <= cache.seen:
        raise InputsError(
            f"the cache has read {cache.seen} tokens, and {inputs.width} are given: give at least one more"
        )
    told = settings.get("generation_config") or model.module.generation_config
    lines = [settings.get(name) or getattr(told, name, None) or 1 for name in ("num_beams", "num_return_sequences")]
    if max(lines) > 1:
        cache.batch_repeat_interleave(max(lines))
    with attending(cache):
        module: Any = model.module
        return module.generate(
            inputs.ids.to(model.device),
            attention_mask=inputs.mask.long().to(model.device),
            past_key_values=cache,
            **settings,
        )
