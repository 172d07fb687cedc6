"""A plan that is held on a model which the user compiles: right, or refused with the reason, and never inert."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hooks as hk
from hooks import Model, site
from hooks.errors import InterpError
from tests import zoo

PLAN = hk.scale(site("z", 1, head=2), 0.1)
IDS = torch.tensor([[1, 2, 3, 4, 5]])


@pytest.fixture(autouse=True)
def compiler():
    """Compiled code of one test is not that of the next, and the setting is as it was."""
    torch._dynamo.reset()
    yield
    assert torch._dynamo.config.skip_nnmodule_hook_guards
    torch._dynamo.reset()


def logits(out: object) -> Tensor:
    return out if isinstance(out, Tensor) else out.logits  # type: ignore[attr-defined]


class Case:
    """A model, what it gives plainly and under the plan, and a way of compiling it."""

    def __init__(self, family: str, way: str, fullgraph: bool = False) -> None:
        self.model: Model = zoo.fresh(family)
        module, x = self.model.module, self.model.inputs(IDS)
        self.plain, self.edited = self.model.run(x).logits, self.model.run(x, PLAN).logits
        assert float((self.plain - self.edited).abs().max()) > 1e-2
        told = {"backend": "eager", "fullgraph": fullgraph}
        if way == "module":
            self.compiled = torch.compile(module, **told)
        else:
            self.compiled = torch.compile(lambda input_ids: logits(module(input_ids=input_ids)) * 1.0, **told)

    def is_plain(self) -> bool:
        return torch.allclose(logits(self.compiled(input_ids=IDS)), self.plain, rtol=0, atol=1e-10)

    def is_edited(self) -> bool:
        return torch.allclose(logits(self.compiled(input_ids=IDS)), self.edited, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "way"), [("gpt2", "module"), ("small_attn_only", "module"), ("small_attn_only", "function")]
)
def test_compiled_before_and_called_within(family, way):
    case = Case(family, way)
    assert case.is_plain()
    for calls in (1, 2):
        with case.model.apply(PLAN) as audit:
            for _ in range(calls):
                assert case.is_edited()
        assert audit[0].calls == calls and audit[0].change > 0
        assert case.is_plain()


@torch.no_grad()
def test_compiled_within():
    case = Case("small_attn_only", "module")
    with case.model.apply(PLAN):
        assert case.is_edited() and case.is_edited()
    assert case.is_plain()
    with case.model.apply(PLAN):
        assert case.is_edited()
        with case.model.suspended():
            assert case.is_plain()
        assert case.is_edited()


@torch.no_grad()
def test_another_model_of_the_class_that_is_compiled_within():
    """Models of one class share code, and so graphs: that of one without hooks must not serve the other."""
    case = Case("small_attn_only", "module")
    teacher = zoo.make("small_attn_only", seed=3)
    compiled = torch.compile(teacher, backend="eager")
    with case.model.apply(PLAN):
        torch.testing.assert_close(compiled(IDS), teacher(IDS))
        assert case.is_edited()
        torch.testing.assert_close(compiled(IDS), teacher(IDS))
    assert case.is_plain()


def test_a_training_step():
    case = Case("small_attn_only", "function")
    case.compiled(input_ids=IDS)
    with case.model.apply(PLAN):
        loss = case.compiled(input_ids=IDS).square().mean()
    parameters = list(case.model.module.parameters())
    found = torch.autograd.grad(loss, parameters)
    expected = torch.autograd.grad(
        case.model.run(case.model.inputs(IDS), PLAN, grad=True).logits.square().mean(), parameters
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("way", ["module", "function"])
def test_one_graph_is_right_or_refused_with_the_reason(way):
    case, refused = Case("small_attn_only", way, fullgraph=True), ""
    assert case.is_plain()
    try:
        with case.model.apply(PLAN) as audit:
            assert case.is_edited() and audit[0].calls == 1
    except torch._dynamo.exc.Unsupported as error:  # type: ignore[attr-defined]
        refused = str(error)
    assert ("model.compile(plan)" in refused) == (way == "function")
    assert case.is_plain() and not case.model.holds


@torch.no_grad()
def test_a_call_that_fails_leaves_the_compiler_on():
    case = Case("small_attn_only", "module")
    with case.model.apply(PLAN):
        with pytest.raises(IndexError):
            case.compiled(input_ids=IDS + 1000)
        assert case.is_edited()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert case.is_plain()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before


@torch.no_grad()
def test_graphs_of_other_models_stay():
    other = torch.compile(torch.nn.Sequential(torch.nn.Linear(3, 3)), backend="eager")
    x = torch.ones(1, 3)
    other(x)
    case = Case("small_attn_only", "module")
    fast = case.model.compile(PLAN, backend="eager")
    fast(case.model.inputs(IDS))
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with case.model.apply(PLAN):
        other(x)
        case.model.module(IDS)
    fast(case.model.inputs(IDS))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


@torch.no_grad()
def test_a_module_that_was_compiled_in_place():
    model = zoo.fresh("small_attn_only")
    expected = model.run(model.inputs(IDS), PLAN).logits
    with model.apply(PLAN):
        model.module.compile(backend="eager")
        torch.testing.assert_close(model.module(IDS), expected, rtol=0, atol=1e-10)
    for use in (
        lambda: model.run(model.inputs(IDS)),
        lambda: model.apply(PLAN).__enter__(),
        lambda: hk.wrap(model.module),
    ):
        with pytest.raises(InterpError, match="the model was compiled"):
            use()
    with pytest.raises(InterpError, match="was compiled"):
        model.compile(PLAN)
