"""The network of the study as a plain module: one member of the ensemble, to look at or to train by itself.

It is an `interp.models.Transformer`, so a trained member can be wrapped (`ip.wrap`) and every site of it edited.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from experiments.induction_formation.network import Params, Shape
from interp.models.transformer import Transformer, TransformerConfig


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
