"""Attention functions that show their inside, put in the place of a model's own while it is called."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from ..errors import ModelError
from ..models.architecture import Architecture
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
    }
)
"""Keyword arguments of attention functions that do not change what they compute, given their mask."""
UNDERSTOOD = frozenset({"scaling", "dropout", "softcap", "s_aux"})
"""Those that do, and are taken into account."""
WEIGHTLESS = frozenset({"sdpa_attention_forward", "flash_attention_forward", "flex_attention_forward", "attend"})
"""Attention functions that return no weights."""
CAPLESS = frozenset({"sdpa_attention_forward"})
"""Attention functions that leave out a cap of the scores which they are given, as models of older transformers run."""


def swap_functions(arch: Architecture, keys: Set[Key], expose: Iterable[int], find: Find, stack: ExitStack) -> None:
    """Put in place what is there only while the model is called: attention that shows its inside, logits uncapped."""
    if ("logits", -1, None) in keys:
        stack.enter_context(arch.lift_cap())
    swap_attentions(arch, keys, expose, find, stack)


def swap_attentions(arch: Architecture, keys: Set[Key], expose: Iterable[int], find: Find, stack: ExitStack) -> None:
    """Put in place attention functions that show their inside, where a site is within one, and in layers besides."""
    layers = {layer for name, layer, _ in keys if name in INSIDE} | set(expose)
    for layer in sorted(layers):
        attention = arch.blocks[layer].attention
        names = {name for name, at, _ in keys if at == layer}
        stack.enter_context(arch.swap_attention(attention.module, exposed(attention, layer, names, find)))


def exposed(layer_attention: Attention, layer: int, names: set[str], find: Find) -> Callable[..., Any]:
    """An attention function that shows its inside, in the form that models call theirs."""

    def attend(
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Any,
        *,
        own: Callable[..., Any],
        kernel: str = "",
        **given: Any,
    ) -> tuple[Tensor, Tensor | None]:
        run = find()
        if run is None:  # another thread, or a call that is nobody's
            return own(module, q, k, v, mask, **given)
        odd = sorted(name for name, value in given.items() if value is not None and name not in HARMLESS | UNDERSTOOD)
        if odd:
            raise ModelError(
                f"attention of layer {layer} is called with {', '.join(odd)}, which may change what it computes, and "
                "whose inside is not understood: leave out sites and edits of its scores, patterns, rot_q and rot_k"
            )

        def visit(name: str, x: Tensor, guard: Guard | None = None) -> Tensor:
            return run.visit((name, layer, None), x, guard) if name in names else x

        cached = run.scratch.pop((layer, "cached"), False)
        for name in ("rot_q", "rot_k"):
            if name in names and not (cached and name == "rot_k"):
                x = visit(name, (q if name == "rot_q" else k).transpose(1, 2)).transpose(1, 2)
                q, k = (x, k) if name == "rot_q" else (q, x)
        # Where there is no mask, the call or the module says whether attention is causal, as it does to a kernel.
        causal = given.get("is_causal")
        causal = getattr(module, "is_causal", layer_attention.causal) if causal is None else causal
        first, width = run.keys(layer)
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
        plain = (mask is None or isinstance(mask, Tensor)) and not given.get("dropout") and kernel in WEIGHTLESS
        in_tiles = getattr(run, "in_tiles", None)
        if plain and in_tiles is not None:
            z = in_tiles(layer, (q, k, v), mask, causal, layer_attention.window, scaling, cap, sinks)
            if z is not None:
                return z, None
        allowed, bias = read_mask(mask, q.shape[2], k.shape[2], q.device, layer_attention.window, causal, first)
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
