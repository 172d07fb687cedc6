"""The two-layer attention-only network of the induction study, for many members at once.

Everything is feature-major with the batch last: [M, features, tokens, B]. Projections are then batched products of a
weight [M, out, in] with columns, and attention over five tokens is element-wise arithmetic along a contiguous batch.
Only what reaches the logits is computed: a first-layer projection once a distinct token (the query repeats an exemplar,
labels are few), and the last layer at the query alone. `module.InductionModel` is the same network plainly.

Source: Singh et al., "What needs to go right for an induction head?" (ICML 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from experiments.induction_formation.task import QUERY, TOKENS, Batch
from experiments.induction_formation.treatments import TO_THE_LEFT
from hooks import ModelError, hash_counters

Params = dict[str, Tensor]
BLOCKED = -1e9
"""Added to scores that a member may not attend by: as -inf there, and no gradient of it is NaN."""
EVEN = 8
"""Columns are padded to a multiple of this, at which the matrix products of CPUs lose nothing on ragged edges."""


@dataclass(frozen=True)
class Shape:
    """Sizes of the network.

    Attributes:
        d_input: numbers of an exemplar.
        d_model: width of the residual stream M.
        n_heads: heads a layer H.
        rotary_base: base of the rotary wavelengths, in tokens.
        norm_eps: added to the variance in every norm.

    Raises:
        ModelError: heads that do not divide the width into even parts, as rotary positions need.
    """

    d_input: int = 512
    d_model: int = 64
    n_heads: int = 8
    rotary_base: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.n_heads < 1 or self.d_model % (2 * self.n_heads):
            raise ModelError(f"a width of {self.d_model} does not divide into {self.n_heads} heads of even width")

    @property
    def d_head(self) -> int:
        """D."""
        return self.d_model // self.n_heads


class Output(NamedTuple):
    """What a forward pass gives at the query.

    Attributes:
        logits: [M, labels, B]; -inf at labels that a member does not have.
        scores: of the last layer before its softmax [M, H, S, B].
        pattern: of the last layer [M, H, S, B].
        first_pattern: of the first layer [M, H, T, S, B].
    """

    logits: Tensor
    scores: Tensor
    pattern: Tensor
    first_pattern: Tensor


def initial(shape: Shape, n_labels: int, seed: int) -> Params:
    """One member's parameters in float64: LeCun-normal, label embeddings of deviation 0.02, norms at 1, biases 0.

    Normals are truncated at two deviations; LeCun-normal ones are rescaled to keep their variance.
    """
    generator = torch.Generator().manual_seed(int(hash_counters(seed, 1)) % 2**63)
    m = shape.d_model

    def lecun(rows: int, columns: int) -> Tensor:
        return truncated(rows, columns) * (columns**-0.5 / 0.87962566103423978)

    def truncated(rows: int, columns: int) -> Tensor:
        out = torch.empty(rows, columns, dtype=torch.float64)
        return torch.nn.init.trunc_normal_(out, a=-2.0, b=2.0, generator=generator)

    params = {"embed.weight": lecun(m, shape.d_input), "embed.bias": torch.zeros(m)}
    params["label"] = 0.02 * truncated(n_labels, m)
    for layer, names in ((0, ("qkv",)), (1, ("q", "kv"))):
        for name in names:
            params[f"{name}{layer}"] = torch.cat([lecun(m, m) for _ in name])
        params[f"out{layer}"] = lecun(m, m)
    params["read.weight"], params["read.bias"] = lecun(n_labels, m), torch.zeros(n_labels)
    for norm in ("ln0", "ln1", "ln_final"):
        params[f"{norm}.weight"], params[f"{norm}.bias"] = torch.ones(m), torch.zeros(m)
    return {name: value.double() for name, value in params.items()}


def stack_initial(
    shape: Shape, n_labels: Sequence[int], seeds: Sequence[int], dtype: torch.dtype, least: int = 0
) -> Params:
    """Parameters of many members [M, ...]; rows of labels that a member does not have, of `least` or more, are zero."""
    most = max(least, *n_labels)
    members = []
    for labels, seed in zip(n_labels, seeds, strict=True):
        params = initial(shape, labels, seed)
        for name in ("label", "read.weight", "read.bias"):
            missing = most - labels
            params[name] = torch.cat((params[name], params[name].new_zeros(missing, *params[name].shape[1:])))
        members.append(params)
    return {name: torch.stack([m[name] for m in members]).to(dtype) for name in members[0]}


def rotary(shape: Shape, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Cosines and sines of the rotary angles of five tokens: [2, D / 2, T] (Su et al. 2021; halves as in Llama)."""
    exponent = torch.arange(0, shape.d_head, 2, dtype=torch.float64) / shape.d_head
    angles = torch.arange(TOKENS) * shape.rotary_base ** -exponent[:, None]
    return torch.stack((angles.cos(), angles.sin())).to(device, dtype)


def forward(params: Params, batch: Batch, constants: dict[str, Tensor], shape: Shape) -> Output:
    """Run every member on its own sequences, holding what it holds.

    Args:
        params: [M, ...], as `stack_initial` gives them.
        batch: classes [M, 2, B], labels [M, 2, B], target [M, B].
        constants: ``exemplars`` [classes, d_input], ``first_row`` where members have tables of their own (which row is
            their class 0, [M]), ``rotary`` (see `rotary`), ``unused`` (0, or -inf at labels that a member lacks,
            [M, labels, 1]), and what `stacked.stack` gives.
        shape: sizes of the network.
    """
    c, p = constants, params
    members, _, size = batch.classes.shape
    m, h, d = shape.d_model, shape.n_heads, shape.d_head
    target = batch.target.bool()
    n_labels = p["label"].shape[1]
    # The exemplars in play are fewer than a batch's tokens, or more: embed each once, or each token's.
    which, rows = batch.classes.flatten(1), len(c["exemplars"])
    if "first_row" in c:
        which = which + c["first_row"][:, None]
    each_once = rows <= which.shape[1]
    if each_once:
        embedded = (p["embed.weight"].flatten(0, 1) @ c["exemplars"].T).view(members, m, rows)
        embedded = embedded + p["embed.bias"][..., None]
    else:
        vectors = c["exemplars"][which].transpose(1, 2)
        embedded = torch.baddbmm(p["embed.bias"][..., None], p["embed.weight"], vectors)
    tokens = torch.cat((embedded, p["label"].transpose(1, 2)), dim=2)
    spare = -tokens.shape[2] % EVEN
    tokens = torch.nn.functional.pad(tokens, (0, spare))
    table = torch.cat((tokens, torch.bmm(p["qkv0"], _norm(tokens, p, "ln0", shape))), dim=1)
    of_exemplars, of_labels, _ = table.split((embedded.shape[2], n_labels, spare), dim=2)
    of_labels = _columns(of_labels, batch.labels.flatten(1)).view(members, 4 * m, 2, size)
    if each_once:
        of_exemplars = _columns(of_exemplars, which)
    of_exemplars = of_exemplars.reshape(members, 4 * m, 2, size)
    query = torch.where(target[:, None], of_exemplars[:, :, 1], of_exemplars[:, :, 0])
    at = (of_exemplars[:, :, 0], of_labels[:, :, 0], of_exemplars[:, :, 1], of_labels[:, :, 1], query)
    x, q, k, v = torch.stack(at, dim=2).split(m, dim=1)

    turned = c["rotary"] * d**-0.5  # the scale on the queries: smaller than scores are, and nothing for the gradient
    if "scale_first" in c:
        q = q.unflatten(1, (h, d)) * c["scale_first"][..., None, None, None]
        q = q.flatten(1, 2)
    # Added, not filled in: the gradient of a sum costs nothing, and what is at -inf has none.
    barred = _barred(x)
    if "blocked" in c:
        barred = barred + BLOCKED * c["blocked"][..., None].to(x.dtype)
    first_pattern = _softmax(_scores(_rotate(q, turned, h), _rotate(k, c["rotary"], h)) + barred, dim=3)
    if "previous" in c:
        share = c["previous"][..., None, None, None]
        first_pattern = first_pattern * (1 - share) + share * _previous(x)
    z = (first_pattern[:, :, None] * v.view(members, h, d, 1, TOKENS, size)).sum(4)
    whole = x + torch.bmm(p["out0"], z.reshape(members, m, -1)).view_as(x)
    after = whole
    if "gate_first" in c:
        gated = z * c["gate_first"][..., None, None, None]
        after = x + torch.bmm(p["out0"], gated.reshape(members, m, -1)).view_as(x)
    if "bare" in c:
        share = c["bare"][:, None, None, None]
        after = after * (1 - share) + x * share

    scores, v = _last_layer_reads(p, c, shape, x, after, whole)
    if "scale_last" in c:
        scores = scores * c["scale_last"][..., None, None]
    pattern = _softmax(scores, dim=2)
    if "match" in c:
        held = torch.where(target[:, None, None], c["given"][:, None, 1, :, None], c["given"][:, None, 0, :, None])
        share = c["match"][..., None, None]
        pattern = pattern * (1 - share) + share * held
    z = (pattern[:, :, None] * v).sum(3)
    if "gate_last" in c:
        z = z * c["gate_last"][..., None, None]
    final = after[:, :, QUERY] + torch.bmm(p["out1"], z.reshape(members, m, size))
    logits = torch.baddbmm(p["read.bias"][..., None], p["read.weight"], _norm(final, p, "ln_final", shape))
    if "copy" in c:
        logits = _copied(scores, batch, c["copy"], c["rest"], logits)
    return Output(logits + c["unused"], scores, pattern, first_pattern)


def losses(logits: Tensor, answer: Tensor) -> Tensor:
    """Cross-entropy [M, B] of logits [M, labels, B] at the answers [M, B], in nats."""
    given = answer[:, None] == torch.arange(logits.shape[1], device=answer.device)[:, None]
    return logits.logsumexp(1) - torch.where(given, logits, 0.0).sum(1)


def _last_layer_reads(
    p: Params, c: dict[str, Tensor], shape: Shape, x: Tensor, after: Tensor, whole: Tensor
) -> tuple[Tensor, Tensor]:
    """Scores of the query [M, H, S, B] and values [M, H, D, S, B] of the last layer."""
    members, m, _, size = x.shape
    h, d = shape.n_heads, shape.d_head
    to_k, to_v = p["kv1"].split(m, dim=1)
    if "preserve" in c or "moved" in c:
        streams = [after, after, after]
        if "preserve" in c:
            shares = c["preserve"].unbind(1)
            streams = [after * (1 - s[:, None, None, None]) + whole * s[:, None, None, None] for s in shares]
        if "moved" in c:
            shares = c["moved"][..., None, None, None].unbind(1)
            shifted = torch.stack([x[:, :, p] for p in TO_THE_LEFT], dim=2)
            given = (shifted, shifted, x)
            streams = [own * (1 - s) + new * s for own, new, s in zip(streams, given, shares, strict=True)]
        for_q, for_k, for_v = (_norm(stream, p, "ln1", shape) for stream in streams)
        k = torch.bmm(to_k, for_k.flatten(2)).view(members, m, TOKENS, size)
        v = torch.bmm(to_v, for_v.flatten(2)).view(members, m, TOKENS, size)
        q = torch.bmm(p["q1"], for_q[:, :, QUERY])
    else:
        normed = _norm(after, p, "ln1", shape)
        k, v = torch.bmm(p["kv1"], normed.flatten(2)).view(members, 2 * m, TOKENS, size).split(m, dim=1)
        q = torch.bmm(p["q1"], normed[:, :, QUERY])
    if "stopped" in c:
        q, k, v = (
            torch.where(still.view(-1, *[1] * (part.ndim - 1)), part.detach(), part)
            for still, part in zip(c["stopped"].unbind(1), (q, k, v), strict=True)
        )
    q = _rotate(q[:, :, None], c["rotary"][..., QUERY:] * d**-0.5, h)
    scores = _scores(q, _rotate(k, c["rotary"], h))
    return scores[:, :, 0], v.view(members, h, d, TOKENS, size)


def _columns(table: Tensor, index: Tensor) -> Tensor:
    """Columns [M, rows, N] of tables [M, rows, columns] at an index [M, N]: a product, whose gradient is fast."""
    chosen = index[:, None] == torch.arange(table.shape[2], device=index.device)[:, None]
    return torch.bmm(table, chosen.to(table.dtype))


def _norm(x: Tensor, p: Params, name: str, shape: Shape) -> Tensor:
    """LayerNorm over the features, dim 1."""
    centred = x - x.mean(1, keepdim=True)
    unit = centred * torch.rsqrt(centred.square().mean(1, keepdim=True) + shape.norm_eps)
    trailing = (...,) + (None,) * (x.ndim - 2)
    return unit * p[f"{name}.weight"][trailing] + p[f"{name}.bias"][trailing]


def _rotate(x: Tensor, angles: Tensor, n_heads: int) -> tuple[Tensor, Tensor]:
    """Both halves of every head's dimensions after rotary, each [M, H, D / 2, T, B], of x [M, H * D, T, B]."""
    cos, sin = angles[..., None]
    one, two = x.unflatten(1, (n_heads, 2, -1)).unbind(2)
    return one * cos - two * sin, two * cos + one * sin


def _scores(q: tuple[Tensor, Tensor], k: tuple[Tensor, Tensor]) -> Tensor:
    """Products of queries and keys [M, H, T, S, B], from halves [M, H, D / 2, T, B] and [M, H, D / 2, S, B]."""
    one, two = (a[:, :, :, :, None] * b[:, :, :, None] for a, b in zip(q, k, strict=True))
    return (one + two).sum(2)


def _softmax(x: Tensor, dim: int) -> Tensor:
    shifted = (x - x.amax(dim, keepdim=True).detach()).exp()
    return shifted / shifted.sum(dim, keepdim=True)


def _barred(like: Tensor) -> Tensor:
    """What is added to scores so that no query sees a later key: [T, S, 1]."""
    return torch.full((TOKENS, TOKENS), -torch.inf, dtype=like.dtype, device=like.device).triu(1).unsqueeze(-1)


def _previous(like: Tensor) -> Tensor:
    """The pattern that attends to the token before, and at position 0 to itself: [T, S, 1]."""
    held = torch.zeros(TOKENS, TOKENS, dtype=like.dtype, device=like.device).diagonal_scatter(
        torch.ones(TOKENS - 1, dtype=like.dtype, device=like.device), -1
    )
    first = torch.arange(TOKENS, device=like.device) == 0
    return (held + (first[:, None] & first)).unsqueeze(-1)


def _copied(scores: Tensor, batch: Batch, copy: Tensor, rest: Tensor, logits: Tensor) -> Tensor:
    """Logits that are one head's scores on the two label tokens, for the members that copy."""
    of_head = (scores * copy[..., None, None]).sum(1)
    index = torch.arange(logits.shape[1], device=logits.device)[:, None]
    one, two = (batch.labels[:, i, None] == index for i in (0, 1))
    written = torch.where(one, of_head[:, 1, None], torch.where(two, of_head[:, 3, None], rest[:, None, None]))
    return torch.where(copy.sum(1)[:, None, None] > 0, written, logits)
