"""Tiny models with random weights, one of each family, for tests that compare numbers in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor, nn

from hooks import Model, wrap
from interp.models import Transformer, TransformerConfig
from tests.widening import widen_attention, widen_norms

VOCAB = 50
IMAGE, PATCH = (2, 8, 8), 4  # channels, height and width of vit's images, and the side of a patch: 5 tokens
CLASSES = 6
WINDOW = 4  # mistral's and gemma's sliding window, in tokens: shorter than the sequences of most tests
# What the decoders of transformers have in common here: their sizes, but for width and depth, and no special tokens.
SPECIAL = {"bos_token_id": None, "eos_token_id": None}
COMMON = {"vocab_size": VOCAB, "num_attention_heads": 4, "max_position_embeddings": 64, **SPECIAL}
GROUPED = {**COMMON, "intermediate_size": 40, "num_key_value_heads": 2}


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_inner=48,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **SPECIAL,
            attn_implementation="sdpa",
        )
    )


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            **GROUPED,
            hidden_size=24,
            num_hidden_layers=3,
            head_dim=8,
            attn_implementation="sdpa",
        )
    )


def _mistral() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(
        MistralConfig(
            **GROUPED,
            hidden_size=32,
            num_hidden_layers=3,
            sliding_window=WINDOW,
            attn_implementation="sdpa",
        )
    )


def _qwen2() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(
        Qwen2Config(
            **GROUPED,
            hidden_size=32,
            num_hidden_layers=2,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            attn_implementation="sdpa",
        )
    )


def _qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            **GROUPED,
            hidden_size=16,
            num_hidden_layers=2,
            head_dim=8,
            attn_implementation="sdpa",
        )
    )


def _neox(parallel: bool) -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            **COMMON,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2 if parallel else 3,
            use_parallel_residual=parallel,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
            attn_implementation="sdpa",
        )
    )


def _gemma2() -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(
        Gemma2Config(
            **GROUPED,
            hidden_size=24,
            num_hidden_layers=3,
            head_dim=8,
            query_pre_attn_scalar=5,
            sliding_window=WINDOW,
            attn_logit_softcapping=3.0,
            final_logit_softcapping=4.0,
            pad_token_id=None,
            attn_implementation="eager",  # of older transformers, SDPA would be the default, which leaves out the cap
        )
    )


def _small_ln_learned() -> nn.Module:
    return Transformer(TransformerConfig(vocab_size=VOCAB, n_layers=2, d_model=32, n_heads=4, d_mlp=48, n_ctx=64))


def _small_rms_rotary_gqa() -> nn.Module:
    return Transformer(
        TransformerConfig(
            vocab_size=VOCAB,
            n_layers=3,
            d_model=24,
            n_heads=4,
            n_kv_heads=2,
            d_head=8,
            d_mlp=40,
            norm="rmsnorm",
            positions="rotary",
            activation="silu",
            gated=True,
            bias=False,
        )
    )


def _small_attn_only() -> nn.Module:
    return Transformer(TransformerConfig(vocab_size=VOCAB, n_layers=2, d_model=32, n_heads=4, positions="rotary"))


def _small_qk_norm() -> nn.Module:
    # Not rotary: the normed queries and keys go straight into the scores, and no site names them.
    return Transformer(
        TransformerConfig(
            vocab_size=VOCAB,
            n_layers=2,
            d_model=32,
            n_heads=4,
            d_mlp=40,
            n_ctx=64,
            norm="rmsnorm",
            activation="relu",
            qk_norm=True,
            tied=True,
        )
    )


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=24,
            image_size=IMAGE[1:],
            patch_size=PATCH,
            num_channels=IMAGE[0],
            num_labels=CLASSES,
            attn_implementation="sdpa",
        )
    )


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "neox": partial(_neox, parallel=True),
    "neox_sequential": partial(_neox, parallel=False),
    "small_ln_learned": _small_ln_learned,
    "small_rms_rotary_gqa": _small_rms_rotary_gqa,
    "small_attn_only": _small_attn_only,
    "small_qk_norm": _small_qk_norm,
}
FAMILIES = list(BUILDERS)
IMAGE_BUILDERS: dict[str, Callable[[], nn.Module]] = {"vit": _vit}
"""What takes images in place of tokens, for tests of its own."""


def make(family: str, seed: int = 0, dtype: torch.dtype = torch.float64, widen: bool = True) -> nn.Module:
    """Return a tiny model of `family` in eval mode, with random weights.

    Args:
        family: one of `FAMILIES`, or of `IMAGE_BUILDERS`.
        seed: of the weights; the same in every dtype, up to rounding.
        dtype: of the weights.
        widen: make the RMSNorms and the eager attention of transformers compute in the model's own dtype where that is
            wider than float32. By themselves they round to float32, and two ways of computing one number in float64
            then differ by 1e-7 wherever they round to different neighbours; the largest number of float64, which
            eager attention's masks are made of, becomes an infinity, and a row without a key NaN.
    """
    with torch.random.fork_rng(devices=[]):  # constructors initialise their weights: leave the caller's generator alone
        model = (BUILDERS | IMAGE_BUILDERS)[family]()
    return prepare(model, seed, dtype, widen)


def fresh(family: str) -> Model:
    """A model of the test's own, wrapped, to put hooks on or to train."""
    return wrap(make(family))


@cache
def wrapped(family: str) -> Model:
    """A wrapped model that several tests share, and none of them changes."""
    return fresh(family)


def prepare(model: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float64, widen: bool = True) -> nn.Module:
    """Give any model random weights, in place, as `make` does; arguments as there."""
    randomize(model, seed)
    model = model.to(dtype).eval()
    if widen:
        widen_norms(model)
        if getattr(getattr(model, "config", None), "_attn_implementation", None) == "eager":
            widen_attention(model)
    return model


def randomize(model: nn.Module, seed: int) -> None:
    """Draw every parameter large enough that attention is peaked, norms matter, and no effect is near zero."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for parameter in model.parameters():
            draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if id(parameter) not in embeddings:
                draw = 0.3 * draw
            norms = parameter.ndim == 1 and bool((parameter == 1).all())
            parameter.copy_(draw + 1.0 if norms else draw)


def random_inputs(vocab: int, lengths: Sequence[int], padding: str = "right", seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return random token ids [B,T] (padding is 0, real tokens are not) and a bool mask [B,T], True at real tokens.

    Args:
        vocab: number of tokens V.
        lengths: real tokens of each row; T is the largest.
        padding: the side, "right" or "left".
        seed: of the tokens. A row's tokens do not depend on the padding.
    """
    if padding not in ("right", "left"):
        raise ValueError(f"padding is 'right' or 'left', not {padding!r}")
    generator = torch.Generator().manual_seed(seed)
    T = max(lengths)
    ids, mask = torch.zeros(len(lengths), T, dtype=torch.long), torch.zeros(len(lengths), T, dtype=torch.bool)
    for row, length in enumerate(lengths):
        real = slice(0, length) if padding == "right" else slice(T - length, T)
        ids[row, real] = torch.randint(1, vocab, (length,), generator=generator)
        mask[row, real] = True
    return ids, mask


def random_images(rows: int, seed: int = 0) -> Tensor:
    """Return random pixels [B, *IMAGE] in float64."""
    return torch.randn(rows, *IMAGE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
