"""The main job, from prompts to a report: which parts of a model cause its answer, and is that really so?

Three sweeps find the positions, heads and MLPs that carry the difference between clean and corrupt prompts. The heads
found are then taken out of the clean run and put into the corrupt one, against as many heads drawn at random.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hooks import Inputs, InputsError, Model, Plan, Site, World, align, patch
from interp import plots
from interp.evaluation import evaluate
from interp.grids import grid
from interp.metrics import Metric, logit_diff, prob
from interp.report import FEW, Check, Report
from interp.results import Result
from interp.sweeps import sweep
from interp.two_steps import draw as draw_two_steps
from interp.two_steps import two_steps

SHARE = 0.05
"""Heads whose patch moves the answer by less than this share of the whole difference are not reported."""


@dataclass(frozen=True)
class Task:
    """Pairs of prompts that differ in what decides the answer.

    Attributes:
        clean, corrupt: prompts, pair by pair of the same length in tokens.
        answer, foil: the token that clean and corrupt prompts call for, one for all or one for each pair.
        question: what is asked, in a sentence.
        about: what else is to be known of the model.
        lists: whether the model is asked to go on with repeated lists, too; see `interp.two_steps`.
    """

    clean: tuple[str, ...]
    corrupt: tuple[str, ...]
    answer: tuple[str, ...]
    foil: tuple[str, ...]
    question: str = "Which parts of the model cause its answer?"
    about: str = ""
    lists: bool = False


def run_demo(model: Model, task: Task, out: Path | None = None, *, progress: bool | None = None) -> Report:
    """Find the parts that cause a model's answer, confirm them, and draw them.

    Args:
        model: a wrapped model.
        task: the prompts.
        out: folder for the figures, the results and ``report.json``; None writes nothing.
        progress: show bars; by default where the output is a terminal.

    Raises:
        InputsError: prompts that do not align.
    """
    if not task.clean:
        raise InputsError("no pair of prompts is given")
    clean, corrupt = model.inputs(task.clean), model.inputs(task.corrupt)
    align(clean, corrupt)
    metric = logit_diff(list(task.answer), list(task.foil))
    run = _Runner(model, clean, corrupt, metric, progress)
    # A heatmap over positions needs rows that mean the same by a position; rows of other lengths are left to the heads.
    residual = run.sweep(grid("resid_pre", layer="all", pos="all"))
    heads = run.sweep(grid("z", layer="all", head="all"))
    names = [s for s in ("attn_out", "mlp_out") if (s, 0, None) in model.sizes]
    blocks = run.sweep(grid(names, layer="all"))
    found = _heads(heads)
    report = Report(
        question=task.question,
        model=f"{model!r}{', ' * bool(task.about)}{task.about}",
        pairs=len(clean),
        example={"clean": task.clean[0], "corrupt": task.corrupt[0], "answer": task.answer[0], "foil": task.foil[0]},
        clean_metric=float(np.mean(heads.source)),  # type: ignore[arg-type]
        corrupt_metric=float(np.mean(heads.base)),
        clean_probability=float(evaluate(model, clean, prob([[a] for a in task.answer])).mean()),
        accuracy=float((heads.source > 0).mean()),  # type: ignore[operator]
        all_heads=int(heads.status.size),
        heads=found,
        positions=_positions(residual),
        blocks=_top(blocks, 4),
        check=_confirm(model, clean, corrupt, metric, found) if found else None,
        noise_floor=float(heads.noise_floor),
        # Every edge is scored, and their number grows with the square of the layers.
        lists=two_steps(model, 16 if model.n_layers <= 12 else 8) if task.lists else None,
    )
    if out is None:
        return report
    out.mkdir(parents=True, exist_ok=True)
    figures = _draw(model, clean, residual, heads, blocks, found, out)
    if report.lists is not None:
        draw_two_steps(model, report.lists).savefig(out / "two_steps.png", dpi=200)
        figures["repeated lists: a head that says what came before, and one that looks it up"] = str(
            out / "two_steps.png"
        )
    report = Report(**{**report.__dict__, "figures": figures})
    for name, result in (("residual", residual), ("heads", heads), ("blocks", blocks)):
        result.save(out / name)
    (out / "report.json").write_text(json.dumps(asdict(report), indent=1) + "\n")
    return report


@dataclass(frozen=True)
class _Runner:
    model: Model
    clean: Inputs
    corrupt: Inputs
    metric: Metric
    progress: bool | None

    def sweep(self, cells: Any) -> Result:
        return sweep(self.model, self.clean, self.corrupt, cells, metric=self.metric, progress=self.progress)


def _top(result: Result, k: int, chosen: np.ndarray | None = None) -> list[dict[str, Any]]:
    """The k cells of the largest normalized effect, among those chosen, with intervals."""
    share = result.normalized()
    low, high = result.ci(normalized=True)
    order = np.argsort(-np.abs(np.nan_to_num(share)), axis=None)
    listed = []
    for flat in order:
        index = np.unravel_index(flat, share.shape)
        if chosen is not None and not chosen[index]:
            continue
        cell = {axis.name: axis.values[i] for axis, i in zip(result.axes, index, strict=True)}
        listed.append(cell | {"share": float(share[index]), "low": float(low[index]), "high": float(high[index])})
        if len(listed) == k:
            break
    return listed


def _heads(result: Result, most: int = 6) -> list[dict[str, Any]]:
    """The heads whose effect is large, and significant where there are pairs enough to tell."""
    chosen = (np.abs(result.normalized()) >= SHARE) & result.above_noise()
    if len(result.rows) >= FEW:
        chosen &= result.significant()
    return _top(result, most, chosen) if chosen.any() else []


def _positions(result: Result) -> list[dict[str, Any]]:
    """For each layer the position at which most of the difference lies."""
    listed = []
    for layer in result.axes[0].values:
        best = _top(result.sel(layer=[layer]), 1)[0]
        label = result.axes[1].labels[result.axes[1].values.index(best["pos"])]
        listed.append(best | {"token": label})
    return listed


def _confirm(
    model: Model, clean: Inputs, corrupt: Inputs, metric: Metric, found: Sequence[dict[str, Any]], draws: int = 10
) -> Check:
    """Put the heads back, and knock them out, together; then as many others."""
    picked = [(h["layer"], h["head"]) for h in found]
    every = [
        (layer, h) for layer in range(model.n_layers) for h in range(model.architecture.blocks[layer].attention.q.heads)
    ]
    others = [head for head in every if head not in picked]
    whole = (evaluate(model, clean, metric) - evaluate(model, corrupt, metric)).mean()

    def shares(heads: Sequence[tuple[int, int]]) -> tuple[float, float]:
        back = _together(heads, World(clean))
        out = _together(heads, World(corrupt))
        gained = (evaluate(model, World(corrupt, back), metric) - evaluate(model, corrupt, metric)).mean()
        lost = (evaluate(model, clean, metric) - evaluate(model, World(clean, out), metric)).mean()
        return float(gained / whole), float(lost / whole)

    draw = random.Random(0)
    count = min(len(picked), len(others))
    sampled = [shares(draw.sample(others, count)) for _ in range(draws)] if count else [(0.0, 0.0)]
    put_back, knocked_out = shares(picked)
    return Check(put_back, knocked_out, *(float(np.mean([s[i] for s in sampled])) for i in (0, 1)), draws=draws)


def _together(heads: Sequence[tuple[int, int]], source: World) -> Plan:
    return Plan(tuple(patch(Site("z", layer, head=head), source) for layer, head in heads))


def _draw(
    model: Model,
    clean: Inputs,
    residual: Result,
    heads: Result,
    blocks: Result,
    found: Sequence[dict[str, Any]],
    out: Path,
) -> dict[str, str]:
    """Write the figures and say what each shows."""
    from matplotlib.figure import Figure

    paths = {}
    for what, name, result in (
        ("where the difference is, by layer and position", "residual.png", residual),
        ("every head, by layer", "heads.png", heads),
        ("whole attention layers and MLPs", "blocks.png", blocks),
    ):
        result.figure().savefig(out / name, dpi=200)
        paths[what] = str(out / name)
    if found:
        figure = Figure(figsize=(4.2, 2.8), layout="constrained")
        plots.ranked(heads, k=min(12, heads.status.size), ax=figure.subplots())
        figure.savefig(out / "heads_ranked.png", dpi=200)
        paths["the strongest heads with intervals"] = str(out / "heads_ranked.png")
        shown = found[:4]
        sites = [Site("pattern", h["layer"], head=h["head"]) for h in shown]
        tape = model.run(clean.rows(slice(0, 1)), capture=sites).tape
        figure = Figure(figsize=(3.4 * len(shown), 3.6), layout="constrained")
        for ax, head, place in zip(np.atleast_1d(figure.subplots(1, len(shown))), shown, sites, strict=True):
            with torch.no_grad():
                plots.attention(tape[place][0, 0], clean.labels(0), ax=ax, title=f"head {head['layer']}.{head['head']}")
        figure.savefig(out / "attention.png", dpi=200)
        paths["what the heads found attend to, on the first clean prompt"] = str(out / "attention.png")
    return paths
