"""Vision-language models by hand: every block of a Hugging Face model is replaced by one written out here.

Nothing of the engine is used. Values are as the model has them: of a tower, images (or tiles, or packed patches) along
the first axis. An edit is a function of such a value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Key = tuple[str, str, "int | None"]
Edits = dict[Key, Callable[[Tensor], Tensor]]


def linear(module: nn.Module, x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, module.weight, module.bias)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def scale_of(norm: nn.Module, x: Tensor) -> Tensor:
    """What a norm divides by."""
    centered = x - x.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else x
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    return (centered.square().mean(-1, keepdim=True) + eps).sqrt()


class Oracle:
    """One model under some edits, and every value that it computes, by stack, site and layer."""

    def __init__(self, module: nn.Module, edits: Edits | None = None) -> None:
        self.module, self.edits = module, edits or {}
        self.values: dict[Key, Tensor] = {}

    def note(self, stack: str, name: str, layer: int | None, x: Tensor) -> Tensor:
        edit = self.edits.get((stack, name, layer))
        x = x if edit is None else edit(x)
        self.values[stack, name, layer] = x.detach().clone()
        return x

    def normed(self, stack: str, name: str, layer: int | None, norm: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        """What a norm returns of x, where what it divides by, and that itself, may be edited."""
        old, bias = scale_of(norm, x), getattr(norm, "bias", None)
        new, bias = self.note(stack, f"{name}_scale", layer, old), 0 if bias is None else bias
        return self.note(stack, name, layer, out if new is old else (out - bias) * old / new + bias)

    @torch.no_grad()
    def __call__(self, **call: Any) -> Tensor:
        """The logits."""
        with self.placed():
            return self.module(**call, use_cache=False).logits

    @contextmanager
    def placed(self) -> Iterator[None]:
        text, tower = text_of(self.module), tower_of(self.module)
        changed: list[nn.Module] = []

        def put(block: nn.Module, stack: str, layer: int) -> None:
            def forward(*args: Any, **kwargs: Any) -> Tensor:
                return self.block(block, stack, layer, *args, **kwargs)

            block.forward = forward
            changed.append(block)

        handles = [
            text.norm.register_forward_hook(lambda m, a, out: self.normed("text", "ln_final", None, m, a[0], out)),
            self.module.lm_head.register_forward_hook(lambda m, a, out: self.note("text", "logits", None, out)),
        ]
        embed = getattr(tower, "embeddings", getattr(tower, "patch_embed", None))
        handles.append(embed.register_forward_hook(lambda m, a, out: self.note("vision", "embed", None, out)))
        norm = tower.merger.ln_q if hasattr(tower, "merger") else tower.post_layernorm
        handles.append(
            norm.register_forward_hook(lambda m, a, out: self.normed("vision", "ln_final", None, m, a[0], out))
        )
        for stack, blocks in (("text", text.layers), ("vision", blocks_of(tower))):
            for layer, block in enumerate(blocks):
                put(block, stack, layer)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for block in changed:
                del block.forward

    def block(self, block: Any, stack: str, layer: int, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        def note(name: str, value: Tensor) -> Tensor:
            return self.note(stack, name, layer, value)

        parts = Parts(block)
        if layer == 0:
            x = self.note("text", "embed", None, x) if stack == "text" else x
            x = note("resid_pre", x)
        read = note("attn_in", x)
        out = self.attention(parts, stack, layer, read, *args, **kwargs)
        x = note("resid_mid", x + note("attn_out", parts.post1(out)))
        read = note("mlp_in", x)
        read = self.normed(stack, "ln2", layer, parts.norm2, read, parts.norm2(read))
        hidden = parts.act(note("mlp_pre", linear(parts.pre, read)))
        if parts.up is not None:
            hidden = hidden * note("mlp_pre_linear", linear(parts.up, read))
        out = linear(parts.down, note("mlp_post", hidden))
        return note("resid_post", x + note("mlp_out", parts.post2(out)))

    def attention(self, parts: Parts, stack: str, layer: int, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        def note(name: str, value: Tensor) -> Tensor:
            return self.note(stack, name, layer, value)

        attn = parts.attention
        heads = getattr(attn, "num_heads", None) or attn.config.num_attention_heads
        weights, biases, out = projections(attn)
        plain = parts.norm1(x)
        change = self.normed(stack, "ln1", layer, parts.norm1, x, plain) - plain

        def norm1(copies: Tensor) -> Tensor:
            return parts.norm1(copies) + change.unsqueeze(-2)

        q, k, v = (
            note(name, self.projected(note, name, norm1, x, weight, bias, width(attn, heads)))
            for name, weight, bias in zip("qkv", weights, biases, strict=True)
        )
        if hasattr(attn, "q_norm"):
            q, k = attn.q_norm(q), attn.k_norm(k)
        angles = kwargs.get("position_embeddings")
        if angles is not None:
            cos, sin = (angle.unsqueeze(-2) for angle in angles)
            q, k = note("rot_q", turned(q, cos, sin)), note("rot_k", turned(k, cos, sin))
        packed = x.ndim == 2
        if packed:
            q, k, v = q[None], k[None], v[None]
        groups = q.shape[2] // k.shape[2]
        k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
        scaling = getattr(attn, "scaling", getattr(attn, "scale", None))
        scores = torch.einsum("bthd,bshd->bhts", q, k) * scaling
        scores = scores.masked_fill(~self.allowed(stack, layer, scores, args, kwargs), -torch.inf)
        scores = note("scores", scores)
        dead = scores.isinf().all(-1, keepdim=True)
        pattern = note("pattern", torch.where(dead, 0.0, torch.where(dead, 0.0, scores).softmax(-1)))
        z = torch.einsum("bhts,bshd->bthd", pattern, v)
        z = note("z", z[0] if packed else z)
        result = torch.einsum("...hd,mhd->...hm", z, out.weight.unflatten(1, (heads, -1)))
        total = note("result", result).sum(-2)
        return total if out.bias is None else total + out.bias

    def projected(
        self, note: Any, name: str, norm: Any, x: Tensor, weight: Tensor, bias: Tensor | None, size: int
    ) -> Tensor:
        weight = weight.unflatten(0, (-1, size))
        copies = note(f"{name}_input", x.unsqueeze(-2).expand(*x.shape[:-1], len(weight), x.shape[-1]))
        out = torch.einsum("...hm,hdm->...hd", norm(copies), weight)
        return out if bias is None else out + bias.unflatten(0, (-1, size))

    def allowed(self, stack: str, layer: int, scores: Tensor, args: Any, kwargs: Any) -> Tensor:
        queries, keys = scores.shape[-2:]
        mask = kwargs.get("attention_mask", args[0] if args and stack == "vision" else None)
        if "cu_seqlens" in kwargs:
            number = torch.zeros(keys, dtype=torch.int64)
            for end in kwargs["cu_seqlens"][1:-1].tolist():
                number[end:] += 1
            return number[:, None] == number[None, :]
        if mask is not None:
            assert mask.dtype == torch.bool
            return mask
        if stack == "text":
            return torch.ones(queries, keys, dtype=torch.bool).tril()
        return torch.ones(queries, keys, dtype=torch.bool)


class Parts:
    """The parts of a block, whatever its family calls them."""

    def __init__(self, block: Any) -> None:
        def one(*names: str) -> Any:
            return next((getattr(block, name) for name in names if hasattr(block, name)), None)

        def same(x: Tensor) -> Tensor:
            return x

        self.norm1 = one("layer_norm1", "norm1", "input_layernorm")
        self.attention = one("self_attn", "attn")
        four = hasattr(block, "pre_feedforward_layernorm")
        self.norm2 = (
            one("pre_feedforward_layernorm") if four else one("layer_norm2", "norm2", "post_attention_layernorm")
        )
        self.post1 = block.post_attention_layernorm if four else same
        self.post2 = block.post_feedforward_layernorm if four else same
        mlp = block.mlp
        self.pre = getattr(mlp, "gate_proj", getattr(mlp, "fc1", None))
        self.up, self.down = getattr(mlp, "up_proj", None), getattr(mlp, "down_proj", getattr(mlp, "fc2", None))
        self.act = next(getattr(mlp, name) for name in ("activation_fn", "act_fn", "act") if hasattr(mlp, name))


def projections(attn: Any) -> tuple[list[Tensor], list[Any], Any]:
    """Weights and biases of q, k and v, and the output projection."""
    if hasattr(attn, "qkv"):
        return list(attn.qkv.weight.chunk(3)), list(attn.qkv.bias.chunk(3)), attn.proj
    modules = [attn.q_proj, attn.k_proj, attn.v_proj]
    return (
        [m.weight for m in modules],
        [m.bias for m in modules],
        getattr(attn, "o_proj", getattr(attn, "out_proj", None)),
    )


def width(attn: Any, heads: int) -> int:
    return getattr(attn, "head_dim", None) or attn.dim // heads


def text_of(module: Any) -> Any:
    return getattr(module.model, "language_model", getattr(module.model, "text_model", None))


def tower_of(module: Any) -> Any:
    body = module.model
    return next(getattr(body, name) for name in ("vision_tower", "vision_model", "visual") if hasattr(body, name))


def blocks_of(tower: Any) -> Any:
    return tower.blocks if hasattr(tower, "blocks") else tower.encoder.layers


def as_rows(value: Tensor, of: list[list[int]], square: bool, fill: float = 0.0) -> Tensor:
    """A tower's value [N, ...] (or [N, H, N], where it is `square`) by rows, given which of its tokens each row has."""
    longest = max(map(len, of))
    if square:
        out = value.new_full((len(of), value.shape[1], longest, longest), fill)
        for row, tokens in enumerate(of):
            out[row, :, : len(tokens), : len(tokens)] = value[tokens][:, :, tokens].transpose(0, 1)
        return out
    out = value.new_zeros(len(of), longest, *value.shape[1:])
    for row, tokens in enumerate(of):
        out[row, : len(tokens)] = value[tokens]
    return out
