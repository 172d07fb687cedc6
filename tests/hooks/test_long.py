"""Edges that are forbidden in long texts: a few queries at a time, the same numbers and the same audit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import interp as ip
from hooks.backends import tiles
from tests import zoo


@contextmanager
def in_tiles(patch: pytest.MonkeyPatch, size: int = 97) -> Iterator[list[int]]:
    """Within it, every text is long, and tiles hold few scores."""
    calls: list[int] = []
    own = tiles.attend_in_tiles

    def counted(*args: Any) -> Any:
        calls.append(1)
        return own(*args)

    with patch.context() as now:
        now.setattr(tiles, "LONG", 0)
        now.setattr(tiles, "TILE", size)
        now.setattr(tiles, "attend_in_tiles", counted)
        yield calls


def plans(layers: int) -> list[Any]:
    first, last = 0, layers - 1
    return [
        ip.knockout(ip.site("scores", first, head=1, key_pos=0)).at(pos=slice(1, None)),
        ip.knockout(ip.site("scores", last, pos=2)),  # it may attend to nothing
        ip.knockout(ip.site("scores", first, key_pos=(1, 2), pos=-1))
        + ip.knockout(ip.site("scores", first, head=(0, 2), key_pos=slice(0, 2), pos=slice(3, None)))
        + ip.scale(ip.site("v", last, pos=-1), 2.0),
        ip.knockout(ip.site("scores", first, pos=0, key_pos=3)),  # it cannot see that key anyway
    ]


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "neox", "qwen3"])
def test_tiles_give_what_the_pattern_gives(family: str, padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.wrapped(family)
    lengths = [8, 8] if padding == "none" else [8, 6]
    given = model.inputs(*zoo.random_inputs(zoo.VOCAB, lengths, padding="left" if padding == "left" else "right"))
    base = model.run(given).logits
    for number, plan in enumerate(plans(model.n_layers)):
        want = model.run(given, plan)
        with in_tiles(monkeypatch) as calls:
            got = model.run(given, plan)
        assert calls
        real = given.mask
        assert bool(((got.logits - want.logits)[real].abs() <= 1e-10).all()), (number, padding)
        assert [e.status for e in got.audit] == [e.status for e in want.audit]
        assert (number == 3) == bool(((want.logits - base)[real].abs() <= 1e-9).all())
        assert (
            {entry.status for entry in got.audit} == {"inert"}
            if number == 3
            else {"fired"} <= {entry.status for entry in got.audit}
        )


def test_what_is_looked_at_has_a_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.wrapped("llama")
    given = model.inputs(*zoo.random_inputs(zoo.VOCAB, [8, 8]))
    plan = ip.knockout(ip.site("scores", 0, key_pos=0, pos=slice(1, None)))
    keep = [ip.site("pattern", 0)]
    want = model.run(given, plan, capture=keep)
    with in_tiles(monkeypatch) as calls:
        got = model.run(given, plan, capture=keep)
        assert not calls
        both = model.run(given, plan + ip.scale(ip.site("scores", 0), 2.0))
        assert not calls
    assert torch.equal(got.tape[keep[0]], want.tape[keep[0]])
    assert float((both.logits - want.logits).abs().max()) > 1e-3


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_generation_and_gradients(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.wrapped(family)
    ids, _ = zoo.random_inputs(zoo.VOCAB, [6, 6])
    plan = ip.knockout(ip.site("scores", 0, head=0, key_pos=1)).at(pos="new") + ip.knockout(
        ip.site("scores", 1, key_pos=0)
    ).at(pos=slice(1, None))
    module: Any = model.module
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"return_dict_in_generate": True, "output_logits": True}

    def run() -> tuple[Any, Any]:
        with model.apply(plan):
            out = module.generate(ids, **options)
        place = ip.site("resid_pre", 0)
        graph = model.run(model.inputs(ids), ip.Plan((plan[1],)), capture=place, grad=True)
        return torch.stack(out.logits), graph.gradient(graph.logits[:, -1, 3])[0]

    want = run()
    with in_tiles(monkeypatch) as calls:
        got = run()
    assert len(calls) > 4
    for one, two in zip(want, got, strict=True):
        assert float(one.abs().max()) > 1e-3
        assert bool(((one - two).abs() <= 1e-5).all())


def test_worlds_of_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.wrapped("llama")
    given = model.inputs(*zoo.random_inputs(zoo.VOCAB, [8, 6]))
    worlds = [ip.World(given, ip.Plan((plan,))) for plan in plans(3)[:2]]
    logits = [[o.values[0] for o in ip.run_worlds(model, worlds, "logits", executor="batched")]]
    with in_tiles(monkeypatch) as calls:
        logits.append([o.values[0] for o in ip.run_worlds(model, worlds, "logits", executor="batched")])
    assert calls
    for one, two in zip(*logits, strict=True):
        assert bool(((one - two)[given.mask].abs() <= 1e-10).all())


def test_whether_a_ban_met_an_edge_follows_from_counts() -> None:
    """What a GPU is asked without tiles is what the tiles find."""
    generator = torch.Generator().manual_seed(0)
    for trial in range(60):
        T, S = 5, 8
        mask = None if trial % 3 else torch.rand(2, S, generator=generator) > 0.4
        edges = tiles.Edges(mask, trial % 2 == 0, 3 if trial % 4 == 0 else None, S - T, (2, 2, T, S))
        flags = [torch.rand(2, n, generator=generator) > 0.8 for n in (T, S)]
        heads = torch.tensor([trial % 5 > 0, False])
        ban = tiles.Ban(0, 0, slice(0, 2), flags[0], flags[1], heads)
        q, kv = torch.randn(2, 2, T, 4), torch.randn(2, 2, S, 4)
        _, met = tiles.attend_in_tiles(q, kv, kv, edges, [ban], 0.5)
        assert bool(tiles._met(edges, ban, q)) == bool(met[0, 0]), trial


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_flex_attention_gives_what_the_tiles_give(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ip.wrap(zoo.make("llama", dtype=torch.float32, widen=False).cuda())
    ids, _ = zoo.random_inputs(zoo.VOCAB, [48, 48])
    given = model.inputs(ids)
    for plan in plans(3):
        want = model.run(given, plan)
        with in_tiles(monkeypatch) as calls:
            got = model.run(given, plan)
        assert calls
        assert bool(((got.logits - want.logits).abs() <= 1e-4).all())
        assert [e.status for e in got.audit] == [e.status for e in want.audit]
