"""The suite that a description is held to: it passes where the description is true, and says what is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import interp as ip
from experiments.families.models import FAMILIES
from experiments.families.run import markdown, tried
from hooks.certificate import compare
from hooks.models import adapter_of, describe, gpt_oss, llama
from hooks.models.architecture import Architecture
from hooks.models.blocks import Attention, Block, Mlp
from hooks.models.experts import Experts, softmax_first

SHORT = ["Granite", "BERT"]
full = pytest.mark.full


@pytest.mark.parametrize("name", [*SHORT, *(pytest.param(name, marks=full) for name in FAMILIES if name not in SHORT)])
def test_every_family_conforms(name):
    row = tried(FAMILIES[name], name)
    assert row["passed"], row["failed"]
    assert row["checks"] > 40
    assert markdown([row]).count("\n") >= 2 and name in markdown([row])


def test_a_report_prints_and_requires():
    wrong = lambda m: changed(describe(m), around=lambda s: replace(s, scale=0.5))  # noqa: E731
    model = ip.wrap(FAMILIES["Granite"].make(), adapter=wrong)
    report = ip.conformance(model)
    assert not report and not report.passed and "DOES NOT CONFORM" in str(report)
    assert {c.name for c in report.checks if c.passed is False} >= {"stream of layer 0", "stream of layer 1"}
    with pytest.raises(ip.InterpError, match="the description of granite is not true of the model"):
        report.require()


# Descriptions that are wrong


def changed(
    arch: Architecture,
    around: Callable[[Any], Any] = lambda s: s,
    attention: Callable[[Attention], Attention] = lambda a: a,
    feed: Callable[[Any], Any] = lambda f: f,
) -> Architecture:
    def block(one: Block) -> Block:
        sublayers = tuple(
            around(replace(s, fn=attention(s.fn) if isinstance(s.fn, Attention) else feed(s.fn))) for s in one.sublayers
        )
        return replace(one, sublayers=sublayers)

    return replace(arch, blocks=tuple(map(block, arch.blocks)))


def swapped_angles(arch: Architecture) -> Architecture:
    one, two = (arch.blocks[at].attention.rotary for at in (0, 1))
    return changed(arch, attention=lambda a: replace(a, rotary=two if a.rotary is one else one))


def halves_swapped(mlp: Mlp) -> Mlp:
    return replace(mlp, pre=mlp.up, up=mlp.pre)


def unshared(fn: Any) -> Any:
    return replace(fn, shared=None) if isinstance(fn, Experts) else fn


def other_route(logits: Tensor) -> tuple[Tensor, Tensor]:
    return softmax_first(2, False, False, logits)


WRONG: list[tuple[str, str, Callable[[Architecture], Architecture]]] = [
    ("Granite", "no factor of what is added", lambda a: changed(a, around=lambda s: replace(s, scale=1.0))),
    ("Granite", "no factor of embeddings", lambda a: replace(a, embed_scale=1.0)),
    ("Granite", "no factor of logits", lambda a: replace(a, logit_scale=1.0)),
    ("OLMo 2", "no norms of queries", lambda a: changed(a, attention=lambda x: replace(x, q_norm=None))),
    ("OLMo 2", "no norms after", lambda a: changed(a, around=lambda s: replace(s, post=None))),
    ("GPT-OSS", "no sinks", lambda a: changed(a, attention=lambda x: replace(x, sinks=None))),
    ("GPT-OSS", "angles of a part", lambda a: changed(a, attention=lambda x: replace(x, rotary=replace(
        x.rotary, turn=llama.Rotary(x.rotary.angles).turn)))),
    ("BERT", "no norms after the addition", lambda a: changed(a, around=lambda s: replace(s, post_add=None))),
    ("BERT", "causal", lambda a: changed(a, attention=lambda x: replace(x, causal=True))),
    ("Mixtral", "weights that do not sum to one", lambda a: changed(a, feed=lambda f: replace(f, route=other_route))),
    ("Qwen 2-MoE", "no shared expert", lambda a: changed(a, feed=unshared)),
    ("Gemma 3", "angles of the other layers", swapped_angles),
    ("Phi-3", "the gate taken for the other half", lambda a: changed(a, feed=halves_swapped)),
    ("GPT-J", "halves turned, not pairs", lambda a: changed(a, attention=lambda x: replace(x, rotary=replace(
        x.rotary, turn=gpt_oss.rotate_by_halves)))),
    ("GPT-J", "one after the other", lambda a: replace(a, blocks=tuple(replace(b, parallel=False) for b in a.blocks))),
    ("OPT", "positions from the table's start", lambda a: replace(a, at_positions=lambda p: nn.functional.embedding(
        p, a.pos_embed.weight))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "what", "change"), WRONG, ids=[f"{name}: {what}" for name, what, _ in WRONG])
def test_the_certificate_catches(name, what, change):
    module = FAMILIES[name].make(torch.float64)
    right, wrong = (ip.wrap(module, adapter=each) for each in (describe, lambda m: change(describe(m))))
    row = right.inputs([[3, 9, 27, 31, 44, 12, 8]])
    assert compare(right, row) == ""
    assert compare(wrong, row) != ""


ADAPTERS = sorted({f"hooks.models.{name}" for name in ("bert", "bloom", "falcon", "gemma", "gpt2", "gpt_oss", "gptj",
                                                       "llama", "neox", "opt")})  # fmt: skip
PAIRS = ["Gemma 2", "GPT-OSS", "OPT", "Falcon", "GPT-J"]


@pytest.mark.parametrize("name", [*PAIRS, *(pytest.param(name, marks=full) for name in FAMILIES if name not in PAIRS)])
def test_a_family_described_by_the_adapter_of_another(name):
    """It does not describe the model, or it is not believed, or it says what is true all the same."""
    from importlib import import_module

    module = FAMILIES[name].make(torch.float64 if name != "BLOOM" else torch.float32)
    own = adapter_of(module)
    refused = 0
    for path in ADAPTERS:
        adapter = import_module(path).describe
        if adapter is own:
            continue
        try:
            model = ip.wrap(module, adapter=adapter)
        except Exception:  # parts that are not there
            refused += 1
            continue
        x = model.inputs([[3, 9, 27, 31, 44, 12, 8]])
        if compare(model, x) or model.architecture.unshared:
            refused += 1
            continue
        edit = ip.World(x, ip.Plan((ip.zero(ip.site("resid_post", 1, pos=2)),)))
        one, two = (next(iter(ip.run_worlds(model, [edit], [ip.site("logits")], executor=executor))).values[0]
                    for executor in ("sequential", "shared"))  # fmt: skip
        torch.testing.assert_close(one, two, rtol=0.0, atol=1e-4)
    assert refused >= len(ADAPTERS) - 3


# A module of one's own, and what takes no mask


class Bare(nn.Module):
    """One layer of attention alone, of one head, that adds its input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        scores = (self.q(x) @ self.k(x).mT) / 8**0.5
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return self.head(x + self.o(scores.masked_fill(later, -torch.inf).softmax(-1) @ self.v(x)))


def bare(module: Bare) -> Architecture:
    of = ip.adapters
    q, k, v = (of.Projection(part, 1, 8) for part in (module.q, module.k, module.v))
    attention = of.Attention(module.o, q, k, v, module.o, 8**-0.5, opaque="its scores are in no function of their own")
    block = of.Block(nn.Identity(), (of.Sublayer(nn.Identity(), attention),))
    return of.Architecture(
        "bare", module.embed, None, (block,), nn.Identity(), module.head, 8, 20, of.swap_method("no")
    )


def test_parts_that_are_never_called_are_found():
    """A description whose parts are not the model's: its sites never fire, and the suite says so."""
    report = ip.conformance(ip.wrap(Bare().eval(), adapter=bare))
    failed = [check.name for check in report.checks if check.passed is False]
    assert "resid_pre.0" in failed and "ln_final" in failed and "q.0" not in failed


def test_padding_that_a_model_is_not_told_of():
    model = ip.wrap(Bare().eval(), adapter=bare)
    model.run(model.inputs([[1, 2, 3], [4, 5]]))
    with pytest.raises(ip.InputsError, match="takes no attention_mask"):
        model.run(model.inputs([[1, 2, 3], [4, 5]], padding="left"))
