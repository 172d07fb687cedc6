"""What to hold at attention heads: a part of a circuit in place while the rest of it is trained around it.

After the "artificial optogenetics" of Singh et al., "What needs to go right for an induction head?" (2024). Each is an
intervention or a plan of the engine, so it composes, takes a strength, prints, saves, and is held by `Model.apply`. One
whose positions depend on the batch is made inside a function of the call's inputs::

    with model.apply(lambda inputs: match_pattern(1, 3, query=4, right=positions_of(inputs.ids))):
        loss = ...
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hooks import (
    Attend,
    AttendBack,
    CopyScores,
    ForbidBack,
    FromPositions,
    Index,
    Inputs,
    Intervention,
    Model,
    Plan,
    PlanError,
    ShapeError,
    Site,
    SiteError,
    as_plan,
    here,
    nearest,
    patch,
    scale,
    site,
    zero,
)
from interp.training.targets import Positions, induction_pattern_of, match_targets, table

Heads = int | Sequence[int] | None

PRESERVED = {"pattern": "pattern", "value": "v", "query": "q", "key": "k"}
"""What an ablation may leave as it would have been in later layers, and the site that this means."""


def previous_token(layer: int, head: Heads, *, pos: Index = None, offset: int = 1) -> Intervention:
    """Have heads attend to the token before, each with all its weight; the first token attends to itself.

    Args:
        layer: the block.
        head: the heads; None for all.
        pos: queries, by default all.
        offset: how many positions before; queries that have none so far back attend to themselves.
    """
    return Intervention(site("pattern", layer, head=head, pos=pos), AttendBack(_offset(offset)))


def match_pattern(
    layer: int,
    head: Heads,
    query: Positions,
    right: Positions,
    wrong: Positions | None = None,
    *,
    sharpness: float | Tensor = 1.0,
) -> Intervention:
    """Have heads attend from one query of each row to the right keys with weight s, to the wrong ones with the rest.

    Other queries keep their patterns. Arguments and errors as in `match_targets`.
    """
    pattern = match_targets(query, right, wrong, sharpness=sharpness)
    return Intervention(site("pattern", layer, head=head), Attend(pattern))


def induction_pattern(layer: int, head: Heads, inputs: Inputs, *, sharpness: float = 1.0) -> Intervention:
    """Have heads attend as induction heads: to what came after earlier occurrences of the query's token.

    Queries whose token has not occurred before keep their patterns.

    Args:
        layer: the block.
        head: the heads; None for all.
        inputs: the prompts, in which occurrences are found.
        sharpness: s, shared by the right keys; the other earlier keys share the rest.
    """
    return Intervention(site("pattern", layer, head=head), Attend(induction_pattern_of(inputs, sharpness=sharpness)))


def forbid_previous(layer: int, head: Heads, *, pos: Index = None, offset: int = 1) -> Intervention:
    """Forbid attention from each query to the token before it (scores -inf); what is left shares the weight.

    Args:
        layer: the block.
        head: the heads; None for all.
        pos: queries, by default all.
        offset: how many positions before.
    """
    return Intervention(site("scores", layer, head=head, pos=pos), ForbidBack(_offset(offset, least=0)))


def temperature(layer: int, head: Heads, t: float | Tensor) -> Intervention:
    """Divide the scores of heads by a temperature t > 0, a number or a tensor with the sizes of the scores' last axes.

    Raises:
        ShapeError: t is not positive.
    """
    if not (isinstance(t, (int, float, Tensor)) and bool((torch.as_tensor(t) > 0).all())):
        raise ShapeError(f"a temperature is a positive number, got {t!r}")
    return scale(site("scores", layer, head=head), 1 / t)


def ablate_heads(layer: int, head: Heads, *, pos: Index = None, at: str = "z") -> Intervention:
    """Set what heads write to zero: their mixed values (``at="z"``), or the values of key/value heads (``at="v"``).

    Raises:
        SiteError: `at` is neither.
    """
    if at not in ("z", "v"):
        raise SiteError(f"heads are ablated at 'z' or 'v', not {at!r}")
    return zero(site(at, layer, head=head, pos=pos))


def all_but(model: Model, layer: int, keep: int | Sequence[int], *, at: str = "z") -> Plan:
    """Ablate every head of a layer but some; see `ablate_heads`. Empty where all are kept.

    Raises:
        SiteError: the layer lacks a head that is to be kept.
    """
    kept = (keep,) if isinstance(keep, int) else tuple(keep)
    model.require(site(at, layer, head=kept))
    heads = model.sizes[site(at, layer).key]["head"]
    others = tuple(h for h in range(heads) if h not in {k % heads for k in kept})
    return as_plan(ablate_heads(layer, others, at=at) if others else None)


def preserving(
    what: str | Sequence[str],
    ablation: Intervention | Plan,
    layers: int | Sequence[int],
    *,
    base: Intervention | Plan | None = None,
    head: Heads = None,
    stop_gradient: bool = True,
) -> Plan:
    """An ablation after which some layers keep the patterns (values, queries, keys) that they would have had without.

    Two worlds on the same inputs: the first runs under `base`, the second under `base` and the ablation, and takes
    from the first what is preserved. So the effect of the ablation that goes *through* those patterns is left out
    (Singh et al. 2024, "pattern-preserving ablation").

    Args:
        what: "pattern", "value", "query" or "key" (before any rotary embedding), or several of them.
        ablation: what is done.
        layers: the layers that keep what they had; those after the ablation.
        base: other interventions of both worlds, as plans that are in force besides.
        head: the heads that keep it (key/value heads for values and keys); None for all.
        stop_gradient: take what is preserved as a constant, or let gradients flow through both worlds.

    Raises:
        PlanError: there is no such thing to preserve, nothing is ablated, or a layer does not come after the ablation.
    """
    parts = (what,) if isinstance(what, str) else tuple(what)
    for part in parts:
        if part not in PRESERVED:
            raise PlanError(f"what is preserved is {', '.join(PRESERVED)}, not {part!r}{nearest(part, PRESERVED)}")
    listed, done, common = (layers,) if isinstance(layers, int) else tuple(layers), as_plan(ablation), as_plan(base)
    if not len(done):
        raise PlanError("the ablation is empty: there is nothing to preserve against")
    first = min((item.site.layer for item in done if item.site.layer is not None), default=-1)
    early = [layer for layer in listed if layer <= first]
    if not listed or not parts or early:
        kept = " and ".join(parts)
        raise PlanError(f"layers {list(listed)} are to keep their {kept}, and the ablation is in layer {first}")
    # One plan for all layers: the first world is then run once.
    places = [site(PRESERVED[part], n, head=head) for n in listed for part in parts]
    kept = [patch(place, common, stop_gradient=stop_gradient) for place in places]
    return common + done + Plan(tuple(kept))


def copy_to_logits(
    layer: int, head: int, query: Positions, keys: Positions, tokens: Tensor | Sequence[int], *, rest: float = -1e9
) -> Intervention:
    """Let the logits be a head's pre-softmax scores on some keys, written onto given tokens; gradients flow through.

    The head's output and everything after it no longer matters at the query; it copies as an ideal head would.

    Args:
        layer: the block.
        head: the head.
        query: absolute position of the logits and of the query, int or int [B].
        keys: positions of the keys, int [B, m] (or a list of m for all rows).
        tokens: the token whose logit each key's score becomes, int [B, m] (or m for all rows); distinct in a row.
        rest: the logit of every other token.

    Raises:
        ShapeError: not as many tokens as keys, a token twice in a row, or a key after its query.
    """
    queries = table(query, "query")
    places = table(torch.as_tensor(keys)[None] if torch.as_tensor(keys).ndim == 1 else keys, "keys")
    written = torch.as_tensor(tokens)
    written = table(written[None] if written.ndim == 1 else written, "tokens")
    if written.shape[1] != places.shape[1]:
        raise ShapeError(f"{written.shape[1]} tokens for {places.shape[1]} keys: one for each")
    ordered = written.sort(1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise ShapeError("tokens: a row names one token twice, and a logit holds one score")
    if queries.shape[1] != 1 or bool((places > queries).any()):
        raise ShapeError("keys: each comes before the one query of its row, or is it")
    at = queries.flatten()
    pos: Index = int(at) if len(at) == 1 else at
    key_pos: Index = tuple(places[0].tolist()) if len(places) == 1 else places
    read = here(site("scores", layer, head=head, pos=pos, key_pos=key_pos))
    one = written[:, None] if len(written) > 1 else written
    return Intervention(site("logits", pos=pos), CopyScores(one, rest), (read,))


def attention_from(
    layer: int,
    source: Sequence[int],
    *,
    residual: Site | str = "blocks.0.hook_resid_pre",
    parts: Sequence[str] = ("q", "k"),
) -> Plan:
    """Have a layer's queries, keys or values computed from the residual of other positions of an earlier site.

    With the residual before the first layer and the default parts, the layer's *patterns* are what they would be if an
    ideal earlier layer had put at position p the embedding of position ``source[p]``. For the task of exemplar and
    label pairs, ``residual_from(1, range(5)) + attention_from(1, (0, 0, 1, 2, 4))`` holds the first layer: patterns as
    if each token between the first and the last held the one to its left, and all else from the plain embeddings
    (Singh et al. 2024).

    Args:
        layer: the block.
        source: for each position from 0 on, which position's residual it gets; every row has at least as many tokens,
            and later positions keep their own.
        residual: the site [B, T, M] that is read; gradients flow into it.
        parts: which of "q", "k" and "v" are computed so.

    Raises:
        PlanError: no such part.
        ShapeError: no position is given, or one outside of them.
    """
    if not parts or set(parts) - {"q", "k", "v"}:
        raise PlanError(f"the parts of attention are q, k and v, one or more of them; got {tuple(parts)}")
    return Plan(tuple(_from_positions(site(f"{part}_input", layer), source, residual) for part in parts))


def residual_from(
    layer: int, source: Sequence[int], *, residual: Site | str = "blocks.0.hook_resid_pre"
) -> Intervention:
    """Have the residual stream before a layer be that of other positions of an earlier site.

    With ``source=range(n)``, what the layers between the two add reaches nothing after them: neither this layer nor,
    by the residual stream, any later one or the output.

    Args:
        layer: the block.
        source: for each position from 0 on, which position's residual it gets; every row has at least as many tokens,
            and later positions keep their own.
        residual: the site [B, T, M] that is read; gradients flow into it.

    Raises:
        ShapeError: no position is given, or one outside of them.
    """
    return _from_positions(site("resid_pre", layer), source, residual)


def graft_residual(layer: int, donor: Model) -> Callable[[Inputs], Intervention]:
    """Start a layer from another model's residual: a function of inputs, to hold with `Model.apply`.

    The donor runs on the same token ids, in the mode that it is in, without gradients; its residual before block
    `layer` [B, T, M] replaces the model's own as a constant. So everything before that block is the donor's, and gets
    no gradient. For weights instead of activations, and for the other half, see `graft`.
    """
    place = site("resid_pre", layer)

    def grafted_residual(inputs: Inputs) -> Intervention:
        return patch(place, donor.run(inputs, capture=place).tape)

    return grafted_residual


def _from_positions(place: Site, source: Sequence[int], residual: Site | str) -> Intervention:
    found = tuple(source)
    if not found or not all(isinstance(p, int) and 0 <= p < len(found) for p in found):
        raise ShapeError(f"source: each of the {len(found)} positions takes from one of them, got {found}")
    where = tuple(range(len(found)))
    read = here(site(residual).at(pos=where))
    return Intervention(place.at(pos=where), FromPositions(torch.tensor(found)), (read,))


def _offset(offset: int, least: int = 1) -> int:
    if not isinstance(offset, int) or isinstance(offset, bool) or offset < least:
        raise ShapeError(f"an offset is a whole number of positions, at least {least}, got {offset!r}")
    return offset
