"""What stands around the blocks of an unknown model: embeddings, the final norm, the unembedding."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..models.architecture import Architecture
from ..models.attention import softcap
from ..models.gemma import lift_cap
from ..models.huggingface import swap_attention
from .attending import is_linear
from .blocks import block
from .feeding import ACTIVATIONS
from .probe import Call, Probe, factor, near


def outside(module: Any, seen: Probe) -> Architecture:
    """Describe a model by what was seen of it.

    Raises:
        ModelError: some part is not understood.
    """
    calls = _block_calls(module, seen)
    blocks = []
    for call in calls:
        name = type(call.module).__name__
        parts = set(call.module.modules())
        mixings = [m for m in seen.mixings if m.module in parts]
        if len(mixings) != 1:
            raise ModelError(
                f"{name} calls {len(mixings) or 'no'} attention function{'s' * (len(mixings) != 1)} of transformers' "
                "attention interface, so its inside cannot be told"
            )
        blocks.append(block(seen, call, mixings[0]))
    first, last = calls[0].read, calls[-1].returned
    assert first is not None and last is not None
    found = _embeddings(module, seen, calls[0], first)
    tail = seen.calls[seen.calls.index(calls[-1]) + 1 :]
    heads = [c for c in tail if is_linear(c) and c.returned is not None and c.returned.shape == seen.logits.shape]
    if not heads:
        raise ModelError("no linear layer after the blocks returns one number for every token and logit")
    head = heads[-1]
    assert head.returned is not None
    missing = {}
    norm: nn.Module = nn.Identity()
    if near(head.read, last):
        missing["ln_final"] = "nothing stands between the last block and the unembedding"
    else:
        steps = _steps(tail, last, head.read)
        if steps is None:
            raise ModelError("what is unembedded is not what modules after the last block make of its output")
        end = steps[-1]
        assert isinstance(end, nn.Module)
        norm, found["to_final"] = end, None if len(steps) == 1 else partial(_through, tuple(steps))
    config: Any = getattr(module, "config", None)
    return Architecture(
        family=getattr(config, "model_type", type(module).__name__),
        blocks=tuple(blocks),
        norm=norm,
        unembed=head.module,
        width=last.shape[-1],
        vocabulary=head.returned.shape[-1],
        swap_attention=swap_attention,
        missing=missing,
        bounds=_bounds(config),
        **found,
        **_logits(module, config, head.returned, seen.logits),
    )


def _steps(tail: list[Call], x: Tensor, wanted: Tensor | None, depth: int = 4) -> list[Any] | None:
    """Modules, and functions between them, that lead from one value to another, the last of them a module."""
    for c in tail:
        if c.returned is None or c.returned.shape != x.shape or any(True for _ in c.module.children()):
            continue
        for act in (None, *ACTIVATIONS):
            if not near(c.read, x if act is None else act(x)):
                continue
            before = [c.module] if act is None else [act, c.module]
            if near(c.returned, wanted):
                return before
            more = _steps(tail[tail.index(c) + 1 :], c.returned, wanted, depth - 1) if depth else None
            if more is not None:
                return [*before, *more]
    return None


def _through(steps: tuple[Any, ...], x: Tensor) -> Tensor:
    for step in steps:
        x = step(x)
    return x


def _block_calls(module: nn.Module, seen: Probe) -> list[Call]:
    """The calls of the blocks: the outermost list of modules that are called one after another."""
    for part in module.modules():
        if not isinstance(part, nn.ModuleList) or not len(part):
            continue
        calls = [seen.of(each) for each in part]
        if all(len(one) == 1 for one in calls):
            found = [one[0] for one in calls]
            streams = [c.read for c in found[1:]]
            if all(c.read is not None and c.returned is not None for c in found) and all(
                near(c.returned, x) for c, x in zip(found, streams, strict=False)
            ):
                return found
    raise ModelError("it has no list of blocks each of which goes on from what the one before returns")


def _embeddings(module: nn.Module, seen: Probe, first: Call, stream: Tensor) -> dict[str, Any]:
    """The embedding of tokens, that of positions, and the factor."""
    inner = [first, *seen.within(first.module)]
    before = seen.calls[: min(seen.calls.index(one) for one in inner)]
    for call in before:
        ids = next((v for v in (*call.args, *call.kwargs.values()) if isinstance(v, Tensor)), None)
        if ids is None or ids.is_floating_point() or not torch.equal(ids.reshape(-1), seen.ids.reshape(-1)):
            continue
        made = call.returned
        if made is None or made.shape != stream.shape:
            continue
        size = _size(call.module)
        more: dict[str, Any] = {"embed": call.module, "pos_embed": None} | ({} if size is None else {"ids": size})
        scale = factor(stream, made, module, *module.children(), getattr(module, "config", None))
        if scale is not None:
            positioned = not isinstance(call.module, nn.Embedding) and "position_ids" in _arguments(call.module)
            at = _first_position(before, seen) if positioned else 0
            return more | {"embed_scale": scale, "positioned": positioned, "first_position": at}
        for other in before:
            pos, at = other.returned, torch.arange(stream.shape[1], device=stream.device)[None]
            if other is call or pos is None or pos.shape[-1] != stream.shape[-1] or pos.ndim < 2:
                continue
            pos = pos.reshape(-1, *pos.shape[-2:])
            if pos.shape[-2] == stream.shape[1] and near((made + pos), stream):
                for name, way in (("module", None), ("by name", partial(_by_name, other.module))):
                    again = _tried(other.module.forward if way is None else way, at)
                    if near(again, pos):
                        return more | {"pos_embed": other.module, "at_positions": way if name != "module" else None}
    raise ModelError("what the first block reads is no embedding of the tokens, nor that and one of their positions")


def _first_position(before: list[Call], seen: Probe) -> int:
    """The position id that the first token was given."""
    for call in before:
        at = call.read
        if isinstance(call.module, nn.Embedding) and at is not None and at.numel() == seen.ids.numel():
            start = int(at.reshape(-1)[0])
            if torch.equal(at.reshape(-1), torch.arange(start, start + at.numel(), device=at.device)):
                return start
    return 0


def _by_name(module: Any, positions: Tensor) -> Tensor:
    return module(positions, 0, position_ids=positions)


def _tried(function: Any, at: Tensor) -> Tensor | None:
    try:
        return function(at)
    except Exception:  # it is called in another way
        return None


def _arguments(module: nn.Module) -> set[str]:
    return set(inspect.signature(module.forward).parameters)


def _size(embedding: nn.Module) -> int | None:
    tables = [part for part in embedding.modules() if isinstance(part, nn.Embedding)]
    return tables[0].num_embeddings if tables else None


def _logits(module: Any, config: Any, out: Tensor, logits: Tensor) -> dict[str, Any]:
    """What the unembedding's output goes through to be the logits."""
    scale = factor(logits, out, config, module)
    if scale is not None:
        return {"logit_scale": scale}
    cap = getattr(config, "final_logit_softcapping", None)
    if cap and near(softcap(out, cap), logits):
        return {"cap": partial(softcap, cap=cap), "lift_cap": partial(lift_cap, module)}
    raise ModelError("its logits are not what its unembedding returns, nor a multiple of it")


def _bounds(config: Any) -> tuple[int, ...]:
    """Numbers of tokens past which a model may do something else: windows and chunks that its config speaks of."""
    values = vars(config) if hasattr(config, "__dict__") else {}
    return tuple(sorted({v for n, v in values.items() if isinstance(v, int) and not isinstance(v, bool) and v > 0
                         and any(word in n for word in ("window", "chunk_size"))}))  # fmt: skip
