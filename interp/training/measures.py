"""What is measured of attention heads while they form: strengths, scores, and metrics under plans.

Everything here reads a wrapped model on given inputs, without gradients, and is meant for a `Probe`, and puts the
model into evaluation mode meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hooks import Inputs, MetricError, Model, Site, World, as_plan, linear_weight, site
from interp.evaluation import evaluate
from interp.lens import check_readout
from interp.metrics import Metric
from interp.parts import frozen_norm, head_outputs
from interp.training.heads import ablate_heads
from interp.training.targets import Positions, induction_targets, table
from interp.training.untouched import evaluating


def attention(model: Model, inputs: Inputs | World, layer: int, query: Positions, key: Positions) -> Tensor:
    """Attention of each head from one query of each row to some keys, summed over the keys: [B, H].

    Args:
        model: the wrapped model.
        inputs: the prompts, or a world.
        layer: the block.
        query: absolute position, int or int [B].
        key: absolute positions, int, int [B] or int [B, n].

    Raises:
        MetricError: several queries a row, or positions of another number of rows.
    """
    world = inputs if isinstance(inputs, World) else World(inputs)
    rows = len(world.inputs)
    queries, keys = table(query, "query"), table(key, "key")
    if queries.shape[1] != 1 or any(len(t) not in (1, rows) for t in (queries, keys)):
        raise MetricError(
            f"one query a row, and one for all rows or for each of {rows}; got query {list(queries.shape)}, key "
            f"{list(keys.shape)}"
        )
    place = Site("pattern", layer, pos=queries.expand(rows, 1), key_pos=keys.expand(rows, -1))
    with evaluating(model.module):
        return model.run(world, capture=place).tape[place].sum((2, 3))


def induction_strength(
    model: Model, inputs: Inputs | World, layer: int, query: Positions, right: Positions, wrong: Positions
) -> Tensor:
    """Attention from the query to the right keys minus that to the wrong ones, the mean over rows: [H], from -1 to 1.

    (Singh et al. 2024.) Arguments as in `attention`, [B] or [B, n] for keys.
    """
    good = attention(model, inputs, layer, query, right)
    return (good - attention(model, inputs, layer, query, wrong)).mean(0)


def previous_token_strength(model: Model, inputs: Inputs | World) -> Tensor:
    """Attention to the token before, the mean over all tokens but the first of each row: [L, H], from 0 to 1.

    Raises:
        MetricError: no row has two tokens.
    """
    return _mean_attention(model, inputs, lambda x: _back(x, 1))


def prefix_matching(model: Model, inputs: Inputs | World) -> Tensor:
    """Attention to what came after earlier occurrences of the query's token: [L, H], from 0 to 1.

    The mean over all queries whose token has occurred before, which on `repeated_tokens` are those of the second copy
    (Olsson et al. 2022).

    Raises:
        MetricError: no token occurs twice.
    """
    return _mean_attention(model, inputs, induction_targets)


def copying(model: Model, inputs: Inputs) -> Tensor:
    """How much each head by itself raises the logit of the right next token over the mean token: [L, H], in nats.

    A head's output goes through the final norm, its scale held at its value, and the unembedding (before any soft cap).
    The right token is the one that the induction rule gives, and the mean is over all queries whose token has occurred
    before; where the rule allows several tokens, over those.

    Raises:
        MetricError: no token occurs twice.
        ModelError: a final norm that is not a LayerNorm or an RMSNorm, or an unembedding that is not linear.
        PlanError: a plan that is held on the model edits what is read out.
    """
    with evaluating(model.module):
        return _copying(model, inputs)


def _copying(model: Model, inputs: Inputs) -> Tensor:
    check_readout(model, inputs)
    targets = induction_targets(inputs)
    if not bool(targets.any()):
        raise MetricError("no token of these prompts occurs twice: use repeated_tokens()")
    row, query, key = targets.nonzero(as_tuple=True)
    share = 1 / targets.sum(-1)[row, query].double()
    weight = share / share.sum()
    arch = model.architecture
    last = Site("resid_post", model.n_layers - 1)
    sites = [Site("z", layer) for layer in range(model.n_layers)]
    tape = model.run(inputs, capture=[last, *sites]).tape
    with torch.no_grad(), model.suspended():
        unembed, _ = linear_weight(arch.unembed)
        column = inputs.order[row, query].to(unembed.device)
        right = unembed[inputs.ids[row, inputs.order[row, key]].to(unembed.device)] - unembed.mean(0)
        row, weight = row.to(unembed.device), weight.to(unembed.device, unembed.dtype)
        frozen = frozen_norm(arch.norm, tape[last][row, column][:, None])
        found = []
        for place, block in zip(sites, arch.blocks, strict=True):
            each = head_outputs(block, tape[place][row, column])
            found.append(torch.einsum("nhm,nm,n->h", frozen(each), right, weight))
    return torch.stack(found)


def repeated_tokens(model: Model, rows: int, length: int, *, seed: int = 0, first: int | None = None) -> Inputs:
    """Random tokens, then the same once more: rows of 2 `length` tokens, and one before them where it is given.

    No token occurs twice in a copy, so that a token's earlier occurrence is one.

    Args:
        model: whose vocabulary is drawn from.
        rows: number of rows.
        length: tokens of one copy.
        seed: of the draws.
        first: a token to begin every row with (one that begins texts), which is not drawn again.

    Raises:
        MetricError: the vocabulary is too small.
    """
    vocabulary = model.architecture.token_ids
    if not 0 < length < vocabulary - (first is not None) + 1 or rows < 1:
        raise MetricError(f"{rows} rows of {length} different tokens cannot be drawn from {vocabulary}")
    generator = torch.Generator().manual_seed(seed)
    options = torch.tensor([i for i in range(vocabulary) if i != first])
    half = torch.stack([options[torch.randperm(len(options), generator=generator)[:length]] for _ in range(rows)])
    ids = torch.cat([half, half], 1)
    if first is not None:
        ids = torch.cat([torch.full((rows, 1), first), ids], 1)
    return model.inputs(ids)


def under(model: Model, inputs: Inputs, metric: Metric, plan: Any) -> float:
    """A metric of the model evaluated under a plan that it may not have been trained with: the mean over rows.

    The progress measures of Singh et al. (2024): the loss with one part of the circuit given says how far the rest is.

    Args:
        model: the wrapped model.
        inputs: the prompts.
        metric: what is measured.
        plan: a plan, or a function from inputs to one.
    """
    given: Any = plan(inputs) if callable(plan) else plan
    with evaluating(model.module):
        return float(evaluate(model, World(inputs, as_plan(given)), metric).mean())


def heads_alone(model: Model, inputs: Inputs, layer: int, metric: Metric, *, plan: Any = None) -> Tensor:
    """A metric with each head of a layer alone, the others ablated (z = 0): the mean over rows, [H].

    Args:
        model: the wrapped model.
        inputs: the prompts.
        layer: the block.
        metric: what is measured, as the accuracy.
        plan: what is in force besides.

    Raises:
        SiteError: the model lacks the layer.
    """
    heads = _heads(model, layer)
    others = [tuple(o for o in range(heads) if o != h) for h in range(heads)]
    return _ablated(model, inputs, layer, metric, plan, others)


def heads_without(model: Model, inputs: Inputs, layer: int, metric: Metric, *, plan: Any = None) -> Tensor:
    """A metric without each head of a layer (z = 0): the mean over rows, [H]; arguments as in `heads_alone`."""
    heads = _heads(model, layer)
    return _ablated(model, inputs, layer, metric, plan, [(h,) for h in range(heads)])


def _heads(model: Model, layer: int) -> int:
    model.require(site("z", layer))
    return model.sizes[site("z", layer).key]["head"]


def _ablated(
    model: Model, inputs: Inputs, layer: int, metric: Metric, plan: Any, sets: list[tuple[int, ...]]
) -> Tensor:
    base = as_plan(plan)
    plans = [base + ablate_heads(layer, heads) if heads else base for heads in sets]
    return torch.tensor([under(model, inputs, metric, p) for p in plans], dtype=torch.float64)


def _mean_attention(model: Model, inputs: Inputs | World, targets: Callable[[Inputs], Tensor]) -> Tensor:
    """Attention summed over target keys bool [B, P, P], the mean over queries that have any: [L, H]."""
    world = inputs if isinstance(inputs, World) else World(inputs)
    wanted = targets(world.inputs)
    if not bool(wanted.any()):
        raise MetricError("these prompts have no such pair of tokens, so there is nothing to measure")
    sites = [Site("pattern", layer) for layer in range(model.n_layers)]
    with evaluating(model.module):
        tape = model.run(world, capture=sites).tape
    order = world.inputs.order[:, : wanted.shape[-1]].to(model.device)
    wanted = wanted.to(model.device)
    queries = wanted.any(-1).sum()
    found = []
    for place in sites:
        x = tape[place]
        x = x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
        x = x.gather(3, order[:, None, None, :].expand(-1, x.shape[1], x.shape[2], -1))
        found.append(torch.where(wanted[:, None], x, 0).sum((0, 2, 3)) / queries)
    return torch.stack(found)


def _back(inputs: Inputs, offset: int) -> Tensor:
    size = int(inputs.lengths.max())
    at = torch.arange(size)
    real = at < inputs.lengths[:, None]
    return (at[None, :] == at[:, None] - offset)[None] & real[:, :, None] & real[:, None, :]
