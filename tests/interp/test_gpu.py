"""Methods on a GPU: results are the CPU's."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import interp as ip
from tests import zoo
from tests.devices import TOLERANCE, device, model_on, near

__all__ = ["device"]
CPU = torch.device("cpu")
METRIC = ip.logit_diff(7, 9)


def pair(model: ip.Model, lengths=(5, 4)) -> tuple[ip.Inputs, ip.Inputs]:
    clean, corrupt = (model.inputs(*zoo.random_inputs(zoo.VOCAB, lengths, "left", seed)) for seed in (1, 2))
    return clean, corrupt


def same(found: ip.Result, expected: ip.Result, tolerance: float = TOLERANCE[torch.float64]) -> None:
    for name in ("effect", "base", "source", "status"):
        one, two = getattr(found, name), getattr(expected, name)
        assert (one is None) == (two is None), name
        if one is not None:
            near(torch.as_tensor(np.asarray(one)), torch.as_tensor(np.asarray(two)), tolerance)
    assert np.nanmax(np.abs(expected.effect)) > 1e-3


@pytest.mark.parametrize("executor", ["shared", "batched"])
def test_a_sweep(device, executor, tmp_path):
    here, there = (model_on(where, "llama") for where in (CPU, device))
    grids = [
        (ip.grid("resid_pre", layer="all", pos=[0, -1]), {}),
        (ip.grid("pattern", layer=[1], head="all"), {}),
        (ip.grid("scores", layer="all", key_pos=[0, 1]), {"intervention": ip.knockout, "direction": "denoising"}),
    ]
    for number, (grid, options) in enumerate(grids):
        done = []
        for model in (here, there):
            done.append(ip.sweep(model, *pair(model), grid, metric=METRIC, executor=executor, **options))
        assert done[1].config["executor"] == executor
        same(done[1], done[0])
        done[1].save(tmp_path / str(number))
        same(ip.Result.load(tmp_path / str(number)), done[0], 0.0 if device.type == "cpu" else 1e-9)


def test_metrics(device):
    here, there = (model_on(where, "gpt2") for where in (CPU, device))
    grid = ip.grid("z", layer="all")
    metrics = [METRIC, ip.log_prob([[7, 8], [3, 4]]), ip.prob([[7], [8]]), ip.kl(), ip.cross_entropy()]
    same(*(ip.sweep(m, *pair(m), grid, metric=metrics, executor="shared") for m in (there, here)))
    for measured in (METRIC, ip.cross_entropy()):
        near(*(ip.evaluate(model, pair(model)[0], measured) for model in (there, here)))


def test_estimates(device):
    here, there = (model_on(where, "gpt2") for where in (CPU, device))
    grid = ip.grid("z", layer="all", head="all")
    same(*(ip.attribution(model, *pair(model), grid, metric=METRIC) for model in (there, here)))


def test_read_outs(device):
    here, there = (model_on(where, "llama") for where in (CPU, device))
    lenses = [ip.logit_lens(model, pair(model)[0]) for model in (there, here)]
    near(lenses[0].logits, lenses[1].logits)
    assert lenses[0].logits.device.type == "cpu"
    same(*(ip.logit_lens(model, pair(model)[0], METRIC) for model in (there, here)))
    same(*(ip.direct_logit_attribution(model, pair(model)[0], 7, 9) for model in (there, here)))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_edges_and_scores(device, family):
    here, there = (model_on(where, family) for where in (CPU, device))
    readers = [reader.name for reader in ip.paths.Graph.of(here).readers][-6::2]
    both = [ip.paths.edge_sweep(model, *pair(model, (4, 4)), metric=METRIC, readers=readers) for model in (there, here)]
    same(*both)
    for method, options in (("eap", {}), ("eap-ig", {"steps": 2})):
        same(
            *(ip.paths.edge_scores(m, *pair(m, (4, 4)), metric=METRIC, method=method, **options) for m in (there, here))
        )


def test_circuits(device):
    here, there = (model_on(where, "gpt2") for where in (CPU, device))
    curves = []
    for model in (there, here):
        clean, corrupt = pair(model, (4, 4))
        known = ip.paths.Pair.of(model, clean, corrupt)
        scores = ip.paths.edge_scores(known, metric=METRIC, method="eap")
        curves.append(ip.paths.faithfulness(known, scores, ip.paths.Graph.of(model), metric=METRIC, sizes=[0.2, 0.5]))
    near(torch.tensor(curves[0].faithfulness), torch.tensor(curves[1].faithfulness))
    assert abs(curves[1].faithfulness[0]) > 1e-6


def test_probes_and_clamps_in_a_training_loop(device):
    """What a probe measures in the middle, and the weights that training under a clamp ends with."""
    start, seen, weights = zoo.make("llama"), [], []
    ids = zoo.random_inputs(zoo.VOCAB, [8, 8], "right", 3)[0]
    for where in (CPU, device):
        model = model_on(where, "llama")
        fixed = model.inputs(torch.cat([ids[:, :4], ids[:, :4]], 1))
        scores: list[torch.Tensor] = []

        def probe(model: ip.Model, fixed: ip.Inputs = fixed, scores: list[torch.Tensor] = scores) -> float:
            scores.append(torch.as_tensor(ip.training.prefix_matching(model, fixed)).cpu())
            return 0.0

        model.module.train()
        optimizer = torch.optim.SGD(model.module.parameters(), 1e-2)
        clamp = ip.training.Clamp(ip.training.previous_token(0, head=0), strength=0.5)
        monitor = ip.training.Monitor(model, [ip.training.Probe(probe, every=2, name="probe"), clamp])
        for _ in range(3):
            with monitor.step() as step:
                logits = model.module(input_ids=ids.to(where)).logits
                chances = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None].to(where))
                optimizer.zero_grad()
                loss = -chances.mean()
                loss.backward()
                optimizer.step()
                step.loss(loss)
        monitor.finish()
        seen.append(torch.stack(scores))
        weights.append(torch.cat([p.detach().flatten().cpu() for p in model.module.parameters()]))
    near(seen[1], seen[0])
    near(weights[1], weights[0])
    before = torch.cat([p.detach().flatten() for p in copy.deepcopy(start).parameters()])
    assert float((weights[0] - before).abs().max()) > 1e-4 and float(seen[0].std()) > 1e-4
