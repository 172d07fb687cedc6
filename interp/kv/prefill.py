"""A context read in chunks under a budget, and answers generated from what is kept of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hooks import Inputs, InputsError, Model
from interp.evaluation import require_eval
from interp.kv.cache import new_cache
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
        state.prefilling = False
        if eviction.local:
            cache.logits = feed(model, cache, inputs, slice(before, inputs.width))
    return cache


def feed(model: Model, cache: Any, inputs: Inputs, columns: slice) -> Tensor:
    """Feed some columns to a model that attends to a cache, and return the logits [B, V] of the last."""
    ids, mask = inputs.ids[:, columns].to(model.device), inputs.mask[:, : columns.stop].to(model.device)
    out = model.module(
        input_ids=ids, attention_mask=mask.long(), past_key_values=cache, use_cache=True, logits_to_keep=1
    )
    return out.logits[:, -1]


@torch.no_grad()
def follow(model: Model, cache: Any, ids: Tensor) -> Tensor:
    """Feed what follows a context, int64 [B, T], to a copy-free cache, and return its logits [B, T, V].

    The cache holds it afterwards.
    """
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
    """
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
