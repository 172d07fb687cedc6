"""The published decoders and steering methods on the same models, at several strengths: results/relatives.json.

python -m experiments.modality_priors.relatives              # after the models of `run` have been trained
python -m experiments.modality_priors.relatives --quick      # the model that ships, few questions; writes into build/
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import interp as ip
from experiments.machine import commit, versions
from experiments.modality_priors import scoring
from experiments.modality_priors.pictures import COLOURS, draw_scenes, paint
from experiments.modality_priors.questions import (
    DESCRIBE,
    IDS,
    IMAGE_TOKENS,
    Batch,
    batch,
    colour_question,
    description,
)
from experiments.modality_priors.run import EPS, RESULTS, ROOT, _folders, _rounded, kept, load, splits_of
from experiments.modality_priors.splits import Split
from experiments.modality_priors.train import SHIPPED
from interp.attention import Branch, Decoder, debiased, image_map, plausible, relatives, token_map

SIDES = (3, 3)
"""Patches of a picture."""


def next_token(model: ip.Model, asked: Batch, decoder: Decoder | None) -> tuple[Tensor, Tensor]:
    """The logits [B, V] that a decoder without a cut-off makes of the next token, and the model's own."""
    if decoder is None:
        with torch.no_grad():
            made = model.module(**asked.arguments()).logits[:, -1].double()
        return made, made
    seen: list[Tensor] = []
    plain = Decoder(decoder.terms, None, rule=decoder.rule)

    def rule(worlds: Tensor, moment: Any) -> Tensor:
        seen.append(worlds[0, :, -1].double())
        return plain.combine(worlds, moment)

    with torch.no_grad(), debiased(model, replace(decoder, eps=None, rule=rule)):
        made = model.module(**asked.arguments()).logits[:, -1].double()
    return made, seen[0]


def relevance(model: ip.Model, asked: Batch) -> Tensor:
    """How much each patch speaks for what the model says itself, [B, 3, 3] (AGLA asks another model)."""
    with torch.no_grad():
        said = model.module(**asked.arguments()).logits[:, -1].argmax(-1)
    inputs = model.inputs(asked.arguments())
    return image_map(
        token_map(model, inputs, metric=ip.log_prob(said.tolist())), asked.input_ids == IDS["<image>"], SIDES
    )


def disturbed(split: Split, seed: int) -> tuple[Batch, Tensor]:
    """ICD: the same questions after a claim about a colour drawn by chance, and which columns that is."""
    draw = torch.Generator().manual_seed(seed)
    shapes = split.scenes.shape.tolist()
    hints = torch.randint(len(COLOURS), (len(shapes),), generator=draw).tolist()
    asks = [colour_question(shape, hint) for shape, hint in zip(shapes, hints, strict=True)]
    made = batch(asks, torch.zeros(len(asks), 3, 24, 24))
    hidden = torch.zeros_like(made.input_ids, dtype=torch.bool)
    hidden[:, 1 + IMAGE_TOKENS : 1 + IMAGE_TOKENS + made.input_ids.shape[1] - split.batch.input_ids.shape[1]] = True
    return replace(made, pixel_values=split.batch.pixel_values), hidden


def directions(model: ip.Model, seed: int, rows: int = 100) -> dict[str, Tensor]:
    """VTI's: of texts, true descriptions against those of the prior's favourite; of pictures, clean against noised."""
    scenes = draw_scenes(rows, seed)
    pictures, _ = paint(scenes, seed + 1)
    shapes, textures = scenes.shape.tolist(), scenes.texture.tolist()

    def told(colours: list[int]) -> ip.Inputs:
        texts = [f"{DESCRIBE} {description(*one)}" for one in zip(shapes, colours, textures, strict=True)]
        return model.inputs(batch(texts, pictures).arguments())

    clean = batch([DESCRIBE] * rows, pictures)
    noised = replace(clean, pixel_values=relatives.diffused(500)(clean.pixel_values))  # type: ignore[arg-type]
    looked = [model.inputs(one.arguments()) for one in (clean, noised)]
    other = [
        (shape + 1 if shape == colour else shape) % 4
        for shape, colour in zip(shapes, scenes.colour.tolist(), strict=True)
    ]
    return {
        "text": relatives.shifts(model, told(scenes.colour.tolist()), told(other)),
        "pictures": relatives.shifts(model, *looked, stack="vision", pos=None),
    }


def ways(model: ip.Model, split: Split, seed: int, shifts: dict[str, Tensor]) -> dict[str, tuple[Batch, Decoder]]:
    """Every method at every strength, with the questions that it is asked."""
    asks, image = split.batch, split.batch.input_ids == IDS["<image>"]
    found: dict[str, tuple[Batch, Decoder]] = {}
    where, (spoilt, columns) = relevance(model, asks), disturbed(split, seed)
    for g in (0.5, 1.0, 2.0):
        found[f"VCD, alpha {g:g}"] = asks, relatives.vcd(g)
        found[f"no image, g {g:g}"] = asks, relatives.without_image(image, g)
        found[f"ICD, alpha {g:g}"] = spoilt, relatives.icd(columns, g)
        found[f"AGLA, alpha {g:g}"] = asks, relatives.agla(where, g)
    found["DoLa"] = asks, relatives.dola(model, (0, 1))
    found["M3ID"] = asks, relatives.m3id(image, decay=0.2, confident=1.0)
    for alpha in (0.2, 0.5, 1.0):
        louder = Branch(relatives.attend_more(model, alpha, queries=(-1,)))
        found[f"PAI's attention alone, alpha {alpha:g}"] = asks, Decoder(own=louder)
        found[f"PAI, gamma 2, alpha {alpha:g}"] = asks, relatives.pai(model, image, 2.0, alpha, queries=(-1,))
    found["PAI, gamma 1.1, alpha 0.5"] = asks, relatives.pai(model, image, queries=(-1,))
    for alpha in (0.2, 0.5, 1.0):
        found[f"VTI text, alpha {alpha:g}"] = asks, Decoder(own=Branch(relatives.vti(shifts["text"], alpha)))
        seen = Branch(relatives.vti(shifts["pictures"], alpha, stack="vision"))
        found[f"VTI pictures, alpha {alpha:g}"] = asks, Decoder(own=seen)
    return found


def measured(folder: Path, seed: int, rows: int) -> dict[str, dict[str, Tensor]]:
    """Per question of each split: whether the likeliest answer is right, and the probability that a sample is."""
    model = load(folder)
    shifts = directions(model, 9_000_000 + 1000 * seed)
    table: dict[str, dict[str, Tensor]] = {}
    for name, split in splits_of(seed, rows).items():
        if name == "blank":
            continue
        values = table[name] = {}
        tried: dict[str, tuple[Batch, Decoder | None]] = {"plain": (split.batch, None)}
        for way, (asks, decoder) in (tried | ways(model, split, 9_500_000 + seed, shifts)).items():
            z, own = next_token(model, asks, decoder)
            for cut in (None, EPS):
                label = way if cut is None else f"{way}, eps {cut:g}"
                kept_out = plausible(z, own, cut)
                values[f"{label} | greedy"] = scoring.greedy(kept_out, split.answer)
                values[f"{label} | sampled"] = scoring.sampled(kept_out, split.answer)
    return table


def pooled(models: Sequence[dict[str, dict[str, Tensor]]]) -> dict[str, Any]:
    """Each method against plain decoding of its kind, and, where it cuts off, against the cut-off alone."""
    table: dict[str, Any] = {}
    for split, labels in models[0].items():
        table[split] = {}
        for label in labels:
            way, kind = label.split(" | ")
            each = [one[split][label] for one in models]
            entry = scoring.paired(each, [one[split][f"plain | {kind}"] for one in models], draws=400)
            if ", eps" in way:
                alone = [one[split][f"plain, eps {EPS:g} | {kind}"] for one in models]
                beyond = scoring.paired(each, alone, draws=400)
                entry["beyond the cut-off"] = {key: beyond[key] for key in ("change", "low", "high")}
            table[split][label] = entry
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planted", type=Path, default=ROOT / "build" / "shapes-vlm")
    parser.add_argument("--balanced", type=Path, default=ROOT / "build" / "shapes-vlm-balanced")
    parser.add_argument("--rows", type=int, default=120)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    began = time.perf_counter()
    rows = 20 if given.quick else given.rows
    out = given.out or (ROOT / "build" / "relatives-quick.json" if given.quick else RESULTS / "relatives.json")
    groups = {"planted": [SHIPPED]} if given.quick else {
        name: _folders(getattr(given, name)) for name in ("planted", "balanced")
    }  # fmt: skip
    report: dict[str, Any] = {"settings": {"rows": rows, "eps": EPS}}
    for group, folders in groups.items():
        found = []
        for seed, folder in enumerate(folders):
            found.append(kept(folder, f"relatives-{rows}.pt", partial(measured, folder, seed, rows)))
            print(f"{folder}: {time.perf_counter() - began:.0f} s", flush=True)
        report[group] = {"models": len(folders), "methods": pooled(found)}
    report |= {"seconds": time.perf_counter() - began, "versions": versions(), "commit": commit()}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(_rounded(report), separators=(",", ":")) + "\n")
    print(f"{out} written")


if __name__ == "__main__":
    main()
