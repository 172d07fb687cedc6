"""An attention layer, told by what its attention function was given: each hypothesis is tried on the values."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..models.blocks import Attention, Map
from ..models.gpt_oss import rotate_by_halves
from ..models.llama import over_heads
from ..models.masks import causal_mask, read_mask
from ..models.positions import Rotary, rotate, rotate_pairs
from ..models.projections import Projection
from .probe import Call, Mixing, Probe, near


def attention(seen: Probe, block: nn.Module, mixing: Mixing) -> Attention:
    """Describe the attention of a block.

    Raises:
        ModelError: it computes something that is not known.
    """
    name = type(mixing.module).__name__
    inside = seen.within(block)
    heads, groups, width = mixing.q.shape[1], mixing.k.shape[1], mixing.q.shape[-1]
    out = [c.module for c in inside if near(c.read, mixing.z.flatten(2)) and is_linear(c)]
    if len(out) != 1:
        raise ModelError(f"no linear layer of {name} reads what its heads mix: something stands between")
    lines = [c for c in inside if is_linear(c) and c.returned is not None and c.module is not out[0]]
    v = _projection(lines, mixing.v, groups, mixing)
    if v is None or mixing.v.shape[-1] != width:
        raise ModelError(f"the values of {name} are no linear function of what it reads, of {groups} heads")
    norms = [c.module for c in seen.within(mixing.module) if "norm" in type(c.module).__name__.lower()]
    found = {}
    for part, wanted, count in (("q", mixing.q, heads), ("k", mixing.k, groups)):
        given = _prepared(seen, mixing, lines, wanted, count, norms)
        if given is None:
            raise ModelError(
                f"what {name} makes of its {'queries' if part == 'q' else 'keys'} before they meet is not known "
                "(a projection, a norm, a rotary embedding, in this order, are)"
            )
        found[part] = given
    (q, q_norm, rotary, times), (k, k_norm, turned, ktimes) = found["q"], found["k"]
    if (rotary is None) != (turned is None) or ktimes != 1.0:
        raise ModelError(f"{name} treats its queries and keys in different ways")
    causal, window = _mask(mixing, name)
    more = set(mixing.given) & {"position_bias", "bias", "alibi", "topk_indices"}
    if any(isinstance(mixing.given[key], Tensor) for key in more):
        raise ModelError(f"{name} is given {', '.join(sorted(more))}")
    scaling = mixing.given.get("scaling")
    return Attention(
        module=mixing.module,
        q=q,
        k=k,
        v=v,
        out=out[0],
        scaling=(width**-0.5 if scaling is None else float(scaling)) * times,
        q_norm=q_norm,
        k_norm=k_norm,
        rotary=rotary,
        causal=causal,
        window=window,
        softcap=mixing.given.get("softcap"),
        sinks=_sinks(mixing),
    )


def is_linear(call: Call) -> bool:
    """Whether a call is of something like a linear layer: quantised and wrapped ones included."""
    module, read, returned = call.module, call.read, call.returned
    if read is None or returned is None or read.shape[:-1] != returned.shape[:-1]:
        return False
    kind = type(module).__name__.lower()
    return isinstance(module, nn.Linear) or any(word in kind for word in ("linear", "conv1d"))


def _projection(lines: list[Call], wanted: Tensor, count: int, mixing: Mixing) -> Projection | None:
    """The projection whose output is [1, count, T, D]."""
    for call in lines:
        for projection in _candidates(call.module, call.returned, count, mixing):
            assert call.returned is not None
            if near(projection.read(call.returned).transpose(1, 2), wanted):
                return projection
    return None


def _candidates(module: nn.Module, out: Tensor | None, count: int, mixing: Mixing) -> Iterator[Projection]:
    assert out is not None
    columns, width = out.shape[-1], mixing.q.shape[-1]
    heads, groups = mixing.q.shape[1], mixing.k.shape[1]
    if columns == count * width:
        yield Projection(module, count, width)
    if columns != (heads + 2 * groups) * width:
        return
    each = heads // groups
    for start in (0, heads * width, (heads + groups) * width):
        if start + count * width <= columns:
            yield Projection(module, count, width, start)
    stride = (each + 2) * width
    for offset, per in ((0, each), (each * width, 1), ((each + 1) * width, 1)):
        if groups * per == count:
            yield Projection(module, count, width, 0, stride, offset, per)


def _prepared(
    seen: Probe, mixing: Mixing, lines: list[Call], wanted: Tensor, count: int, norms: list[nn.Module]
) -> tuple[Projection, Map | None, Rotary | None, float] | None:
    """The projection, norm, rotary embedding and factor that queries or keys come from."""
    target = wanted.transpose(1, 2)
    rotaries = [None, *_rotaries(seen, mixing)]
    for call in lines:
        for projection in _candidates(call.module, call.returned, count, mixing):
            assert call.returned is not None
            x = projection.read(call.returned)
            for norm in (None, *_head_norms(norms, x)):
                y = x if norm is None else norm(x)
                for rotary in rotaries:
                    if rotary is None:
                        turned = y
                    else:
                        positions = torch.arange(y.shape[1], device=y.device)[None]
                        cos, sin = rotary(positions, y.dtype)
                        try:
                            turned = rotary.turn(y, cos, sin)
                        except (RuntimeError, IndexError):  # these angles are of another width
                            continue
                    for times in (1.0, projection.width**-0.5):
                        if near(turned * times, target):
                            return projection, norm, rotary, times
    return None


def _head_norms(norms: list[nn.Module], x: Tensor) -> Iterator[Map]:
    """Norms of an attention layer as functions of queries or keys [..., heads, D], in every way that runs."""
    for norm in dict.fromkeys(norms):
        for way in (norm, partial(over_heads, norm), partial(heads_first, norm)):
            try:
                fits = way(x).shape == x.shape
            except Exception:  # it is called in another way
                continue
            if fits:
                yield way


def heads_first(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm that takes [1, heads, N, D], of queries or keys [..., heads, D]."""
    flat = x.flatten(0, -3) if x.ndim > 3 else x
    return norm(flat.transpose(0, 1)[None])[0].transpose(0, 1).reshape(x.shape)


def _rotaries(seen: Probe, mixing: Mixing) -> Iterator[Rotary]:
    """The rotary embeddings that the model has made by then, each turned in every way that is known."""
    made: dict[tuple[nn.Module, str | None], None] = {}
    for call in seen.calls:
        both = call.output
        if isinstance(both, tuple) and len(both) == 2 and "rotary" in type(call.module).__name__.lower():
            more = [value for value in (*call.args[2:], call.kwargs.get("layer_type")) if isinstance(value, str)]
            made[call.module, more[0] if more else None] = None
    for module, layer_type in made:
        rotary = Rotary.of(module, layer_type)
        for turn in (rotate, rotate_by_halves, pairs_repeated, pairs_joined, rotate_pairs):
            yield Rotary(rotary.angles, rotary.by_length, rotary.length, turn)


def pairs_repeated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbouring pairs are turned by angles that stand twice, one after the other."""
    return rotate_pairs(x, cos[..., ::2], sin[..., ::2])


def pairs_joined(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbouring pairs are turned by angles of which all stand once more behind all."""
    half = cos.shape[-1] // 2
    return rotate_pairs(x, cos[..., :half], sin[..., :half])


def _mask(mixing: Mixing, name: str) -> tuple[bool, int | None]:
    """Whether attention is causal, and the window of keys that it sees."""
    queries, window = mixing.q.shape[2], mixing.given.get("sliding_window")
    window = int(window) if isinstance(window, int) and window > 0 else None
    causal = mixing.given.get("is_causal")
    causal = bool(getattr(mixing.module, "is_causal", False) if causal is None else causal)
    if mixing.mask is None:
        return causal, window if causal else None
    allowed, bias = read_mask(mixing.mask, queries, queries, mixing.q.device, window, causal)
    if bias is not None and bool(bias.any()):
        raise ModelError(f"the mask of {name} adds a bias to its scores")
    assert allowed is not None
    seen = allowed.expand(1, allowed.shape[1], queries, queries)
    if bool((seen == causal_mask(queries, queries, seen.device, window)).all()):
        return True, window
    if bool(seen.all()):
        return False, None
    raise ModelError(f"the mask of {name} is neither causal nor empty")


def _sinks(mixing: Mixing) -> str | None:
    sinks = mixing.given.get("s_aux")
    if sinks is None:
        return None
    found = [name for name, p in mixing.module.named_parameters(recurse=False) if p is sinks]
    if not found:
        raise ModelError(f"the sinks of {type(mixing.module).__name__} are no parameter of its own")
    return found[0]
