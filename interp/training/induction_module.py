"""The network of the induction study as a plain module: one member, one clamp, one forward that reads like the paper.

It is an `interp.models.Transformer`, so a trained member can be wrapped (`ip.wrap`) and every site of it edited.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from interp.models.transformer import Transformer, TransformerConfig, rotate
from interp.training.induction_clamps import BLOCKED, Clamp
from interp.training.induction_model import Params, Shape
from interp.training.induction_task import QUERY, TOKENS, Batch


class TokenEmbedding(nn.Module):
    """Ids to vectors: exemplars through a linear layer, labels (the ids after them) through a table.

    Args:
        exemplars: [n_exemplars, d_input].
        n_labels: labels.
        d_model: width of the residual stream M.
    """

    exemplars: Tensor

    def __init__(self, exemplars: Tensor, n_labels: int, d_model: int) -> None:
        super().__init__()
        self.register_buffer("exemplars", exemplars, persistent=False)
        self.project = nn.Linear(exemplars.shape[1], d_model)
        self.label = nn.Embedding(n_labels, d_model)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embeddings [..., M] of ids [...]."""
        first_label = len(self.exemplars)
        is_label = ids >= first_label
        vectors = self.project(self.exemplars[torch.where(is_label, 0, ids)])
        labels = self.label(torch.where(is_label, ids - first_label, 0))
        return torch.where(is_label[..., None], labels, vectors)


class InductionModel(Transformer):
    """One member as a module; its logits [B, T, labels] are over labels alone.

    Args:
        exemplars: [n_exemplars, d_input].
        n_labels: labels.
        shape: sizes of the network.
    """

    def __init__(self, exemplars: Tensor, n_labels: int = 5, shape: Shape | None = None) -> None:
        shape = shape or Shape(d_input=exemplars.shape[1])
        super().__init__(
            TransformerConfig(
                vocab_size=len(exemplars) + n_labels,
                n_layers=2,
                d_model=shape.d_model,
                n_heads=shape.n_heads,
                positions="rotary",
                rotary_base=shape.rotary_base,
                norm_eps=shape.norm_eps,
                bias=False,
            )
        )
        self.embed = TokenEmbedding(exemplars, n_labels, shape.d_model)
        self.unembed = nn.Linear(shape.d_model, n_labels)

    @classmethod
    def of(cls, params: Params, exemplars: Tensor, n_labels: int = 5, shape: Shape | None = None) -> InductionModel:
        """The module of a member's parameters (`Ensemble.member`), in their dtype."""
        dtype = params["embed.weight"].dtype
        model = cls(exemplars.to(dtype), n_labels, shape).to(dtype)
        q0, k0, v0 = params["qkv0"].chunk(3)
        k1, v1 = params["kv1"].chunk(2)
        state = {
            "embed.project.weight": params["embed.weight"],
            "embed.project.bias": params["embed.bias"],
            "embed.label.weight": params["label"][:n_labels],
            "unembed.weight": params["read.weight"][:n_labels],
            "unembed.bias": params["read.bias"][:n_labels],
        }
        for layer, (q, k, v) in enumerate(((q0, k0, v0), (params["q1"], k1, v1))):
            names = {"q_proj": q, "k_proj": k, "v_proj": v, "o_proj": params[f"out{layer}"]}
            state |= {f"blocks.{layer}.attn.{name}.weight": value for name, value in names.items()}
        for name, own in (("ln0", "blocks.0.ln1"), ("ln1", "blocks.1.ln1"), ("ln_final", "ln_final")):
            state |= {f"{own}.{part}": params[f"{name}.{part}"] for part in ("weight", "bias")}
        model.load_state_dict(state)
        return model

    def clamped(self, batch: Batch, clamp: Clamp) -> Tensor:
        """Logits at the query [B, labels] under a clamp.

        Args:
            batch: classes and labels [2, B], target [B].
            clamp: what is held.
        """
        x = self.embed(batch.ids(len(self.embed.exemplars)))
        whole, _, _ = self._layer(0, x, x, x, x, clamp)
        after, _, _ = self._layer(0, x, x, x, x, clamp, ablate=clamp.ablate_first)
        q_in, k_in, v_in = (whole if stream in clamp.preserve else after for stream in ("q", "k", "v"))
        if clamp.first_layer:
            shifted = x[:, [0, 0, 2, 2, 4]]
            q_in, k_in, v_in = shifted, shifted, x
        held = None
        if clamp.match is not None:
            held = x.new_zeros(len(x), TOKENS)
            for row, target in enumerate(batch.target.tolist()):
                held[row, 1 + 2 * target], held[row, 3 - 2 * target] = clamp.sharpness, 1 - clamp.sharpness
        constant = clamp.preserve if clamp.stop_gradient else ()
        out, scores, _ = self._layer(
            1, after, q_in, k_in, v_in, clamp, ablate=clamp.ablate_last, held=held, constant=constant
        )
        if clamp.copy is None:
            return self.unembed(self.ln_final(out[:, QUERY]))
        of_head = scores[:, clamp.copy, QUERY]
        logits = x.new_full((len(x), self.unembed.out_features), BLOCKED)
        logits = logits.scatter(1, batch.labels[1][:, None], of_head[:, 3, None])
        return logits.scatter(1, batch.labels[0][:, None], of_head[:, 1, None])

    def _layer(
        self,
        layer: int,
        x: Tensor,
        q_in: Tensor,
        k_in: Tensor,
        v_in: Tensor,
        clamp: Clamp,
        ablate: tuple[int, ...] = (),
        held: Tensor | None = None,
        constant: tuple[str, ...] = (),
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Residual after a layer [B, T, M], its scores and pattern [B, H, T, S]; what it reads may be given apart."""
        block: Any = self.blocks[layer]
        attn, norm = block.attn, block.ln1

        def heads(part: str, stream: Tensor) -> Tensor:
            project = getattr(attn, f"{part}_proj")
            found = project(norm(stream)).unflatten(-1, (attn.num_heads, attn.head_dim)).transpose(1, 2)
            return found.detach() if part in constant else found

        cos, sin = self.rotary(torch.arange(TOKENS, device=x.device), x.dtype)
        q, k = rotate(heads("q", q_in), cos, sin), rotate(heads("k", k_in), cos, sin)
        scores = q @ k.transpose(-1, -2) * attn.scaling
        for head, temperature in (clamp.temperature_first, clamp.temperature_last)[layer]:
            scores = torch.cat((scores[:, :head], scores[:, head : head + 1] / temperature, scores[:, head + 1 :]), 1)
        open_ = torch.ones(TOKENS, TOKENS, dtype=torch.bool, device=x.device).tril()
        masked = scores.masked_fill(~open_, -torch.inf)
        if layer == 0:
            for head in clamp.no_previous_token:
                for t in range(1, TOKENS, 2 if clamp.labels_only else 1):
                    where = torch.zeros_like(masked, dtype=torch.bool)
                    where[:, head, t, t - 1] = True
                    masked = masked.masked_fill(where, BLOCKED)
        pattern = masked.softmax(-1)
        rows = list(pattern.unbind(1))
        if layer == 0:
            for head in clamp.previous_token:
                previous = x.new_zeros(TOKENS, TOKENS)
                previous[range(TOKENS), [0, *range(TOKENS - 1)]] = 1
                rows[head] = previous.expand_as(rows[head])
        elif held is not None and clamp.match is not None:
            rows[clamp.match] = torch.cat((rows[clamp.match][:, :QUERY], held[:, None]), dim=1)
        pattern = torch.stack(rows, dim=1)
        kept = [0.0 if head in ablate else 1.0 for head in range(attn.num_heads)]
        z = pattern @ (heads("v", v_in) * x.new_tensor(kept)[:, None, None])
        return x + attn.o_proj(z.transpose(1, 2).flatten(-2)), scores, pattern
