"""The forward pass written out by hand: every site is a line here, and an edit is a function applied on that line.

Nothing of the engine is used and no module of the model is called: `read` takes a model's parameters and the numbers of
its config into one plain `Spec`, and `forward` computes from that. Slow, explicit, differentiable, exact in float64.

Letters: B rows, T query positions, S key positions, H heads, K key/value heads, D head width, M model width, F MLP
width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

Key = tuple[str, "int | None"]
Edit = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x * torch.sigmoid(x),
}


@dataclass(frozen=True)
class Norm:
    """A LayerNorm (`centered`) or an RMSNorm over the last dimension."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    centered: bool

    def __call__(self, x: Tensor) -> Tensor:
        return self.divided(x, self.scale(x))

    def scale(self, x: Tensor) -> Tensor:
        """What x is divided by, [..., 1]."""
        if self.centered:
            x = x - x.mean(-1, keepdim=True)
        return torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps)

    def divided(self, x: Tensor, scale: Tensor) -> Tensor:
        """The output, where x is divided by this."""
        if self.centered:
            x = x - x.mean(-1, keepdim=True)
        x = x / scale * self.weight
        return x if self.bias is None else x + self.bias


class NoNorm:
    """What stands in a norm's place in a model without norms."""

    def __call__(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class AttentionWeights:
    """W_Q [H,D,M], W_K and W_V [K,D,M], W_O [H,D,M]; biases [H,D], [K,D], [K,D], [M], zero where the model has none."""

    W_Q: Tensor
    W_K: Tensor
    W_V: Tensor
    W_O: Tensor
    b_Q: Tensor
    b_K: Tensor
    b_V: Tensor
    b_O: Tensor
    q_norm: Norm | None
    k_norm: Norm | None
    window: int | None  # a query sees at most this many keys, itself included
    scale: float | None = None  # factor of q k; 1 / sqrt(D) where it is not given
    cap: float | None = None  # scores stay between -cap and cap


@dataclass(frozen=True)
class MLPWeights:
    """W_gate (None if not gated) and W_up [F,M], W_down [M,F]; biases [F], [F], [M], zero where the model has none."""

    W_gate: Tensor | None
    W_up: Tensor
    W_down: Tensor
    b_gate: Tensor | None
    b_up: Tensor
    b_down: Tensor
    act: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LayerWeights:
    norm1: Norm | NoNorm
    attn: AttentionWeights
    norm2: Norm | NoNorm | None
    mlp: MLPWeights | None
    parallel: bool = False  # the MLP reads what attention reads, not what it makes of it
    post1: Norm | None = None  # of what attention adds
    post2: Norm | None = None  # of what the MLP adds


@dataclass(frozen=True)
class Spec:
    """A whole model: W_E and W_U [V,M], W_pos [positions,M] if positions are learned, rotary_base if rotary.

    `rotary_width` is how many dimensions of a head are turned (None: all), `embed_scale` the factor of the embedding,
    `cap` what the logits stay below.

    One that takes images has W_E [M,channels,height,width] and b_E [M] of a patch, and the embedding of its class token
    [M]; every token sees every other, and the class token alone is read, by W_U and b_U.
    """

    W_E: Tensor
    W_pos: Tensor | None
    layers: tuple[LayerWeights, ...]
    norm: Norm | NoNorm
    W_U: Tensor
    rotary_base: float | None
    angle_dtype: torch.dtype  # what the rotary angles are computed in
    rotary_width: int | None = None
    embed_scale: float = 1.0
    cap: float | None = None
    class_token: Tensor | None = None
    b_E: Tensor | None = None
    b_U: Tensor | None = None

    def logits(self, final: Tensor) -> Tensor:
        """Logits [..., V] of the final norm's output [..., M]."""
        logits = torch.einsum("...m,vm->...v", final, self.W_U)
        logits = logits if self.b_U is None else logits + self.b_U
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


class Parameters:
    """A model's parameters by name, with the reshapes that the readers share."""

    def __init__(self, model: nn.Module) -> None:
        self.named = dict(model.named_parameters(remove_duplicate=False))

    def __getitem__(self, name: str) -> Tensor:
        return self.named[name]

    def bias(self, name: str, like: Tensor) -> Tensor:
        """The bias called `name`, or zeros for the outputs of the weight `like` [out, in]."""
        return self.named[name] if name in self.named else like.new_zeros(like.shape[0])

    def norm(self, name: str, eps: float, centered: bool) -> Norm | None:
        if f"{name}.weight" not in self.named:
            return None
        return Norm(self.named[f"{name}.weight"], self.named.get(f"{name}.bias"), eps, centered)

    def attention(self, prefix: str, head_dim: int, norm: tuple[float, bool], window: int | None) -> AttentionWeights:
        """Separate q_proj, k_proj, v_proj and o_proj below `prefix`, each [out, in], cut into heads."""
        w = {letter: self.named[f"{prefix}.{letter}_proj.weight"] for letter in "qkvo"}
        b = {letter: self.bias(f"{prefix}.{letter}_proj.bias", w[letter]) for letter in "qkvo"}
        return AttentionWeights(
            W_Q=w["q"].unflatten(0, (-1, head_dim)),
            W_K=w["k"].unflatten(0, (-1, head_dim)),
            W_V=w["v"].unflatten(0, (-1, head_dim)),
            W_O=w["o"].T.unflatten(0, (-1, head_dim)),
            b_Q=b["q"].unflatten(0, (-1, head_dim)),
            b_K=b["k"].unflatten(0, (-1, head_dim)),
            b_V=b["v"].unflatten(0, (-1, head_dim)),
            b_O=b["o"],
            q_norm=self.norm(f"{prefix}.q_norm", *norm),
            k_norm=self.norm(f"{prefix}.k_norm", *norm),
            window=window,
        )

    def mlp(self, gate: str, up: str, down: str, activation: str) -> MLPWeights:
        """Separate linear layers, each [out, in]."""
        W_gate, W_up, W_down = (
            self.named.get(f"{gate}.weight"),
            self.named[f"{up}.weight"],
            self.named[f"{down}.weight"],
        )
        return MLPWeights(
            W_gate=W_gate,
            W_up=W_up,
            W_down=W_down,
            b_gate=None if W_gate is None else self.bias(f"{gate}.bias", W_gate),
            b_up=self.bias(f"{up}.bias", W_up),
            b_down=self.bias(f"{down}.bias", W_down),
            act=ACTIVATIONS[activation],
        )


def read_gpt2(model: nn.Module) -> Spec:
    """GPT-2: LayerNorm, learned positions, fused q/k/v, and weights stored [in, out]."""
    config, p = model.config, Parameters(model)
    assert config.activation_function == "gelu_new"
    assert config.scale_attn_weights
    assert not config.scale_attn_by_inverse_layer_idx
    assert not config.add_cross_attention
    heads, eps = config.n_head, config.layer_norm_epsilon
    layers = []
    for i in range(config.n_layer):
        at = f"transformer.h.{i}"
        W_Q, W_K, W_V = (w.T.unflatten(0, (heads, -1)) for w in p[f"{at}.attn.c_attn.weight"].chunk(3, dim=1))
        b_Q, b_K, b_V = (b.unflatten(0, (heads, -1)) for b in p[f"{at}.attn.c_attn.bias"].chunk(3))
        W_O, b_O = p[f"{at}.attn.c_proj.weight"].unflatten(0, (heads, -1)), p[f"{at}.attn.c_proj.bias"]
        attn = AttentionWeights(W_Q, W_K, W_V, W_O, b_Q, b_K, b_V, b_O, q_norm=None, k_norm=None, window=None)
        mlp = MLPWeights(
            W_gate=None,
            W_up=p[f"{at}.mlp.c_fc.weight"].T,
            W_down=p[f"{at}.mlp.c_proj.weight"].T,
            b_gate=None,
            b_up=p[f"{at}.mlp.c_fc.bias"],
            b_down=p[f"{at}.mlp.c_proj.bias"],
            act=ACTIVATIONS["gelu_tanh"],
        )
        layers.append(LayerWeights(p.norm(f"{at}.ln_1", eps, True), attn, p.norm(f"{at}.ln_2", eps, True), mlp))
    return Spec(
        W_E=p["transformer.wte.weight"],
        W_pos=p["transformer.wpe.weight"],
        layers=tuple(layers),
        norm=p.norm("transformer.ln_f", eps, True),
        W_U=p["lm_head.weight"],
        rotary_base=None,
        angle_dtype=torch.float32,
    )


def read_neox(model: nn.Module) -> Spec:
    """GPT-NeoX: LayerNorm, partial rotary, q/k/v side by side for each head, parallel blocks or sequential ones."""
    config, p = model.config, Parameters(model)
    assert config.hidden_act == "gelu"
    assert config.rope_parameters["rope_type"] == "default"
    heads, norm = config.num_attention_heads, (config.layer_norm_eps, True)
    layers = []
    for i in range(config.num_hidden_layers):
        at = f"gpt_neox.layers.{i}"
        fused = p[f"{at}.attention.query_key_value.weight"]
        W_Q, W_K, W_V = fused.unflatten(0, (heads, 3, -1)).unbind(1)
        b_Q, b_K, b_V = p.bias(f"{at}.attention.query_key_value.bias", fused).unflatten(0, (heads, 3, -1)).unbind(1)
        W_O = p[f"{at}.attention.dense.weight"]
        b_O = p.bias(f"{at}.attention.dense.bias", W_O)
        W_O = W_O.T.unflatten(0, (heads, -1))
        attn = AttentionWeights(W_Q, W_K, W_V, W_O, b_Q, b_K, b_V, b_O, q_norm=None, k_norm=None, window=None)
        mlp = p.mlp("", f"{at}.mlp.dense_h_to_4h", f"{at}.mlp.dense_4h_to_h", "gelu")
        norms = p.norm(f"{at}.input_layernorm", *norm), p.norm(f"{at}.post_attention_layernorm", *norm)
        layers.append(LayerWeights(norms[0], attn, norms[1], mlp, parallel=config.use_parallel_residual))
    width = config.hidden_size // heads
    return Spec(
        W_E=p["gpt_neox.embed_in.weight"],
        W_pos=None,
        layers=tuple(layers),
        norm=p.norm("gpt_neox.final_layer_norm", *norm),
        W_U=p["lm_head.weight"],
        rotary_base=config.rope_parameters["rope_theta"],
        angle_dtype=torch.float32,
        rotary_width=int(width * config.rope_parameters["partial_rotary_factor"]),
    )


def read_llama(model: nn.Module) -> Spec:
    """Llama, Mistral, Qwen2, Qwen3: RMSNorm, rotary, gated; biases, q/k norms and windows where a model has them."""
    config, p = model.config, Parameters(model)
    assert config.hidden_act == "silu"
    assert config.rope_parameters["rope_type"] == "default"
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    norm = (config.rms_norm_eps, False)
    window = getattr(config, "sliding_window", None)
    # A model that mixes kinds of layers says so layer by layer; elsewhere a window holds in all of them.
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    layers = []
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}"
        layers.append(
            LayerWeights(
                norm1=p.norm(f"{at}.input_layernorm", *norm),
                attn=p.attention(
                    f"{at}.self_attn", head_dim, norm, window if kinds[i] == "sliding_attention" else None
                ),
                norm2=p.norm(f"{at}.post_attention_layernorm", *norm),
                mlp=p.mlp(f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj", f"{at}.mlp.down_proj", "silu"),
            )
        )
    return Spec(
        W_E=p["model.embed_tokens.weight"],
        W_pos=None,
        layers=tuple(layers),
        norm=p.norm("model.norm", *norm),
        W_U=p["lm_head.weight"],
        rotary_base=config.rope_parameters["rope_theta"],
        angle_dtype=torch.float32,  # transformers computes angles in float32 whatever the model is in
    )


def read_gemma(model: nn.Module) -> Spec:
    """Gemma 2: RMSNorm by 1 + weight before and after each sublayer, capped scores and logits, some layers' windows."""
    config, p = model.config, Parameters(model)
    assert config.hidden_activation == "gelu_pytorch_tanh"
    assert config.rope_parameters["rope_type"] == "default"

    def norm(name: str) -> Norm:
        return Norm(1 + p[f"{name}.weight"], None, config.rms_norm_eps, centered=False)

    layers = []
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}"
        window = config.sliding_window if config.layer_types[i] == "sliding_attention" else None
        attn = p.attention(f"{at}.self_attn", config.head_dim, (0.0, False), window)
        attn = replace(attn, scale=config.query_pre_attn_scalar**-0.5, cap=config.attn_logit_softcapping)
        layers.append(
            LayerWeights(
                norm1=norm(f"{at}.input_layernorm"),
                attn=attn,
                norm2=norm(f"{at}.pre_feedforward_layernorm"),
                mlp=p.mlp(f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj", f"{at}.mlp.down_proj", "gelu_tanh"),
                post1=norm(f"{at}.post_attention_layernorm"),
                post2=norm(f"{at}.post_feedforward_layernorm"),
            )
        )
    return Spec(
        W_E=p["model.embed_tokens.weight"],
        W_pos=None,
        layers=tuple(layers),
        norm=norm("model.norm"),
        W_U=p["lm_head.weight"],
        rotary_base=config.rope_parameters["rope_theta"],
        angle_dtype=torch.float32,
        embed_scale=float(torch.tensor(config.hidden_size**0.5, dtype=torch.float32)),  # in which transformers keeps it
        cap=config.final_logit_softcapping,
    )


def read_small(model: nn.Module) -> Spec:
    """The project's own `Transformer`, all its options."""
    config, p = model.config, Parameters(model)
    norm = (config.norm_eps, config.norm == "layernorm")

    def norm_at(name: str) -> Norm | NoNorm | None:
        return NoNorm() if config.norm == "none" else p.norm(name, *norm)

    layers = []
    for i in range(config.n_layers):
        at = f"blocks.{i}"
        mlp = None
        if config.d_mlp is not None:
            mlp = p.mlp(f"{at}.mlp.gate", f"{at}.mlp.up", f"{at}.mlp.down", config.activation)
        attn = p.attention(f"{at}.attn", config.d_head, norm, window=None)
        layers.append(LayerWeights(norm_at(f"{at}.ln1"), attn, norm_at(f"{at}.ln2"), mlp))
    return Spec(
        W_E=p["embed.weight"],
        W_pos=p["pos_embed.weight"] if config.positions == "learned" else None,
        layers=tuple(layers),
        norm=norm_at("ln_final"),
        W_U=p["unembed.weight"],
        rotary_base=config.rotary_base if config.positions == "rotary" else None,
        angle_dtype=torch.promote_types(p["embed.weight"].dtype, torch.float32),
    )


def read_vit(model: nn.Module) -> Spec:
    """A vision transformer with a classifier: LayerNorm, biases everywhere."""
    config, p = model.config, Parameters(model)
    assert config.hidden_act == "gelu"
    norm = (config.layer_norm_eps, True)
    layers = []
    for i in range(config.num_hidden_layers):
        at = f"vit.layers.{i}"
        layers.append(
            LayerWeights(
                norm1=p.norm(f"{at}.layernorm_before", *norm),
                attn=p.attention(f"{at}.attention", config.hidden_size // config.num_attention_heads, norm, None),
                norm2=p.norm(f"{at}.layernorm_after", *norm),
                mlp=p.mlp(f"{at}.mlp.gate", f"{at}.mlp.fc1", f"{at}.mlp.fc2", "gelu"),
            )
        )
    return Spec(
        W_E=p["vit.embeddings.patch_embeddings.projection.weight"],
        W_pos=p["vit.embeddings.position_embeddings"][0],
        layers=tuple(layers),
        norm=p.norm("vit.layernorm", *norm),
        W_U=p["classifier.weight"],
        rotary_base=None,
        angle_dtype=torch.float32,
        class_token=p["vit.embeddings.cls_token"][0, 0],
        b_E=p["vit.embeddings.patch_embeddings.projection.bias"],
        b_U=p["classifier.bias"],
    )


READERS: dict[str, Callable[[nn.Module], Spec]] = {
    "GPT2LMHeadModel": read_gpt2,
    "Gemma2ForCausalLM": read_gemma,
    "GPTNeoXForCausalLM": read_neox,
    "LlamaForCausalLM": read_llama,
    "MistralForCausalLM": read_llama,
    "Qwen2ForCausalLM": read_llama,
    "Qwen3ForCausalLM": read_llama,
    "Transformer": read_small,
    "ViTForImageClassification": read_vit,
}


def read(model: nn.Module) -> Spec:
    """Return the weights and numbers of a model of a known family."""
    return READERS[type(model).__name__](model)


def positions(mask: Tensor) -> Tensor:
    """Return the position ids [B,T] that padding asks for: real tokens so far - 1, and 0 before the first."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def embed_image(spec: Spec, pixels: Tensor) -> Tensor:
    """Embed pixels [B,channels,height,width]: the class token, then patch by patch, each with its position."""
    height, width = spec.W_E.shape[2:]
    tokens = [spec.class_token.expand(len(pixels), -1)]
    for top in range(0, pixels.shape[2], height):
        for left in range(0, pixels.shape[3], width):
            patch = pixels[:, :, top : top + height, left : left + width]
            tokens.append(torch.einsum("bchw,mchw->bm", patch, spec.W_E) + spec.b_E)
    return torch.stack(tokens, dim=1) + spec.W_pos


def rotate(x: Tensor, position: Tensor, base: float, dtype: torch.dtype) -> Tensor:
    """Turn dimension i of x [B,T,heads,D] against dimension i + D/2 by the angle position * base^(-2i/D)."""
    D = x.shape[-1]
    frequency = 1.0 / (base ** (torch.arange(0, D, 2, dtype=dtype, device=x.device) / D))
    angle = position[:, :, None, None].to(dtype) * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., : D // 2], x[..., D // 2 :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rotate_some(x: Tensor, position: Tensor, spec: Spec) -> Tensor:
    """Turn the first dimensions of each head as `rotate` does, as many as the model turns."""
    assert spec.rotary_base is not None
    n = x.shape[-1] if spec.rotary_width is None else spec.rotary_width
    return torch.cat((rotate(x[..., :n], position, spec.rotary_base, spec.angle_dtype), x[..., n:]), dim=-1)


def softmax(scores: Tensor) -> Tensor:
    """Softmax over keys in which a query whose every score is -inf gets zeros, in the value and in the gradient."""
    closed = (scores == -torch.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(closed, 0.0), dim=-1).masked_fill(closed, 0.0)


def forward(
    model: nn.Module, ids: Tensor, mask: Tensor, edits: Mapping[Key, Edit] | None = None
) -> tuple[Tensor, dict[Key, Tensor]]:
    """Run a model by hand.

    Args:
        model: a model of a family in `READERS`; only its parameters and config are read.
        ids: token ids [B,T], or pixels [B,channels,height,width].
        mask: bool [B,T], True at real tokens. Masks keys alone, as the models do: a padded query before the first real
            token attends to nothing (its pattern is zero), one after the last still sees the real tokens before it.
        edits: (site, layer or None) -> function from the site's whole tensor to a new one of the same shape, applied in
            execution order. An edit of `resid_post` comes before one of the next layer's `resid_pre`.

    Returns:
        The logits [B,T,V] ([B,1,V] of a classifier), and every site's value after editing by (site, layer or None).

    Raises:
        ValueError: an edit of a site that the model does not have, or one that changes the shape.
    """
    spec = read(model)
    pending = dict(edits or {})
    cache: dict[Key, Tensor] = {}

    def at(name: str, layer: int | None, x: Tensor) -> Tensor:
        edit = pending.pop((name, layer), None)
        if edit is not None:
            new = edit(x)
            if new.shape != x.shape:
                raise ValueError(f"the edit of {name} in layer {layer} made {list(new.shape)} of {list(x.shape)}")
            x = new
        cache[name, layer] = x
        return x

    T = mask.shape[1]
    position = positions(mask)
    query, key = torch.arange(T, device=ids.device)[:, None], torch.arange(T, device=ids.device)[None, :]

    images = spec.class_token is not None
    resid = at("embed", None, embed_image(spec, ids) if images else spec.W_E[ids] * spec.embed_scale)
    if spec.W_pos is not None and not images:
        resid = resid + at("pos_embed", None, spec.W_pos[position])

    def normed(name: str, layer: int | None, norm: Norm | NoNorm, x: Tensor) -> Tensor:
        """The output of a norm, by way of what it divides by."""
        if isinstance(norm, NoNorm):
            return at(name, layer, x)
        return at(name, layer, norm.divided(x, at(f"{name}_scale", layer, norm.scale(x))))

    for layer, w in enumerate(spec.layers):
        resid = at("resid_pre", layer, resid)
        if layer > 0:
            cache["resid_post", layer - 1] = resid  # two names, one tensor

        a = w.attn
        H, K, D = a.W_Q.shape[0], a.W_K.shape[0], a.W_Q.shape[1]
        attn_in = at("attn_in", layer, resid)
        q_input = at("q_input", layer, attn_in[:, :, None, :].expand(-1, -1, H, -1))
        k_input = at("k_input", layer, attn_in[:, :, None, :].expand(-1, -1, K, -1))
        v_input = at("v_input", layer, attn_in[:, :, None, :].expand(-1, -1, K, -1))
        # Heads read one output of the norm, but for those whose own input is edited.
        change = (normed("ln1", layer, w.norm1, attn_in) - w.norm1(attn_in))[:, :, None]
        q = at("q", layer, torch.einsum("bthm,hdm->bthd", w.norm1(q_input) + change, a.W_Q) + a.b_Q)
        k = at("k", layer, torch.einsum("bskm,kdm->bskd", w.norm1(k_input) + change, a.W_K) + a.b_K)
        v = at("v", layer, torch.einsum("bskm,kdm->bskd", w.norm1(v_input) + change, a.W_V) + a.b_V)
        if a.q_norm is not None and a.k_norm is not None:
            q, k = a.q_norm(q), a.k_norm(k)
        if spec.rotary_base is not None:
            q = at("rot_q", layer, rotate_some(q, position, spec))
            k = at("rot_k", layer, rotate_some(k, position, spec))

        allowed = mask[:, None, None, :] & ((key <= query) | images)
        if a.window is not None:
            allowed = allowed & (key > query - a.window)
        group = torch.arange(H, device=ids.device) // (H // K)  # the key/value head that each query head reads
        scores = torch.einsum("bthd,bshd->bhts", q, k[:, :, group]) * (1 / math.sqrt(D) if a.scale is None else a.scale)
        if a.cap is not None:
            scores = a.cap * torch.tanh(scores / a.cap)
        scores = at("scores", layer, scores.masked_fill(~allowed, -torch.inf)).masked_fill(~allowed, -torch.inf)
        pattern = at("pattern", layer, softmax(scores)).masked_fill(~allowed, 0.0)
        cache["scores", layer], cache["pattern", layer] = scores, pattern  # an edit never opens a forbidden edge
        z = at("z", layer, torch.einsum("bhts,bshd->bthd", pattern, v[:, :, group]))
        result = at("result", layer, torch.einsum("bthd,hdm->bthm", z, a.W_O))
        attn_out = result.sum(dim=2) + a.b_O
        attn_out = at("attn_out", layer, attn_out if w.post1 is None else w.post1(attn_out))

        if w.mlp is None or w.norm2 is None:
            resid = at("resid_post", layer, resid + attn_out)
            continue
        mid = resid + attn_out
        if not w.parallel:
            mid = at("resid_mid", layer, mid)
        m = w.mlp
        read_by = normed("ln2", layer, w.norm2, at("mlp_in", layer, resid if w.parallel else mid))
        up = torch.einsum("btm,fm->btf", read_by, m.W_up) + m.b_up
        if m.W_gate is None or m.b_gate is None:
            hidden = m.act(at("mlp_pre", layer, up))
        else:
            gate = at("mlp_pre", layer, torch.einsum("btm,fm->btf", read_by, m.W_gate) + m.b_gate)
            hidden = m.act(gate) * at("mlp_pre_linear", layer, up)
        hidden = at("mlp_post", layer, hidden)
        mlp_out = torch.einsum("btf,mf->btm", hidden, m.W_down) + m.b_down
        mlp_out = at("mlp_out", layer, mlp_out if w.post2 is None else w.post2(mlp_out))
        resid = at("resid_post", layer, mid + mlp_out)

    final = normed("ln_final", None, spec.norm, resid)
    logits = at("logits", None, spec.logits(final[:, :1] if images else final))
    if pending:
        raise ValueError(f"{type(model).__name__} has no sites {sorted(pending, key=str)}")
    return logits, cache
