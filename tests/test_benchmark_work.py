"""The arithmetic of what measuring edges costs, against the graph, the meter of a run, and what was written down."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import interp as ip
from experiments.benchmarks import work
from experiments.benchmarks.setting import SIZES, Setting
from hooks.meter import Meter
from interp import paths

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
SMALL = Setting(layers=3, width=32, heads=4, vocabulary=40)
GPT2 = replace(Setting(), **SIZES["GPT-2 small"])


@pytest.mark.parametrize("setting", [SMALL, replace(SMALL, layers=1, heads=2), replace(SMALL, layers=5)])
def test_edges_are_those_of_the_graph(setting):
    graph = paths.Graph.of(ip.wrap(setting.model()))
    assert work.edges(setting) == len(graph) > 10
    into = [[w for w in graph.writers if w.time < 2 * layer + 1] for layer in range(setting.layers)]
    assert work.projections(setting) == 3 * sum(map(len, into))


def test_the_unit_is_that_of_the_meter():
    """The meter counts multiplications, of which each comes with an addition."""
    meter = Meter(ip.wrap(SMALL.model()).architecture)
    assert work.prompt_operations(SMALL, 7) == 2 * meter.row(7)


@pytest.mark.parametrize("shared", [0, 3, 6])
def test_edges_cost_what_a_run_counts(shared):
    """A run does more: its prompt twice and beside each batch, projections at all tokens, columns of the logits."""
    model, task = ip.wrap(SMALL.model()), SMALL.task("resid_pre", 7, shared)
    clean, corrupt = model.inputs(task.clean), model.inputs(task.corrupt)
    result = paths.edge_sweep(model, clean, corrupt, metric=ip.logit_diff(5, 9))
    counted = result.config["forward_equivalents"] * work.prompt_operations(SMALL, 7)
    found = work.edges_operations(SMALL, 7, shared)
    batches = len({(reader.kind, reader.layer) for reader in paths.Graph.of(model).readers})
    itself = (2 + batches) * work.forward_operations(SMALL, 7)
    everywhere = 2 * SMALL.width**2 * work.projections(SMALL) * shared
    columns = 2 * SMALL.width * 2 * (work.edges(SMALL) + 2 + batches)
    assert found < counted <= found + itself + everywhere + columns
    assert counted > 0.9 * (found + itself + everywhere + columns)


@pytest.mark.parametrize("shared", [0, 8])
def test_the_committed_run_did_little_more(shared):
    record = json.loads((EXPERIMENTS / "benchmarks" / "paths.json").read_text())
    (sweep,) = (s for s in record["sweeps"] if (s["model"], s["shared"]) == ("GPT-2 small", shared))
    found = work.edges_operations(GPT2, sweep["tokens"], shared) / work.prompt_operations(GPT2, sweep["tokens"])
    assert sweep["edges"] == work.edges(GPT2)
    assert 1 < sweep["forward_equivalents"] / found < 1.02


def test_what_is_written_is_what_is_printed(capsys):
    work.main()
    printed = capsys.readouterr().out
    study = (EXPERIMENTS / "path_interventions" / "README.md").read_text()
    for number in ("2,610", "1,303,271"):
        assert number in printed and number in study
    readme = (EXPERIMENTS / "benchmarks" / "README.md").read_text()
    for number in ("6,223", "3,159"):
        assert f"{number} forward passes" in printed and f" {number.replace(',', '')} " in readme
