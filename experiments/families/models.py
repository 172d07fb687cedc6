"""Tiny models with random weights, one or two of each family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

VOCAB = 50
_SPECIAL: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_PLAIN: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3,
                          "num_attention_heads": 4, "max_position_embeddings": 64, **_SPECIAL}  # fmt: skip
_GROUPED = {**_PLAIN, "num_key_value_heads": 2}
_GPT = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "n_inner": 40, **_SPECIAL}
_EXPERTS = {"num_experts_per_tok": 2, "experts_implementation": "eager"}
_MULTIPLIERS = {"embedding_multiplier": 2.0, "residual_multiplier": 0.4, "attention_multiplier": 0.3,
                "logits_scaling": 3.0}  # fmt: skip
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
_FALCON = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "bias": True,
           **_SPECIAL}  # fmt: skip
_OPT = {"vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
        "max_position_embeddings": 64, "word_embed_proj_dim": 32, "dropout": 0.0, **_SPECIAL}  # fmt: skip
_SIDES = {"projection_dim": 24, "image_size": 16, "patch_size": 4}
_VISION = {**{key: value for key, value in _PLAIN.items() if key not in ("vocab_size", *_SPECIAL)}, **_SIDES}
_TEXT = {**{key: value for key, value in _PLAIN.items() if key not in _SPECIAL}, "projection_dim": 24,
         "projection_size": 24, "bos_token_id": 48, "eos_token_id": 49, "pad_token_id": 0}  # fmt: skip
_T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 3, "num_heads": 4,
       "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 49, "relative_attention_num_buckets": 8,
       "relative_attention_max_distance": 12}  # fmt: skip
_BERT = {key: value for key, value in _PLAIN.items() if key not in _SPECIAL}


@dataclass(frozen=True)
class Family:
    """A family of models of transformers.

    Attributes:
        stem: what its classes' names begin with; `head` and `config`: what they end with.
        options: of the config.
        by: how its parts are known: by a file of the engine's, or found out by running it.
    """

    stem: str
    options: Mapping[str, Any]
    head: str = "ForCausalLM"
    config: str = ""
    by: str = "adapter"
    more: Mapping[str, Any] = field(default_factory=dict)

    def make(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """A model in eval mode, whose weights are large enough that no effect is near zero."""
        import transformers

        kind = getattr(transformers, self.config or f"{self.stem}Config")
        with torch.random.fork_rng(devices=[]):
            model = getattr(transformers, self.stem + self.head)(kind(**self.options, **self.more))
        generator = torch.Generator().manual_seed(seed)
        tables = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
        with torch.no_grad():
            for parameter in model.parameters():
                draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                draw = draw if id(parameter) in tables else 0.3 * draw
                norms = parameter.ndim == 1 and bool((parameter == 1).all())
                parameter.copy_(draw + 1.0 if norms else draw)
        return model.to(dtype).eval()


FAMILIES: dict[str, Family] = {
    "GPT-2": Family("GPT2", _GPT, "LMHeadModel"),
    "GPT-NeoX": Family("GPTNeoX", _PLAIN),
    "GPT-J": Family("GPTJ", {**_GPT, "rotary_dim": 4}),
    "OPT": Family("OPT", _OPT),
    "OPT, norms after": Family("OPT", {**_OPT, "do_layer_norm_before": False}),
    "Falcon": Family("Falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "Falcon, ALiBi": Family(
        "Falcon", {**_FALCON, "multi_query": False, "parallel_attn": False, "alibi": True}
    ),
    "BLOOM": Family("Bloom", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 3, "n_head": 4, **_SPECIAL}),
    "Llama": Family("Llama", _GROUPED),
    "Mistral": Family("Mistral", {**_GROUPED, "sliding_window": 4}),
    "Qwen 2": Family("Qwen2", _GROUPED),
    "Qwen 3": Family("Qwen3", {**_GROUPED, "head_dim": 8}),
    "Gemma 1": Family("Gemma", {**_GROUPED, "head_dim": 8}),
    "Gemma 2": Family("Gemma2", {**_GROUPED, "head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 3.0,
                                 "final_logit_softcapping": 4.0, "attn_implementation": "eager"}),
    "Gemma 3": Family("Gemma3", {**_GROUPED, "head_dim": 8, "sliding_window": 4, "layer_types": _SLIDING,
                                 "query_pre_attn_scalar": 5}, config="Gemma3TextConfig"),
    "Phi-3": Family("Phi3", {**_GROUPED, "sliding_window": 4}),
    "OLMo 2": Family("Olmo2", _GROUPED),
    "OLMo 3": Family("Olmo3", {**_GROUPED, "sliding_window": 4}),
    "Granite": Family("Granite", {**_GROUPED, **_MULTIPLIERS}),
    "Granite-MoE": Family("GraniteMoe", {**_GROUPED, **_MULTIPLIERS, **_EXPERTS, "num_local_experts": 4}),
    "Mixtral": Family("Mixtral", {**_GROUPED, **_EXPERTS, "num_local_experts": 4, "sliding_window": 4}),
    "Qwen 2-MoE": Family("Qwen2Moe", {**_GROUPED, **_EXPERTS, "num_experts": 4, "moe_intermediate_size": 24,
                                      "shared_expert_intermediate_size": 20, "mlp_only_layers": [1]}),
    "Qwen 3-MoE": Family("Qwen3Moe", {**_GROUPED, **_EXPERTS, "num_experts": 4, "moe_intermediate_size": 24,
                                      "head_dim": 8}),
    "OLMoE": Family("Olmoe", {**_GROUPED, **_EXPERTS, "num_experts": 4}),
    "GPT-OSS": Family("GptOss", {**_GROUPED, **_EXPERTS, "num_local_experts": 4, "head_dim": 8, "sliding_window": 4,
                                 "layer_types": _SLIDING}),
    "BERT": Family("Bert", _BERT, "ForMaskedLM"),
    "BERT, tokens": Family("Bert", {**_BERT, "num_labels": 5}, "ForTokenClassification"),
    "T5": Family("T5", _T5, "ForConditionalGeneration"),
    "T5, gated": Family("T5", {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
                               "num_decoder_layers": 3}, "ForConditionalGeneration"),
    "T5, encoder": Family("T5", _T5, "EncoderModel"),
    "BERT, no head": Family("Bert", _BERT, "Model"),
    "Llama, no head": Family("Llama", _GROUPED, "Model"),
    "GPT-2, no head": Family("GPT2", _GPT, "Model"),
    "CLIP, images": Family("CLIP", _VISION, "VisionModel", "CLIPVisionConfig"),
    "CLIP, texts": Family("CLIP", _TEXT, "TextModelWithProjection", "CLIPTextConfig"),
    "SigLIP, images": Family("Siglip", _VISION, "VisionModel", "SiglipVisionConfig"),
    "SigLIP, texts": Family("Siglip", _TEXT, "TextModel", "SiglipTextConfig"),
    "Llama, sequences": Family(
        "Llama", {**_GROUPED, "num_labels": 3, "pad_token_id": 0}, "ForSequenceClassification"
    ),
    "StableLM": Family("StableLm", _GROUPED, by="structure"),
    "StarCoder 2": Family("Starcoder2", {**_GROUPED, "sliding_window": 4}, by="structure"),
    "Cohere": Family("Cohere", {**_GROUPED, "use_qk_norm": True, "logit_scale": 0.3}, by="structure"),
    "Cohere 2": Family("Cohere2", {**_GROUPED, "sliding_window": 4}, by="structure"),
    "SmolLM 3": Family("SmolLM3", {**_GROUPED, "no_rope_layers": [1, 0, 1]}, by="structure"),
    "Phi": Family("Phi", _PLAIN, by="structure"),
    "OLMo": Family("Olmo", _GROUPED, by="structure"),
    "GLM 4": Family("Glm4", {**_GROUPED, "head_dim": 8}, by="structure"),
    "Nemotron": Family("Nemotron", _GROUPED, by="structure"),
    "RoBERTa": Family("Roberta", {**_BERT, "pad_token_id": 1, "type_vocab_size": 1}, "ForMaskedLM", by="structure"),
}  # fmt: skip
"""The families, by the names that people call them."""
