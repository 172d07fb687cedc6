"""Policies: functions from what a layer holds to a score for each key. The lowest scores go first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooks import Inputs, MetricError, Model, ShapeError, Site, uniform
from interp.kv.view import View


@dataclass(frozen=True, eq=False)
class Policy:
    """A named score of cached keys.

    Attributes:
        name: what tables call it.
        score: from a `View` to scores: [B, K, T] of the new keys, which keep them from then on, or [B, K, N] of all
            keys,
            which are scored anew whenever tokens are fed.
        needs_hidden: whether it reads what the layer reads.
    """

    name: str
    score: Callable[[View], Tensor]
    needs_hidden: bool = False

    def checked(self, view: View) -> Tensor:
        """Scores [B, K, N] of all keys.

        Raises:
            ShapeError: the policy gives another shape.
            MetricError: it gives nan for a key of a real token.
        """
        found = self.score(view)
        rows, heads, width = view.keys.shape[:3]
        shapes = ((rows, heads, view.new), (rows, heads, width))
        if not isinstance(found, Tensor) or tuple(found.shape) not in shapes:
            given = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ShapeError(
                f"policy {self.name!r} gives {given} in layer {view.layer}; expected {list(shapes[1])} (rows, "
                f"key/value heads, "
                f"keys), or {list(shapes[0])} of the {view.new} new keys"
            )
        found = found.detach().to(view.keys.device, torch.promote_types(found.dtype, torch.float32))
        if found.shape[2] != width:
            found = torch.cat([view.scores[..., : width - view.new], found], 2)
        if bool((found.isnan() & view.valid).any()):
            raise MetricError(
                f"policy {self.name!r} gives nan in layer {view.layer}: a key needs a number to be ranked by"
            )
        return found


def streaming_llm(sinks: int = 4) -> Policy:
    """The first tokens and the most recent ones (Xiao et al. 2024, arXiv 2309.17453)."""

    def score(view: View) -> Tensor:
        return torch.where(view.index < sinks, torch.inf, view.index.float())

    return Policy("StreamingLLM", score)


def h2o() -> Policy:
    """Attention received so far, summed over queries and averaged over the group (Zhang et al. 2023, arXiv
    2306.14048).
    """
    return Policy("H2O", lambda view: view.scores + view.received())


def snapkv(window: int = 64, pool: int = 5) -> Policy:
    """Mean attention of the last queries, smoothed over neighbours; these stay (Li et al. 2024, arXiv 2404.14469)."""

    def score(view: View) -> Tensor:
        received = view.attention(window).mean(2).unflatten(1, (-1, view.groups)).mean(2)
        # The mean over neighbours that there are: padding is none.
        there = view.valid.to(received)
        smooth, share = (
            torch.nn.functional.avg_pool1d(x, pool, stride=1, padding=pool // 2) for x in (received * there, there)
        )
        smooth = smooth / share.clamp_min(1 / (2 * pool))
        last = view.index.masked_fill(~view.valid, -1).amax(2, keepdim=True)
        return smooth[..., : received.shape[2]].masked_fill(view.index > last - min(window, view.new), torch.inf)

    return Policy("SnapKV", score)


def tova() -> Policy:
    """The last query's attention, averaged over all heads (Oren et al. 2024, arXiv 2401.06104)."""

    def score(view: View) -> Tensor:
        return view.attention(1).mean((1, 2))[:, None].expand(view.keys.shape[:3])

    return Policy("TOVA", score)


def key_norm() -> Policy:
    """Keys of small norm are kept (Devoto et al. 2024, arXiv 2406.11430)."""
    return Policy("key norm", lambda view: -view.keys[:, :, -view.new :].float().norm(dim=-1))


def keydiff() -> Policy:
    """Keys unlike the mean direction of all keys are kept (Park et al. 2025, arXiv 2504.15364)."""

    def score(view: View) -> Tensor:
        keys = torch.nn.functional.normalize(view.keys.float(), dim=-1)
        weight = view.valid[..., None].float()
        anchor = (keys * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True).clamp_min(1)
        return -torch.nn.functional.cosine_similarity(keys, anchor, dim=-1)

    return Policy("KeyDiff", score)


def expected_attention(future: int = 512, covariance: bool = True, value_norm: bool = True) -> Policy:
    """Attention that queries like the last ones would give from the next positions (Devoto et al. 2025, arXiv
    2510.00636).

    Queries before rotation are taken for normal, with the chunk's mean and covariance, turned to each of the next
    `future` positions, and averaged; exp(score) has then a mean in closed form.
    """

    def score(view: View) -> Tensor:
        raw = view.raw_queries.float()
        weight = view.real[:, None, :, None].float()
        count = weight.sum(2, keepdim=True).clamp_min(1)
        mean = (raw * weight).sum(2, keepdim=True) / count  # [B, H, 1, D]
        positions = torch.arange(1, future + 1, max(1, future // 64))
        turned = view.later(mean.expand(-1, -1, len(positions), -1), positions).mean(2)  # [B, H, D]
        keys = view.keys.float().repeat_interleave(view.groups, 1)
        logits = (keys @ turned[..., None])[..., 0] * view.scaling
        if covariance:
            apart = (raw - mean) * weight
            spread = apart.transpose(2, 3) @ apart / count
            axes = torch.eye(raw.shape[-1], device=raw.device).expand(*raw.shape[:2], -1, -1)
            # The mean rotation as a matrix [D, D], whose rows are what the unit vectors are turned to.
            rotation = torch.stack([view.later(axes, p.expand(axes.shape[2])) for p in positions]).mean(0)
            spread = rotation.transpose(2, 3) @ spread @ rotation
            logits = logits + ((keys @ spread) * keys).sum(-1) * view.scaling**2 / 2
        logits = logits.masked_fill(~view.valid.repeat_interleave(view.groups, 1), -torch.inf)
        found = logits.softmax(-1).unflatten(1, (-1, view.groups)).mean(2)
        return found * view.values.float().norm(dim=-1) if value_norm else found

    return Policy("expected attention", score)


def random(seed: int = 0) -> Policy:
    """Random numbers, the same for a token whatever the chunks."""

    def score(view: View) -> Tensor:
        rows, heads = view.keys.shape[:2]
        index = view.index.cpu()
        row, head = torch.arange(rows)[:, None, None], torch.arange(heads)[None, :, None]
        return uniform(seed, *torch.broadcast_tensors(torch.tensor(view.layer), row, head, index)).to(view.keys.device)

    return Policy("random", score)


def given(scores: Tensor | np.ndarray, name: str = "oracle") -> Policy:
    """Scores that are known beforehand, of each token: an oracle's, exact effects, a function's of the whole text.

    Args:
        scores: [L, K, S] for every row, or [B, L, K, S].
        name: what tables call it.
    """
    known = torch.as_tensor(scores)
    if known.ndim not in (3, 4) or bool(known.isnan().any()):
        raise ShapeError(
            f"scores are numbers [layers, heads, tokens] or [rows, ...], not {list(known.shape)} with nan in them"
        )

    def score(view: View) -> Tensor:
        mine = known[:, view.layer] if known.ndim == 4 else known[None, view.layer]
        mine = mine.to(view.keys.device).expand(len(view.keys), -1, -1)
        if mine.shape[1] != view.keys.shape[1]:
            raise ShapeError(f"scores of {mine.shape[1]} heads for a layer with {view.keys.shape[1]} key/value heads")
        if int(view.index.max()) >= mine.shape[2]:
            raise ShapeError(
                f"scores of {mine.shape[2]} tokens, and token {int(view.index.max())} is to be ranked by them"
            )
        return mine.gather(2, view.index)

    return Policy(name, score)


def inverted(policy: Policy) -> Policy:
    """A policy's opposite: a control that a good score must beat by as much as it beats chance.

    Its scores are all made anew from the policy's, so it inverts policies that score all keys whenever tokens are fed.
    """

    def score(view: View) -> Tensor:
        found = policy.score(view)
        return -found

    return Policy(f"inverted {policy.name}", score, policy.needs_hidden)


def press(one: Any, name: str | None = None) -> Policy:
    """A score of the common press interface: ``score(module, hidden_states, keys, values, attentions, kwargs)``.

    Args:
        one: an object with that method, or such a function; it returns [B, K, N] for the keys [B, K, N, D] that it
            is given.
            `attentions` are None, as they are with SDPA.
        name: what tables call it; the class's name by default.
    """
    call: Callable[..., Any] = getattr(one, "score", one)
    if not callable(call):
        raise ShapeError(
            f"a press has a method score(module, hidden_states, keys, values, attentions, kwargs), not {one!r}"
        )

    def score(view: View) -> Tensor:
        hidden, kwargs = view.owner.hidden[view.layer]
        return call(view.module, hidden, view.keys, view.values, None, dict(kwargs))

    return Policy(name or type(one).__name__, score, needs_hidden=True)


def value_gradient(model: Model, inputs: Inputs, window: int = 64) -> Policy:
    """Attention x value norm x gradient: sum over the last queries of a_qi |v_i| |dL/dz_q|, L the loss of the last
    tokens.

    It is made for one context, whose end stands in for the question: a backward pass through it comes first.

    Args:
        model: the wrapped model.
        inputs: the context, one row without padding.
        window: how many last tokens' losses are differentiated.
    """
    if len(inputs) != 1 or not bool(inputs.mask.all()):
        raise ShapeError(f"a value gradient is of one row without padding, not {inputs!r}")
    total = inputs.width
    count = min(window, total - 1)
    places = [Site("z", layer) for layer in range(model.n_layers)]
    with torch.enable_grad():
        run = model.run(inputs, capture=places, grad=True)
        targets = inputs.ids[0, total - count :].to(run.logits.device)
        said = run.logits[0, total - count - 1 : -1].float()
        loss = torch.nn.functional.cross_entropy(said, targets, reduction="sum")
        sizes = [g[0].float().norm(dim=-1).T.detach() for g in run.gradient(loss, *places)]  # [H, T] each

    def score(view: View) -> Tensor:
        asking = sizes[view.layer].to(view.keys.device)[:, total - count - 1 : -1]
        first = int(view.index[0, 0].max()) + 1 - view.new  # the number of the first new token
        within = slice(max(0, total - count - 1 - first), max(0, total - 1 - first))
        mine = asking[:, max(0, first - (total - count - 1)) :][:, : len(range(view.new)[within])]
        pattern = view.attention()[:, :, within]
        received = (pattern * mine[None, :, : pattern.shape[2], None]).sum(2).unflatten(1, (-1, view.groups)).mean(2)
        return view.scores + received * view.values.float().norm(dim=-1)

    return Policy("attention x value x gradient", score)
