"""Norms whose scale is held, and what heads add, against the modules themselves."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import interp as ip
from hooks.errors import ModelError
from interp.parts import bias_output, frozen_norm, head_outputs, post_norm
from tests import zoo

M = 16
CLOSE = {"rtol": 0, "atol": 1e-12}


class WideRMSNorm(LlamaRMSNorm):
    """The norm of transformers without its detour through float32."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class WideGemmaRMSNorm(Gemma2RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x) * (1 + self.weight)


def random(norm: nn.Module) -> nn.Module:
    draw = torch.Generator().manual_seed(0)
    for parameter in norm.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
    return norm.double()


NORMS = {
    "layernorm": lambda: nn.LayerNorm(M),
    "layernorm without a bias": lambda: nn.LayerNorm(M, bias=False),
    "layernorm without weights": lambda: nn.LayerNorm(M, elementwise_affine=False),
    "rmsnorm": lambda: nn.RMSNorm(M, eps=1e-2),
    "rmsnorm without an eps": lambda: nn.RMSNorm(M),
    "rmsnorm without weights": lambda: nn.RMSNorm(M, eps=1e-2, elementwise_affine=False),
    "rmsnorm without either": lambda: nn.RMSNorm(M, elementwise_affine=False),
    "llama": lambda: WideRMSNorm(M, eps=1e-2),
    "gemma, 1 + weight": lambda: WideGemmaRMSNorm(M, eps=1e-2),
    "none": nn.Identity,
}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_whose_scale_is_held_is_its_linear_part(name):
    """At x it is the norm less its bias; of a small change, the norm's own change but for that of the scale."""
    norm = random(NORMS[name]())
    draw = torch.Generator().manual_seed(1)
    x, d = (0.1 * torch.randn(3, 5, M, generator=draw, dtype=torch.float64) for _ in range(2))
    frozen = frozen_norm(norm, x)
    bias = getattr(norm, "bias", None)
    whole = norm(x) if bias is None else norm(x) - bias
    torch.testing.assert_close(frozen(x), whole.detach(), **CLOSE)
    torch.testing.assert_close(frozen(x + 2 * d), frozen(x) + 2 * frozen(d), **CLOSE)
    # Orthogonal to the (centred) input, a change leaves the scale alone to first order.
    middle = x - x.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else x
    across = d - middle * (d * middle).sum(-1, keepdim=True) / middle.square().sum(-1, keepdim=True)
    slope = (norm(x + 1e-6 * across) - norm(x - 1e-6 * across)) / 2e-6
    torch.testing.assert_close(frozen(across), slope.detach(), rtol=0, atol=1e-7)
    assert not frozen(d).requires_grad and float(frozen(d).abs().max()) > 1e-2


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm, nn.RMSNorm, nn.LayerNorm])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_norms_of_every_precision(kind, dtype):
    """Those of transformers compute in float32; numbers whose squares overflow half precision are no matter."""
    norm = random(kind(M)).to(dtype)
    x = 300 * torch.randn(4, M, generator=torch.Generator().manual_seed(2)).to(dtype)
    frozen, whole = frozen_norm(norm, x)(x), norm(x).detach()
    whole = whole - norm.bias.detach() if kind is nn.LayerNorm else whole
    assert frozen.dtype == dtype
    torch.testing.assert_close(frozen, whole, rtol=0, atol=max(1e-6, 16 * torch.finfo(dtype).eps))


class OtherRMSNorm(LlamaRMSNorm):
    """Half of the entries only."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[..., : M // 2], super().forward(x)[..., M // 2 :]], -1)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(M), nn.GroupNorm(2, M), nn.Linear(M, M), OtherRMSNorm(M)])
def test_other_norms_are_refused_by_name(norm):
    with pytest.raises(ModelError, match=type(norm).__name__):
        frozen_norm(norm, torch.randn(2, M))


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.LayerNorm(32, elementwise_affine=False),
        lambda: nn.LayerNorm(32, bias=False),
        lambda: nn.RMSNorm(32),
        lambda: nn.RMSNorm(32, elementwise_affine=False),
    ],
)
def test_logits_are_split_through_any_final_norm(norm):
    module = copy.deepcopy(zoo.make("gpt2"))
    width = module.config.n_embd
    made = norm()
    made.normalized_shape = (width,)
    for name, _ in list(made.named_parameters()):
        setattr(made, name, nn.Parameter(torch.linspace(0.5, 2, width, dtype=torch.float64)))
    module.transformer.ln_f = made
    model = ip.wrap(module.double().eval())
    inputs = model.inputs([[1, 2, 3, 4], [5, 6, 7]])
    parts = ip.direct_logit_attribution(model, inputs, 7, 9)
    np.testing.assert_allclose(parts.effect.sum(0), ip.evaluate(model, inputs, ip.logit_diff(7, 9)), rtol=0, atol=1e-9)
    assert np.abs(parts.effect).max() > 1e-2


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "neox"])
def test_heads_and_biases_add_up_to_attention(family):
    model = ip.wrap(zoo.make(family))
    inputs = model.inputs([[1, 2, 3, 4]])
    tape = model.run(inputs, capture=[ip.site("z", layer=1), ip.site("attn_out", layer=1)]).tape
    block, z = model.architecture.blocks[1], tape["blocks.1.attn.hook_z"]
    with torch.no_grad():
        post = post_norm(block, z)
        heads, bias = head_outputs(block, z, post), bias_output(block, z, post)
        torch.testing.assert_close(head_outputs(block, z), heads)
    whole = heads.sum(-2) if bias is None else heads.sum(-2) + bias
    torch.testing.assert_close(whole, tape["blocks.1.hook_attn_out"], **CLOSE)
    assert (bias is None) == (family == "gemma2") and float(heads.abs().max()) > 1e-3
