"""Routes and driving heads of one model: which heads carry the prior, and what turning them down does."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import interp as ip
from experiments.modality_priors.pictures import COLOURS
from experiments.modality_priors.questions import COLOUR_IDS, IDS
from experiments.modality_priors.scoring import composition, greedy
from experiments.modality_priors.splits import Split, counter_prior, hinted, misnamed
from experiments.modality_priors.worlds import logits
from interp.attention import Branch, driving_heads, relatives, route_effects

KEPT = 2
"""How many heads are turned down."""


def found_heads(result: ip.Result, count: int = KEPT) -> list[tuple[int, int]]:
    """The heads whose edges to the logits favour most what was measured."""
    mean = result.mean()
    best = np.argsort(-mean)[:count]
    names = [str(result.axes[0].values[i]).split("->")[0] for i in best]
    return [(int(name[1 : name.index(".")]), int(name.split(".h")[1])) for name in names]


def measured(model: ip.Model, seed: int, rows: int = 160) -> dict[str, Any]:
    """Path patching, routes, and both in force."""
    scenes = counter_prior(2 * rows, seed)
    half = slice(0, rows), slice(rows, 2 * rows)
    # Heads are found on one half and judged on the other.
    lie, hint = hinted(scenes.take(half[0]), seed + 10, COLOUR_IDS, honest=False)
    truth, _ = hinted(scenes.take(half[0]), seed + 10, COLOUR_IDS, honest=True)
    premise = ip.logit_diff(COLOUR_IDS[hint].tolist(), lie.answer.tolist())
    by_hint = driving_heads(model, _inputs(model, lie), _inputs(model, truth), metric=premise, progress=False)
    wrong, right = misnamed(scenes.take(half[0]), seed + 20, COLOUR_IDS)
    named = ip.logit_diff(COLOUR_IDS[wrong.scenes.shape].tolist(), COLOUR_IDS[right.scenes.shape].tolist())
    by_word = driving_heads(model, _inputs(model, wrong), _inputs(model, right), metric=named, progress=False)
    judged, _ = hinted(scenes.take(half[1]), seed + 30, COLOUR_IDS, honest=False)
    agreed, _ = hinted(scenes.take(half[1]), seed + 30, COLOUR_IDS, honest=True)
    _, plain = misnamed(scenes.take(half[1]), seed + 40, COLOUR_IDS)
    routes = _routes(model, right)
    heads = {"driving by hint": found_heads(by_hint), "driving by word": found_heads(by_word)}
    heads["random"] = [(0, 3), (2, 2)]
    dominant = routes.pop("prior dominant")
    report: dict[str, Any] = {
        "direct effects": {"hint": by_hint.mean().tolist(), "word": by_word.mean().tolist()},
        "heads": {name: [list(at) for at in chosen] for name, chosen in heads.items()},
        "prior dominant heads": [list(at) for at in dominant],
        "routes": routes,
        "accuracy": {},
    }
    kept = {"premise against the picture": judged, "premise as the picture": agreed, "no premise, counter-prior": plain}
    for name, split in kept.items():
        inside = _inside(split, heads, dominant)
        report["accuracy"][name] = {
            what: float(greedy(logits(model, split.batch, {}, own=own)["own"], split.answer).mean())
            for what, own in inside.items()
        }
        worlds = logits(model, split.batch, {"no image": relatives.text_alone(split.batch.input_ids == IDS["<image>"])})
        z = 2 * worlds["own"] - worlds["no image"]
        report["accuracy"][name]["no image subtracted"] = float(greedy(z, split.answer).mean())
        if split is plain:
            report["composition"] = {
                what: composition(logits(model, split.batch, {}, own=own)["own"][:, COLOUR_IDS], split)
                for what, own in inside.items()
            }
    return report


def _inside(
    split: Split, heads: dict[str, list[tuple[int, int]]], dominant: list[tuple[int, int]]
) -> dict[str, Branch]:
    found = {"plain": Branch()}
    for name, chosen in heads.items():
        for factor in (0.5, 0.0):
            found[f"{name} x {factor:g}"] = Branch(relatives.suppress(chosen, factor, queries=(-1,)))
    image, real = split.batch.input_ids == IDS["<image>"], split.batch.attention_mask
    if dominant:
        for share in (0.5, None):
            plan = relatives.gate_routes(dominant, image, real, 0.5, share=share, queries=(-1,))
            # What is generated comes later than the one token that is judged here.
            plan = ip.Plan(tuple(item for item in plan if str(item.site.key_pos) != "new"))
            found[f"text routes x 0.5{'' if share is None else ', gated'}"] = Branch(plan)
    return found


def _routes(model: ip.Model, split: Split) -> dict[str, Any]:
    """Route effects on the logit of the right colour over that of the favourite, first-order beside exact."""
    inputs = _inputs(model, split)
    image = split.batch.input_ids == IDS["<image>"]
    other = torch.where(
        split.favourite == split.scenes.colour, (split.scenes.colour + 1) % len(COLOURS), split.favourite
    )
    metric = ip.logit_diff(split.answer.tolist(), COLOUR_IDS[other].tolist())
    rough = route_effects(model, inputs, image, metric=metric)
    exact = route_effects(model, inputs, image, metric=metric, exact=True, progress=False)
    pairs = {
        name: (getattr(rough, name).mean().ravel(), getattr(exact, name).mean().ravel()) for name in ("image", "text")
    }
    both = [np.concatenate([pair[n] for pair in pairs.values()]) for n in (0, 1)]
    worst = int(np.argmax(np.abs(both[0] - both[1])))
    return {
        "first order": {name: pair[0].tolist() for name, pair in pairs.items()},
        "exact": {name: pair[1].tolist() for name, pair in pairs.items()},
        "correlation of means": float(np.corrcoef(*both)[0, 1]),
        "correlation of rows": float(
            np.corrcoef(
                np.concatenate([rough.image.effect.ravel(), rough.text.effect.ravel()]),
                np.concatenate([exact.image.effect.ravel(), exact.text.effect.ravel()]),
            )[0, 1]
        ),
        "worst": {"first order": float(both[0][worst]), "exact": float(both[1][worst])},
        "visual share": exact.visual_share.tolist(),
        "prior dominant": exact.prior_dominant(),
    }


def _inputs(model: ip.Model, split: Split) -> Any:
    return model.inputs(split.batch.arguments())
