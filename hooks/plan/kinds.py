"""The kinds of sites: named activations of a transformer, their axes and their names in TransformerLens."""

from __future__ import annotations

from dataclasses import dataclass

ROW, POS, KEY, HEAD, DIM = "row", "pos", "key_pos", "head", "dim"


@dataclass(frozen=True)
class Kind:
    """A named activation: its axes in order, the letters of its sizes, and TransformerLens's name for it."""

    name: str
    axes: tuple[str, ...]
    letters: str
    hook: str
    per_layer: bool = True


_RESID, _SPLIT, _SQUARE = (ROW, POS, DIM), (ROW, POS, HEAD, DIM), (ROW, HEAD, POS, KEY)

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("embed", _RESID, "BTM", "hook_embed", per_layer=False),
        Kind("pos_embed", _RESID, "BTM", "hook_pos_embed", per_layer=False),
        Kind("resid_pre", _RESID, "BTM", "hook_resid_pre"),
        Kind("attn_in", _RESID, "BTM", "hook_attn_in"),
        Kind("q_input", _SPLIT, "BTHM", "hook_q_input"),
        Kind("k_input", _SPLIT, "BTKM", "hook_k_input"),
        Kind("v_input", _SPLIT, "BTKM", "hook_v_input"),
        Kind("ln1_scale", _RESID, "BTU", "ln1.hook_scale"),
        Kind("ln1", _RESID, "BTM", "ln1.hook_out"),
        Kind("q", _SPLIT, "BTHD", "attn.hook_q"),
        Kind("k", _SPLIT, "BTKD", "attn.hook_k"),
        Kind("v", _SPLIT, "BTKD", "attn.hook_v"),
        Kind("rot_q", _SPLIT, "BTHD", "attn.hook_rot_q"),
        Kind("rot_k", _SPLIT, "BTKD", "attn.hook_rot_k"),
        Kind("scores", _SQUARE, "BHTS", "attn.hook_attn_scores"),
        Kind("pattern", _SQUARE, "BHTS", "attn.hook_pattern"),
        Kind("z", _SPLIT, "BTHD", "attn.hook_z"),
        Kind("result", _SPLIT, "BTHM", "attn.hook_result"),
        Kind("attn_out", _RESID, "BTM", "hook_attn_out"),
        Kind("resid_mid", _RESID, "BTM", "hook_resid_mid"),
        Kind("mlp_in", _RESID, "BTM", "hook_mlp_in"),
        Kind("ln2_scale", _RESID, "BTU", "ln2.hook_scale"),
        Kind("ln2", _RESID, "BTM", "ln2.hook_out"),
        Kind("mlp_pre", _RESID, "BTF", "mlp.hook_pre"),
        Kind("mlp_pre_linear", _RESID, "BTF", "mlp.hook_pre_linear"),
        Kind("mlp_post", _RESID, "BTF", "mlp.hook_post"),
        Kind("router", _RESID, "BTE", "mlp.hook_router"),
        Kind("expert_out", _SPLIT, "BTEM", "mlp.hook_expert_out"),
        Kind("mlp_out", _RESID, "BTM", "hook_mlp_out"),
        Kind("resid_post", _RESID, "BTM", "hook_resid_post"),
        Kind("ln_final_scale", _RESID, "BTU", "ln_final.hook_scale", per_layer=False),
        Kind("ln_final", _RESID, "BTM", "ln_final.hook_out", per_layer=False),
        Kind("pooled", _RESID, "BTM", "pooler.hook_out", per_layer=False),
        Kind("logits", _RESID, "BTV", "unembed.hook_out", per_layer=False),
    )
}
"""Every kind of site, in the order in which a block computes them, be its attention and MLP sequential or parallel."""

BY_HOOK = {kind.hook: kind.name for kind in KINDS.values()} | {"hook_unembed": "logits"}
"""Kinds by the part of TransformerLens's name that follows the layer."""
LATER = (
    "router", "expert_out", "ln1_scale", "ln1", "ln2_scale", "ln2", "mlp_pre_linear", "ln_final_scale",
    "pooled",
)  # fmt: skip
"""Kinds that came after numbers had been drawn at the others, whose draws are to stay what they were."""
