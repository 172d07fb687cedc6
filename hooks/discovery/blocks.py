"""A block as sublayers, told by which values are sums of which."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from ..errors import ModelError
from ..models.blocks import Attention, Block, Feed, Mlp, Sublayer
from .attending import attention
from .feeding import apart, feed
from .probe import Call, Mixing, Probe, factor, near


@dataclass(frozen=True, eq=False)
class Added:
    """What a sublayer adds to the stream: its value, the norm that it went through, the factor, the norm of the sum."""

    value: Tensor
    end: nn.Module
    post: nn.Module | None
    scale: float
    post_add: nn.Module | None


def block(seen: Probe, call: Call, mixing: Mixing) -> Block:
    """Describe a block, given the call of it and that of its attention function.

    Raises:
        ModelError: it is not made of attention and a feed-forward layer that are added to the stream.
    """
    module, before, after = call.module, call.read, call.returned
    assert before is not None and after is not None
    name = type(module).__name__
    attend = attention(seen, module, mixing)
    inside = seen.within(module)
    first = next(c for c in inside if c.module is attend.v.module)
    pre = _pre(inside, before, first.read, f"attention of {name}")
    made = next(c for c in inside if c.module is attend.out)
    assert made.returned is not None
    after_out = inside[inside.index(made) :]
    mine = set(mixing.module.modules())
    rest = [c for c in inside if c.module not in mine]
    feeds = _feeds(seen, rest, before, after)
    for fed, read, added, last in feeds:
        inner = [c for c in rest if read is not None and near(c.returned, read) and near(c.read, before)]
        parallel = bool(inner) or near(read, before)
        if parallel:
            for one in _ends(seen, after_out, made.returned):
                for two in _ends(seen, last, added):
                    s = factor(after - before, one.value + two.value)
                    if s == 1.0 and near(before + one.value + two.value, after):
                        mlp_pre = _pre(rest, before, read, f"feed-forward layer of {name}")
                        return Block(module, (_sublayer(pre, attend, one), _sublayer(mlp_pre, fed, two)), parallel=True)
        for middle in _streams(rest, read, before.shape[-1]):
            for one in _added(seen, after_out, made.returned, before, middle, module):
                for two in _added(seen, last, added, middle, after, module):
                    mlp_pre = _pre(rest, middle, read, f"feed-forward layer of {name}")
                    return Block(module, (_sublayer(pre, attend, one), _sublayer(mlp_pre, fed, two)))
    raise ModelError(f"what {name} returns is not its input with what attention and a feed-forward layer add to it")


def _sublayer(pre: nn.Module | None, fn: Attention | Feed, added: Added) -> Sublayer:
    default = added.post if added.post is not None else fn.module
    return Sublayer(
        pre=pre,
        fn=fn,
        post=added.post,
        post_add=added.post_add,
        scale=added.scale,
        ends=None if added.end is default else added.end,
    )


def _pre(calls: list[Call], stream: Tensor, read: Tensor | None, what: str) -> nn.Module | None:
    """The norm between the stream and what is read of it."""
    if near(read, stream):
        return None
    found = [c.module for c in calls if near(c.returned, read) and near(c.read, stream) and _norms(c.module)]
    if not found:
        raise ModelError(f"the {what} reads something else than the stream or a norm of it")
    return found[0]


def _norms(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _feeds(
    seen: Probe, rest: list[Call], before: Tensor, after: Tensor
) -> list[tuple[Feed, Tensor | None, Tensor, list[Call]]]:
    """What may be the feed-forward layer: itself, what it reads, what it returns, and the calls from there on."""
    found: list[tuple[Feed, Tensor | None, Tensor, list[Call]]] = []
    whole = [c for c in rest if c.returned is not None and c.read is not None and not _norms(c.module)
             and c.returned.numel() == before.numel() and any(True for _ in c.module.children())]  # fmt: skip
    # The outermost first, which return last.
    for call in reversed(whole):
        assert call.returned is not None
        found.append((feed(seen, call), call.read, call.returned, rest[rest.index(call) :]))
    # Parts that belong to no layer of their own.
    for call in rest:
        if call.returned is None or call.returned.numel() != before.numel() or call.read is None:
            continue
        for start in rest:
            if start is call or start.read is None or start.read.numel() != before.numel() or _norms(start.module):
                continue
            taken = apart([c for c in rest if not any(True for _ in c.module.children())], start.read, call.returned)
            if taken is not None and taken[1] is call.module:
                pre, down, act, up, width = taken
                outer = pre if isinstance(pre, nn.Module) else pre.module
                whole_of = partial(_through, pre, act, up, down)
                fed = Mlp(outer, pre, down, act, up=up, width=width, whole=whole_of)
                found.append((fed, start.read, call.returned, rest[rest.index(call) :]))
                return found
    return found


def _through(pre, act, up, down, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    hidden = act(pre(x)) if up is None else act(pre(x)) * up(x)
    return down(hidden)


def _streams(rest: list[Call], read: Tensor | None, width: int) -> list[Tensor]:
    """What the stream may be that a feed-forward layer reads: that itself, or what a norm was given for it."""
    if read is None:
        return []
    found = [read, *(c.read for c in rest if _norms(c.module) and near(c.returned, read) and c.read is not None)]
    return [x for x in found if x.shape[-1] == width]


def _ends(seen: Probe, calls: list[Call], out: Tensor) -> list[Added]:
    """What may be added, of what a sublayer's last projection returns: that, or a norm of it."""
    # The last that returns it, such as dropout, unless it is called elsewhere too.
    same = [c.module for c in calls if near(c.returned, out) and len(seen.of(c.module)) == 1]
    found = [Added(out, same[-1], None, 1.0, None)]
    for c in calls:
        if _norms(c.module) and near(c.read, out) and c.returned is not None:
            found.append(Added(c.returned, c.module, c.module, 1.0, None))
    return found


def _added(seen: Probe, calls: list[Call], out: Tensor, before: Tensor, after: Tensor, block: nn.Module) -> list[Added]:
    """The ways in which a sublayer's output may have led from one value of the stream to the next."""
    found = []
    for end in _ends(seen, calls, out):
        value, wanted, start = (x.reshape(-1, x.shape[-1]) for x in (end.value, after, before))
        s = factor(wanted - start, value, block)
        if s is not None and near(start + s * value, wanted):
            found.append(Added(end.value, end.end, end.post, s, None))
        for c in calls:
            if _norms(c.module) and near(c.returned, wanted) and near(c.read, start + value):
                found.append(Added(end.value, end.end, end.post, 1.0, c.module))
    return found
