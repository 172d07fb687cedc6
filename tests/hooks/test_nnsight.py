"""A plan on an nnsight model does what it does on the model of the same weights that we run ourselves."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

import interp as ip
from tests import zoo
from tests.hooks import bridged
from tests.hooks.bridged import close

FAMILIES = ["gpt2", "llama", "neox", "gemma2"]
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(find_spec("nnsight") is None, reason="nnsight is not installed"),
]


backward = pytest.fixture(autouse=True, scope="module")(bridged.torch_backward)


def inputs(model: ip.Model, padded: bool = False, seed: int = 0) -> ip.Inputs:
    return model.inputs(*zoo.random_inputs(zoo.VOCAB, [7, 5] if padded else [7, 7], seed=seed))


def test_together() -> None:
    """Sites, reads of this world, user's functions, strengths and random draws in one trace."""
    ours, theirs = bridged.native("llama"), bridged.traced("llama")
    given, other = inputs(ours, padded=True), inputs(ours, padded=True, seed=3)
    places = [p for p in bridged.sites(theirs) if p.layer in (None, 1)]
    plan = (
        ip.freeze(ip.site("pattern", 2))
        + ip.noise(ip.site("resid_post", 0), 0.5)
        + ip.patch(
            ip.site("z", 1, head=1), source=ip.World(other, ip.Plan((ip.zero(ip.site("mlp_out", 0)),)))
        ).strength(0.5)
        + ip.intervene(ip.site("mlp_post", 1, pos=-1), lambda x, ctx: x.roll(1, -1))
        + ip.knockout(ip.site("scores", 1, head=0, key_pos=1, pos=slice(2, None)))
    )
    one, two = (model.run(given, plan, capture=places, seed=5) for model in (ours, theirs))
    close(one.logits, two.logits, given.mask, 2e-5)
    assert [entry.status for entry in two.audit] == ["fired"] * 5


def test_held_over_traces_of_the_users() -> None:
    """A held plan binds traces and generation of nnsight's, which see what it edits."""
    ours, theirs = bridged.native("llama"), ip.wrap(bridged.language_model("llama"))
    given, lm = inputs(ours), theirs.tool.envoy
    plan = ip.scale(ip.site("resid_post", 0), 2.0) + ip.knockout(ip.site("scores", 1, key_pos=0)).at(pos=slice(1, None))
    want = ours.run(given, plan, capture="blocks.0.hook_resid_post")
    with theirs.apply(plan), torch.no_grad(), lm.trace(input_ids=given.ids):
        seen = lm.model.layers[1].input.save()
        logits = lm.output.logits.save()
    close(logits, want.logits)
    close(seen, want.tape["blocks.0.hook_resid_post"])
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    steer = ip.scale(ip.site("resid_post", 0, pos="new"), 3.0)
    module: Any = ours.module
    with ours.apply(steer):
        tokens = module.generate(given.ids, **options)
    with theirs.apply(steer) as audit:
        got = lm.generate(given.ids, **options)
    assert torch.equal(got, tokens)
    assert audit[0].positions == 2 * 3


def test_left_as_it_was() -> None:
    model = bridged.traced("gpt2")
    envoy, given = model.tool.envoy, inputs(model)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.module.modules()]
    names = sorted(model.module.state_dict())
    with torch.no_grad():
        before = model.module(given.ids).logits
        for name in ("scores", "z", "resid_mid"):
            model.run(given, ip.scale(ip.site(name, 0), 0.5), capture=ip.site(name, 1))
        assert torch.equal(model.module(given.ids).logits, before)
        with envoy.trace(given.ids):
            logits = envoy.output.logits.save()
    close(logits, before)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.module.modules()] == hooks
    assert sorted(model.module.state_dict()) == names


def test_an_error_within_a_trace_is_told() -> None:
    model = bridged.traced("gpt2")
    given = inputs(model)
    wrong = ip.intervene(ip.site("z", 0), lambda x, ctx: x[..., :1])
    with pytest.raises(Exception, match="the function returned"):
        model.run(given, wrong)
    close(bridged.native("gpt2").run(given).logits, model.run(given).logits)


def test_remote_goes_through_all_but_the_sending() -> None:
    """What is sent is packed, and unpacked with none of our modules in reach, as nnsight's dry run does it."""
    ours = bridged.native("llama")
    theirs = ip.wrap(bridged.language_model("llama"), remote="local")
    given, other = inputs(ours, padded=True), inputs(ours, padded=True, seed=3)
    plan = ip.patch(ip.site("z", 1, head=1), source=ip.World(other)) + ip.knockout(
        ip.site("scores", 1, head=0, key_pos=1, pos=slice(2, None))
    )
    keep = [ip.site(name, 1) for name in ("q_input", "rot_q", "pattern", "result", "resid_mid", "mlp_post")]
    one, two = ours.run(given, plan, capture=keep), theirs.run(given, plan, capture=keep)
    close(one.logits, two.logits, given.mask)
    for place in keep:
        if place.name != "pattern":
            close(one.tape[place], two.tape[place], given.mask)
    with pytest.raises(ip.PlanError, match="runs elsewhere"):
        theirs.run(given, grad=True)
    with pytest.raises(ip.PlanError, match="runs elsewhere"):
        theirs.apply(plan)


def test_remote_calls_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real call, up to the wire."""
    from nnsight.intervention.backends.remote import RemoteBackend, RemoteError

    sent: list[bytes] = []

    def post(_self: Any, request: Any, blob: bytes) -> Any:
        sent.append(blob)
        raise RemoteError(f"nobody listens: {request.model_key}")

    monkeypatch.setattr(RemoteBackend, "request", lambda self, request, t: post(self, request, self._serialize(t)))
    lm = bridged.language_model("gpt2")
    with pytest.raises(ip.ModelError, match="no service knows it by a name"):
        ip.wrap(lm, remote=True)
    lm.repo_id = "owner/model"
    monkeypatch.setattr(type(lm), "_remoteable_model_key", lambda self: self.repo_id)
    model = ip.wrap(lm, remote=True)
    with pytest.raises(RemoteError, match="nobody listens"):
        model.run(inputs(model), ip.zero(ip.site("mlp_out", 0)))
    assert len(sent) == 1 and len(sent[0]) > 1000


def test_a_plain_wrapper_is_not_remote() -> None:
    from nnsight import NNsight

    with pytest.raises(ip.ModelError, match="runs here whatever remote= says"):
        ip.wrap(NNsight(bridged.make("gpt2")), remote=True)
    with pytest.raises(ip.ModelError, match="for a model of nnsight's"):
        ip.wrap(bridged.make("gpt2"), remote=True)
    with pytest.raises(ip.ModelError, match="nnsight"):
        bridged.traced("gpt2").compile()
