"""Attention functions that show their inside, put in the place of a model's own while it is called."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..models.architecture import Architecture, Stack
from ..models.attention import exposed_attention
from ..models.blocks import Attention
from ..models.masks import read_mask
from ..plan.sites import Key
from ..program import Guard
from .boundaries import Find

INSIDE = frozenset({"rot_q", "rot_k", "scores", "pattern"})
"""Sites inside attention, for which a layer's attention function is swapped."""

HARMLESS = frozenset(
    {
        *("position_ids", "cache_position", "past_key_values", "use_cache", "is_causal", "sliding_window"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep"),
        *("labels", "num_items_in_batch", "token_type_ids", "mm_token_type_ids", "deterministic"),
        *("tokenizer", "assistant_tokenizer"),  # of stop strings, which generate() hands on to the model
    }
)
"""Keyword arguments of attention functions that do not change what they compute, given their mask."""
UNDERSTOOD = frozenset({"scaling", "dropout", "softcap", "s_aux"})
"""Those that do, and are taken into account."""
WEIGHTLESS = frozenset({"sdpa_attention_forward", "flash_attention_forward", "flex_attention_forward", "attend"})
"""Attention functions that return no weights."""
PACKED = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"})
"""Those that say which tokens of a packed tower are of one sequence."""
CAPLESS = frozenset({"sdpa_attention_forward"})
"""Attention functions that leave out a cap of the scores which they are given, as models of older transformers run."""


def swap_functions(arch: Architecture, keys: Set[Key], expose: Iterable[int], find: Find, stack: ExitStack) -> None:
    """Put in place what is there only while the model is called: attention that shows its inside, logits uncapped."""
    if ("logits", -1, None) in keys:
        stack.enter_context(arch.lift_cap())
    swap_attentions(arch, keys, expose, find, stack)


def swap_attentions(arch: Architecture, keys: Set[Key], expose: Iterable[int], find: Find, stack: ExitStack) -> None:
    """Put in place attention functions that show their inside, where a site is within one, and in layers besides."""
    for of, part in arch.stacks.items():
        layers = {layer for name, layer, at in keys if name in INSIDE and at == of}
        layers |= {layer for at, layer in map(placed, expose) if at == of}
        for layer in sorted(layers):
            attention = part.blocks[layer].attention
            names = {name for name, at, there in keys if at == layer and there == of}
            if of is None or isinstance(part, Stack):
                function = exposed(attention, layer, names, find, of)
            else:
                function = _exposed_tower(attention, layer, names, of, find)
            stack.enter_context(part.swap_attention(attention.module, function))


def exposed(
    layer_attention: Attention, layer: int, names: set[str], find: Find, stack: str | None = None
) -> Callable[..., Any]:
    """An attention function of a stack's layer that shows its inside, in the form that models call theirs."""

    def attend(
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attention_mask: Any = None,  # by this name, as some models give it
        *,
        own: Callable[..., Any],
        kernel: str = "",
        **given: Any,
    ) -> tuple[Tensor, Tensor | None]:
        run = find()
        if run is None:  # another thread, or a call that is nobody's
            return own(module, q, k, v, attention_mask, **given)
        known = HARMLESS | UNDERSTOOD | ({"position_bias"} if layer_attention.biased else set())
        _require_understood(layer, given, known)

        def visit(name: str, x: Tensor, guard: Guard | None = None) -> Tensor:
            return run.visit((name, layer, stack), x, guard) if name in names else x

        cached = run.scratch.pop((stack, layer, "cached"), False)
        for name in ("rot_q", "rot_k"):
            if name in names and not (cached and name == "rot_k"):
                x = visit(name, (q if name == "rot_q" else k).transpose(1, 2)).transpose(1, 2)
                q, k = (x, k) if name == "rot_q" else (q, x)
        # Where there is no mask, the call or the module says whether attention is causal, as it does to a kernel.
        causal = given.get("is_causal")
        causal = getattr(module, "is_causal", layer_attention.causal) if causal is None else causal
        causal = causal and stack is None
        first, width = run.keys(layer) if stack is None else (None, None)
        if width is not None and width != k.shape[2]:
            raise ModelError(
                f"attention of layer {layer} sees {k.shape[2]} keys where its cache announced {width}, so nobody knows "
                "which tokens they are of"
            )
        scaling, cap = given.get("scaling"), given.get("softcap")
        scaling = layer_attention.scaling if scaling is None else scaling
        kernel = kernel or getattr(own, "__name__", "")
        cap = None if kernel in CAPLESS else layer_attention.softcap if cap is None else cap
        sinks = layer_attention.sink if given.get("s_aux") is None else given["s_aux"]
        plain = (
            (attention_mask is None or isinstance(attention_mask, Tensor))
            and not given.get("dropout")
            and kernel in WEIGHTLESS
            and given.get("position_bias") is None
        )
        in_tiles = getattr(run, "in_tiles", None)
        if plain and in_tiles is not None:
            z = in_tiles(layer, (q, k, v), attention_mask, causal, layer_attention.window, scaling, cap, sinks)
            if z is not None:
                return z, None
        allowed, bias = read_mask(
            attention_mask, q.shape[2], k.shape[2], q.device, layer_attention.window, causal, first
        )
        far = given.get("position_bias")
        if far is not None:
            bias = far if bias is None else bias + far
        z, pattern = exposed_attention(
            q,
            k,
            v,
            allowed,
            scaling,
            visit,
            bias,
            dropout=given.get("dropout", 0.0),
            cap=cap,
            sinks=sinks,
        )
        # The model's own kernel may have no weights to show to a caller who asks for them, and then there are none.
        return z, None if kernel in WEIGHTLESS else pattern

    return attend


def _exposed_tower(
    tower_attention: Attention, layer: int, names: set[str], stack: str, find: Find
) -> Callable[..., Any]:
    """The same for a layer of a tower, which attends within images (or tiles, or windows of them).

    The pass is shown all that a row's images have, in which no image attends to another.
    """

    def attend(
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attention_mask: Any,
        *,
        own: Callable[..., Any],
        **given: Any,
    ) -> tuple[Tensor, Tensor | None]:
        run = find()
        fold = None if run is None else run.fold(stack)
        if run is None or fold is None:
            return own(module, q, k, v, attention_mask, **given)
        _require_understood(layer, given, HARMLESS | UNDERSTOOD | PACKED)
        count, _, each, _ = q.shape

        def visit(name: str, x: Tensor, guard: Guard | None = None) -> Tensor:
            return run.visit((name, layer, stack), x, guard) if name in names else x

        def laid(x: Tensor) -> Tensor:
            return fold.lay(x.transpose(1, 2).flatten(0, 1))

        parts = {"rot_q": laid(q), "rot_k": laid(k)}
        q, k = (visit(name, x).transpose(1, 2) for name, x in parts.items())
        ends, allowed = given.get("cu_seq_lens_q"), None
        if ends is not None:
            token = torch.arange(each, device=q.device)
            allowed = fold.among(torch.bucketize(token, ends[1:].to(q.device), right=True))
        elif not fold.even or count != fold.rows:
            allowed = fold.among(torch.arange(count, device=q.device).repeat_interleave(each))
        own_allowed, bias = read_mask(attention_mask, each, each, q.device, causal=False)
        if own_allowed is not None:
            said = fold.spread(own_allowed.expand(count, -1, each, each))
            allowed = said if allowed is None else allowed & said
        if bias is not None:
            bias = fold.spread(bias.expand(count, -1, each, each))
        scaling = given.get("scaling")
        z, pattern = exposed_attention(
            q,
            k,
            laid(v).transpose(1, 2),
            allowed,
            tower_attention.scaling if scaling is None else scaling,
            visit,
            bias,
            dropout=given.get("dropout", 0.0),
        )
        weightless = getattr(own, "__name__", "") in WEIGHTLESS or ends is not None
        return fold.back(z).unflatten(0, (count, each)), None if weightless else fold.gathered(pattern, count)

    return attend


def placed(exposed: Any) -> tuple[str | None, int]:
    """The stack and the layer of an entry of `exposed_layers`."""
    return exposed if isinstance(exposed, tuple) else (None, exposed)


def _require_understood(layer: int, given: dict[str, Any], known: Set[str]) -> None:
    """Refuse arguments that nobody knows.

    Raises:
        ModelError: such an argument.
    """
    odd = sorted(name for name, value in given.items() if value is not None and name not in known)
    if odd:
        raise ModelError(
            f"attention of layer {layer} is called with {', '.join(odd)}, which may change what it computes, and "
            "whose inside is not understood: leave out sites and edits of its scores, patterns, rot_q and rot_k"
        )
