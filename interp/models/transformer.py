"""A small decoder-only transformer: pre-norm, causal, with the variants that matter for causal analysis as options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hooks import ModelError, nearest

NORMS: dict[str, type[nn.Module]] = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm, "none": nn.Identity}
POSITIONS = ("learned", "rotary", "none")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


@dataclass(frozen=True)
class TransformerConfig:
    """The shape and the variants of a `Transformer`; checked, and with its defaults filled in, on construction.

    Args:
        vocab_size: number of tokens V.
        n_layers: number of blocks L.
        d_model: width of the residual stream M.
        n_heads: query heads a layer H.
        n_kv_heads: key/value heads a layer K, a divisor of `n_heads`; None means `n_heads`.
        d_head: width of a head D, even with rotary positions; None means ``d_model // n_heads``.
        d_mlp: hidden width of the MLP F; None makes the model attention-only.
        n_ctx: tokens in the learned position table (the other positions have no limit).
        norm: "layernorm" or "rmsnorm", for the blocks, the final norm and the q/k norms; or "none", which makes an
            attention-only model linear but for its patterns.
        norm_eps: added to the variance in every norm.
        positions: "learned" (added to the embedding), "rotary" or "none".
        rotary_base: base of the rotary wavelengths, in tokens.
        activation: "gelu", "gelu_tanh", "relu" or "silu".
        gated: whether the MLP multiplies ``act(gate(x))`` into ``up(x)``.
        bias: whether the linear layers of attention and MLP have biases.
        qk_norm: whether each head's queries and keys are normalised (before rotary); not with norm="none".
        tied: whether the unembedding is the embedding matrix.

    Raises:
        ModelError: a ValueError; the options do not describe a model.
    """

    vocab_size: int
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int | None = None
    d_head: int | None = None
    d_mlp: int | None = None
    n_ctx: int = 512
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    positions: str = "learned"
    rotary_base: float = 10000.0
    activation: str = "gelu"
    gated: bool = False
    bias: bool = True
    qk_norm: bool = False
    tied: bool = False

    def __post_init__(self) -> None:
        for name, options in (("norm", NORMS), ("positions", POSITIONS), ("activation", ACTIVATIONS)):
            value = getattr(self, name)
            if value not in options:
                raise ModelError(f"{name} must be one of {', '.join(options)}; got {value!r}{nearest(value, options)}")
        for name in ("vocab_size", "n_layers", "d_model", "n_heads", "n_kv_heads", "d_head", "d_mlp", "n_ctx"):
            value = getattr(self, name)
            if value is None and name in ("n_kv_heads", "d_head", "d_mlp"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ModelError(f"{name} must be a positive integer; got {value!r}")
        for name in ("norm_eps", "rotary_base"):
            if not getattr(self, name) > 0:
                raise ModelError(f"{name} must be positive; got {getattr(self, name)!r}")
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        elif self.n_heads % self.n_kv_heads:
            raise ModelError(f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})")
        if self.d_head is None:
            if self.d_model % self.n_heads:
                raise ModelError(f"n_heads ({self.n_heads}) does not divide d_model ({self.d_model}): give d_head")
            object.__setattr__(self, "d_head", self.d_model // self.n_heads)
        if self.positions == "rotary" and self.d_head is not None and self.d_head % 2:
            raise ModelError(f"rotary positions turn pairs of dimensions: d_head must be even; got {self.d_head}")
        if self.gated and self.d_mlp is None:
            raise ModelError("gated=True needs an MLP: give d_mlp, or leave gated=False for an attention-only model")
        if self.qk_norm and self.norm == "none":
            raise ModelError('qk_norm=True needs a norm to apply: give norm="layernorm" or "rmsnorm"')

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON data, defaults filled in."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TransformerConfig:
        """Return the config that `to_dict` gave `data` for.

        Raises:
            ModelError: an option that does not exist, one that is missing, or a value that is not valid.
        """
        names = [field.name for field in fields(cls)]
        for name in data:
            if name not in names:
                raise ModelError(f"TransformerConfig has no option {name!r}{nearest(name, names)}")
        missing = [name for name in ("vocab_size", "n_layers", "d_model", "n_heads") if name not in data]
        if missing:
            raise ModelError(f"TransformerConfig needs {', '.join(missing)}")
        return cls(**data)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads.

    `attend` is the one place where queries meet keys: replaced on an instance, it shows or changes what happens there.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        assert config.n_kv_heads is not None  # the config fills both in
        assert config.d_head is not None
        self.num_heads, self.num_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.d_head
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(config.d_model, self.num_heads * self.head_dim, bias=config.bias)
        self.k_proj = nn.Linear(config.d_model, self.num_kv_heads * self.head_dim, bias=config.bias)
        self.v_proj = nn.Linear(config.d_model, self.num_kv_heads * self.head_dim, bias=config.bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.d_model, bias=config.bias)
        self.q_norm = NORMS[config.norm](self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = NORMS[config.norm](self.head_dim, eps=config.norm_eps) if config.qk_norm else None

    @staticmethod
    def attend(
        module: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scaling: float
    ) -> tuple[Tensor, Tensor | None]:
        """Mix values by attention.

        Args:
            module: the attention layer that asks.
            q: queries after rotary [B, H, T, D].
            k: keys after rotary [B, K, S, D].
            v: values [B, K, S, D].
            mask: bool [B, 1, T, S], True where a query may attend.
            scaling: factor on the scores.

        Returns:
            The mixed values of each head [B, T, H, D], zero for a query that may attend to nothing; and None, where a
            function that keeps its attention pattern returns it.
        """
        attends = mask.any(dim=-1, keepdim=True)
        # A row without a single key makes some kernels give nan, in the value or the gradient: open it, then zero it.
        z = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask | ~attends, scale=scaling, enable_gqa=module.num_kv_heads < module.num_heads
        )
        return torch.where(attends, z, 0.0).transpose(1, 2), None

    def forward(self, x: Tensor, mask: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return the layer's output [B, T, M] for the normed residual x [B, T, M]; mask and rotary as in `Block`."""
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        z, _ = self.attend(self, q, k, v, mask, scaling=self.scaling)
        return self.o_proj(z.flatten(-2))


class MLP(nn.Module):
    """Two linear layers with an activation between them, gated by a third where the config says so."""

    def __init__(self, config: TransformerConfig, d_mlp: int) -> None:
        super().__init__()
        self.act = ACTIVATIONS[config.activation]
        self.gate = nn.Linear(config.d_model, d_mlp, bias=config.bias) if config.gated else None
        self.up = nn.Linear(config.d_model, d_mlp, bias=config.bias)
        self.down = nn.Linear(d_mlp, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the MLP's output [B, T, M] for the normed residual x [B, T, M]."""
        hidden = self.act(self.up(x)) if self.gate is None else self.act(self.gate(x)) * self.up(x)
        return self.down(hidden)


class Block(nn.Module):
    """Attention, then (unless attention-only) an MLP, each reading the normed residual and adding to it."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.ln1 = NORMS[config.norm](config.d_model, eps=config.norm_eps)
        self.attn = Attention(config)
        self.ln2 = None if config.d_mlp is None else NORMS[config.norm](config.d_model, eps=config.norm_eps)
        self.mlp = None if config.d_mlp is None else MLP(config, config.d_mlp)

    def forward(self, x: Tensor, mask: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return the residual after the block.

        Args:
            x: residual before the block [B, T, M].
            mask: bool [B, 1, T, S], True where a query may attend.
            rotary: cosines and sines of `Transformer.rotary`, each [B, 1, T, D]; None without rotary positions.
        """
        x = x + self.attn(self.ln1(x), mask, rotary)
        if self.ln2 is None or self.mlp is None:
            return x
        return x + self.mlp(self.ln2(x))


class Transformer(nn.Module):
    """A causal language model from token ids to logits.

    Args:
        config: its shape and variants.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.pos_embed = nn.Embedding(config.n_ctx, config.d_model) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_final = NORMS[config.norm](config.d_model, eps=config.norm_eps)
        self.unembed = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tied:
            self.unembed.weight = self.embed.weight
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                # Each block adds to the residual twice: GPT-2's scaling keeps its variance independent of depth.
                adds = name.endswith(("o_proj", "down"))
                nn.init.normal_(module.weight, std=0.02 / (2 * config.n_layers) ** 0.5 if adds else 0.02)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Return the logits [B, T, V].

        Args:
            input_ids: token ids [B, T].
            attention_mask: [B, T], nonzero at real tokens and 0 at padding; None means that all are real.
            position_ids: [B, T] or what broadcasts to it; by default the number of real tokens before each token.
            inputs_embeds: token embeddings [B, T, M] instead of `input_ids`.

        Raises:
            ModelError: both or neither of ids and embeddings, a mask of another shape, or more tokens than `n_ctx`
                learned positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ModelError("give either input_ids or inputs_embeds, and not both")
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length = x.shape[:2]
        if attention_mask is not None and attention_mask.shape != (batch, length):
            raise ModelError(f"attention_mask must be {[batch, length]}; got {list(attention_mask.shape)}")
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.bool().long().cumsum(dim=-1) - 1).clamp(min=0)
        elif position_ids is None:
            position_ids = torch.arange(length, device=x.device)
        position_ids = position_ids.expand(batch, length)
        if self.pos_embed is not None:
            if length > self.config.n_ctx:
                raise ModelError(f"{length} tokens do not fit in the {self.config.n_ctx} learned positions (n_ctx)")
            x = x + self.pos_embed(position_ids)
        rotary = None
        if self.config.positions == "rotary":
            cos, sin = self.rotary(position_ids, x.dtype)
            rotary = cos.unsqueeze(1), sin.unsqueeze(1)
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril().expand(batch, 1, length, length)
        if attention_mask is not None:
            mask = mask & attention_mask.bool()[:, None, None, :]
        for block in self.blocks:
            x = block(x, mask, rotary)
        return self.unembed(self.ln_final(x))

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of the rotary angles, each [..., D] (Su et al. 2021; halves as in Llama).

        Args:
            positions: integers of any shape, in tokens.
            dtype: what the model computes in; angles are never narrower than float32, which bfloat16 positions would
                ruin.
        """
        assert self.config.d_head is not None  # the config fills it in
        wide = torch.promote_types(dtype, torch.float32)
        exponent = torch.arange(0, self.config.d_head, 2, dtype=wide, device=positions.device) / self.config.d_head
        angles = positions[..., None].to(wide) * self.config.rotary_base**-exponent
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [B, heads, T, D] with dimension i turned against dimension i + D/2 by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
