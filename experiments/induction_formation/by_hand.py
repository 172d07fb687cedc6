"""The plain module under a treatment, written out as one would without the library: one forward, read like the paper.

It knows neither plans nor stacked tensors, and nothing of the library's calls it: a loop of separate runs is made of it
(`benchmark`), and tests hold plans and the stacked program to it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from experiments.induction_formation.module import InductionModel
from experiments.induction_formation.task import QUERY, TOKENS, Batch
from experiments.induction_formation.treatments import Treatment
from interp.models.transformer import rotate

BLOCKED = -1e9


def logits_under(model: InductionModel, batch: Batch, treatment: Treatment) -> Tensor:
    """Logits at the query [B, labels].

    Args:
        model: one member.
        batch: classes and labels [2, B], target [B].
        treatment: what is held.
    """
    x = model.embed(batch.ids(len(model.embed.exemplars)))
    whole, _ = _layer(model, 0, (x, x, x, x), treatment)
    after, _ = _layer(model, 0, (x, x, x, x), treatment, ablate=treatment.ablate_first)
    if treatment.first_layer:
        after = x
    q_in, k_in, v_in = (whole if stream in treatment.preserve else after for stream in ("q", "k", "v"))
    if treatment.first_layer:
        q_in = k_in = x[:, [0, 0, 1, 2, 4]]
    held = None
    if treatment.match is not None:
        held = x.new_zeros(len(x), TOKENS)
        for row, target in enumerate(batch.target.tolist()):
            held[row, 1 + 2 * target], held[row, 3 - 2 * target] = treatment.sharpness, 1 - treatment.sharpness
    constant = treatment.preserve if treatment.stop_gradient else ()
    streams = (after, q_in, k_in, v_in)
    out, scores = _layer(model, 1, streams, treatment, ablate=treatment.ablate_last, held=held, constant=constant)
    if treatment.copy is None:
        return model.unembed(model.ln_final(out[:, QUERY]))
    of_head = scores[:, treatment.copy, QUERY]
    logits = x.new_full((len(x), model.unembed.out_features), BLOCKED)
    logits = logits.scatter(1, batch.labels[1][:, None], of_head[:, 3, None])
    return logits.scatter(1, batch.labels[0][:, None], of_head[:, 1, None])


def _layer(
    model: InductionModel,
    layer: int,
    streams: tuple[Tensor, Tensor, Tensor, Tensor],
    treatment: Treatment,
    ablate: tuple[int, ...] = (),
    held: Tensor | None = None,
    constant: tuple[str, ...] = (),
) -> tuple[Tensor, Tensor]:
    """Residual after a layer [B, T, M] and its scores [B, H, T, S]; the streams are what is added to, and q, k, v's."""
    x, q_in, k_in, v_in = streams
    block: Any = model.blocks[layer]
    attn, norm = block.attn, block.ln1

    def heads(part: str, stream: Tensor) -> Tensor:
        project = getattr(attn, f"{part}_proj")
        found = project(norm(stream)).unflatten(-1, (attn.num_heads, attn.head_dim)).transpose(1, 2)
        return found.detach() if part in constant else found

    cos, sin = model.rotary(torch.arange(TOKENS, device=x.device), x.dtype)
    q, k = rotate(heads("q", q_in), cos, sin), rotate(heads("k", k_in), cos, sin)
    scores = q @ k.transpose(-1, -2) * attn.scaling
    for head, t in (treatment.temperature_first, treatment.temperature_last)[layer]:
        scores = torch.cat((scores[:, :head], scores[:, head : head + 1] / t, scores[:, head + 1 :]), 1)
    open_ = torch.ones(TOKENS, TOKENS, dtype=torch.bool, device=x.device).tril()
    masked = scores.masked_fill(~open_, -torch.inf)
    if layer == 0:
        for head in treatment.no_previous_token:
            for t in range(1, TOKENS, 2 if treatment.labels_only else 1):
                where = torch.zeros_like(masked, dtype=torch.bool)
                where[:, head, t, t - 1] = True
                masked = masked.masked_fill(where, BLOCKED)
    rows = list(masked.softmax(-1).unbind(1))
    if layer == 0:
        for head in treatment.previous_token:
            previous = x.new_zeros(TOKENS, TOKENS)
            previous[range(TOKENS), [0, *range(TOKENS - 1)]] = 1
            rows[head] = previous.expand_as(rows[head])
    elif held is not None and treatment.match is not None:
        rows[treatment.match] = torch.cat((rows[treatment.match][:, :QUERY], held[:, None]), dim=1)
    pattern = torch.stack(rows, dim=1)
    kept = [0.0 if head in ablate else 1.0 for head in range(attn.num_heads)]
    z = pattern @ (heads("v", v_in) * x.new_tensor(kept)[:, None, None])
    return x + attn.o_proj(z.transpose(1, 2).flatten(-2)), scores
