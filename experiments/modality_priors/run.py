"""Run the study on trained models, and write results/priors.json.

python -m experiments.modality_priors.train --seeds 0 1 2 3 4 --out build/shapes-vlm
python -m experiments.modality_priors.train --seeds 0 1 2 3 4 --balanced --steps 400 --out build/shapes-vlm-balanced
python -m experiments.modality_priors.run            # --quick for a few questions of the model that ships
python -m experiments.modality_priors.run --control-alone   # the balanced models anew, into results that are there
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import interp as ip
from experiments.machine import commit, versions
from experiments.modality_priors import heads, scoring
from experiments.modality_priors.pictures import draw_scenes
from experiments.modality_priors.questions import COLOUR_IDS, DESCRIBE, IDS, NO, YES, batch, decode
from experiments.modality_priors.splits import Split, asked, blank, claims, counter_prior
from experiments.modality_priors.train import SHIPPED
from experiments.modality_priors.worlds import SAMPLES, averaged, branches, cut, logits
from interp.attention import Branch, Decoder, Term, attention, attention_effect, debiased, relatives

ROOT = Path(__file__).parent.parent.parent
RESULTS = Path(__file__).parent / "results"
EPS, GAMMAS = 0.1, (0.5, 1.0, 2.0)


def load(folder: Path) -> ip.Model:
    """A trained model, in evaluation mode."""
    from transformers import LlavaForConditionalGeneration

    return ip.wrap(LlavaForConditionalGeneration.from_pretrained(folder).eval())


def splits_of(seed: int, rows: int) -> dict[str, Split]:
    """The questions for one model; every model has its own."""
    base = 5_000_000 + 1000 * seed
    return {
        "iid": asked(draw_scenes(rows, base), base + 1, COLOUR_IDS),
        "counter": asked(counter_prior(rows, base + 2), base + 3, COLOUR_IDS),
        "blank": blank(draw_scenes(rows, base + 4), base + 5, COLOUR_IDS),
    }


def answers(model: ip.Model, split: Split, wide: bool) -> dict[str, Tensor]:
    """Logits of every world, and of what is made of several."""
    found = logits(model, split.batch, branches(model, split.batch, wide))
    for where in ("language", "vision"):
        draws = [f"{where} random all", *(f"{where} random all, draw {n}" for n in range(1, SAMPLES))]
        found[f"{where} random all, mean of {SAMPLES}"] = averaged(found, draws)
        for name in draws[1:]:
            del found[name]
    # l + g (l - l_v) + g (l - l_l) is l + g (l - l') with l' = l_v + l_l - l.
    for form in ("random", "uniform"):
        found[f"both {form} all"] = found[f"vision {form} all"] + found[f"language {form} all"] - found["own"]
    return found


def captions(model: ip.Model, split: Split) -> dict[str, float]:
    """How often a described colour is not the picture's, in texts of several tokens, by way of decoding."""
    rows = len(split.answer)
    pictures = (split.batch.pixel_values * 0.5 + 0.5)[:rows]  # type: ignore[operator,index]
    asks = batch([DESCRIBE] * rows, pictures)
    image = asks.input_ids == IDS["<image>"]
    ways: dict[str, Decoder | None] = {
        "plain": None,
        "language uniform all": Decoder((Term(Branch(attention(model, "uniform"))),), EPS),  # type: ignore[arg-type]
        "vision uniform all": Decoder((Term((Branch(attention(model, "uniform", stack="vision")),)),), EPS),
        "no image": relatives.without_image(image, eps=EPS),
        "VCD 500": relatives.vcd(eps=EPS),
        "M3ID": relatives.m3id(image, decay=0.2, confident=1.0),
    }
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    rates = {}
    for name, decoder in ways.items():
        if decoder is None:
            out = model.module.generate(**asks.arguments(), **options)
        else:
            with debiased(model, decoder):
                out = model.module.generate(**asks.arguments(), **options)
        said = [decode(row[asks.input_ids.shape[1] :]).split() for row in out]
        true = [int(token) for token in split.answer]
        wrong = [not any(IDS.get(word) == t for word in words) for words, t in zip(said, true, strict=True)]
        rates[name] = sum(wrong) / rows
    return rates


def one_model(model: ip.Model, seed: int, rows: int, wide: bool = True) -> dict[str, Any]:
    """All that is measured of one model: per-row values under "rows", which are pooled later."""
    found: dict[str, Any] = {"rows": {}, "composition": {}, "predicted": {}}
    split_logits = {}
    for name, split in splits_of(seed, rows).items():
        worlds = split_logits[name] = answers(model, split, wide)
        own = worlds["own"]
        values: dict[str, Tensor] = {}
        for eps in (None, EPS):
            cut = "" if eps is None else f", eps {eps:g}"
            for branch, logit in worlds.items():
                for g in (0.0,) if branch == "own" else GAMMAS:
                    z = scoring.decoded(own, logit, g, eps)
                    label = f"plain{cut}" if branch == "own" else f"{branch}, g {g:g}{cut}"
                    target = COLOUR_IDS[split.favourite] if name == "blank" else split.answer
                    values[f"{label} | greedy"] = scoring.greedy(z, target)
                    values[f"{label} | sampled"] = scoring.sampled(z, target)
        found["rows"][name] = values
        if name == "iid":
            found["composition"] = {b: scoring.composition(x[:, COLOUR_IDS], split) for b, x in worlds.items()}
        if name == "counter":
            own_made = found["composition"]["own"]
            for branch in worlds:
                for g in GAMMAS if branch != "own" else ():
                    made = scoring.predicted(own_made, found["composition"][branch], g, split)
                    real = float(values[f"{branch}, g {g:g} | greedy"].mean())
                    found["predicted"][f"{branch}, g {g:g}"] = {"predicted": made, "measured": real}
            found["ideal"] = {
                "Bayes": float(
                    (split.evidence + split.language + split.vision).argmax(1).eq(split.scenes.colour).double().mean()
                ),
                "evidence alone": float(split.evidence.argmax(1).eq(split.scenes.colour).double().mean()),
            }
            found["captions"] = captions(model, _first(split, min(rows, 100)))
    found["claims"] = {}
    for kind in ("random", "adversarial"):
        split = claims(draw_scenes(rows // 2, 6_000_000 + 1000 * seed), 6_000_001 + 1000 * seed, kind)
        worlds = logits(model, split.batch, branches(model, split.batch, wide=False))
        found["claims"][kind] = {
            ("plain" if b == "own" else b): scoring.yes_no(
                scoring.decoded(worlds["own"], x, 1.0, None), split.answer, YES, NO
            )
            for b, x in worlds.items()
        }
    return found


def _first(split: Split, rows: int) -> Split:
    part = slice(0, rows)
    return Split(
        cut(split.batch, part), split.scenes.take(part), split.evidence[part], split.language[part], split.vision[part],
        split.answer[part], split.favourite[part],
    )  # fmt: skip


def effects(model: ip.Model, seed: int, rows: int = 96) -> dict[str, Any]:
    """Which layers' attention, to which modality, causes the right colour to be said over the favourite."""
    split = asked(counter_prior(rows, 7_000_000 + seed), 7_000_001 + seed, COLOUR_IDS)
    inputs = model.inputs(split.batch.arguments())
    metric = ip.logit_diff(split.answer.tolist(), COLOUR_IDS[split.favourite].tolist())
    found = {}
    for name, where in {
        "vision": {"stack": "vision"}, "language": {}, "to the image": {"keys": "image"},
    }.items():  # fmt: skip
        result = attention_effect(model, inputs, metric=metric, do="random", samples=4, progress=False, **where)
        low, high = result.ci()
        found[name] = {"mean": result.mean().tolist(), "low": low.tolist(), "high": high.tolist()}
    return found


def pooled(models: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Every decoder against plain decoding of its kind, and against the cut-off alone, over all models."""
    table: dict[str, Any] = {}
    for name in models[0]["rows"]:
        table[name] = {}
        for label in models[0]["rows"][name]:
            way, kind = label.split(" | ")
            each = [one["rows"][name][label] for one in models]
            base = [one["rows"][name][f"plain | {kind}"] for one in models]
            entry = scoring.paired(each, base, draws=400)
            if ", eps" in way:
                alone = [one["rows"][name][f"plain, eps {EPS:g} | {kind}"] for one in models]
                entry["beyond the cut-off"] = {
                    k: v for k, v in scoring.paired(each, alone, draws=400).items() if k in ("change", "low", "high")
                }
            table[name][label] = entry
    return table


def averaged_numbers(found: Sequence[Any]) -> Any:
    """The mean over models of nested numbers; what is no number is the first model's."""
    first = found[0]
    if isinstance(first, dict):
        return {key: averaged_numbers([one[key] for one in found]) for key in first if all(key in one for one in found)}
    if isinstance(first, (int, float)) and not isinstance(first, bool):
        return sum(found) / len(found)
    return first


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planted", type=Path, default=ROOT / "build" / "shapes-vlm")
    parser.add_argument("--balanced", type=Path, default=ROOT / "build" / "shapes-vlm-balanced")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--quick", action="store_true", help="the model that ships, few questions; writes into build/")
    parser.add_argument("--without-control", action="store_true", help="leave out the models without a planted prior")
    parser.add_argument("--control-alone", action="store_true", help="measure them alone, and keep the other results")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    began = time.perf_counter()
    rows = 40 if given.quick else given.rows
    out = given.out or (ROOT / "build" / "priors-quick.json" if given.quick else RESULTS / "priors.json")
    if given.control_alone:
        report = json.loads(out.read_text())
        if report["settings"]["rows"] != rows:
            raise SystemExit(
                f"{out} is of {report['settings']['rows']} questions a split: give --rows with that number"
            )
        report["balanced"] = _controls(_folders(given.balanced), rows)
        _write(report, out)
        return
    planted = [SHIPPED] if given.quick else _folders(given.planted)
    report: dict[str, Any] = {"settings": {"rows": rows, "eps": EPS, "gammas": GAMMAS, "models": len(planted)}}
    models, found_heads, found_effects = [], [], []
    for seed, folder in enumerate(planted):
        one, of_heads, of_effects = kept(folder, f"measured-{rows}.pt", partial(_measured, folder, seed, rows))
        models.append(one)
        found_heads.append(of_heads)
        found_effects.append(of_effects)
        print(f"{folder}: {time.perf_counter() - began:.0f} s", flush=True)
    report["decoders"] = pooled(models)
    for key in ("composition", "predicted", "ideal", "captions", "claims"):
        report[key] = averaged_numbers([one[key] for one in models])
    report["predicted by model"] = [one["predicted"] for one in models]
    report["heads"] = found_heads
    report["effects"] = found_effects
    if not given.quick and not given.without_control:
        report["balanced"] = _controls(_folders(given.balanced), rows)
    report |= {"seconds": time.perf_counter() - began, "versions": versions(), "commit": commit()}
    _write(report, out)


def _write(report: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(_rounded(report), indent=None, separators=(",", ":")) + "\n")
    print(f"{out} written")


def _controls(folders: Sequence[Path], rows: int) -> dict[str, Any]:
    """What decoders do to models that have learned no prior."""
    began, controls = time.perf_counter(), []
    for seed, folder in enumerate(folders):
        controls.append(kept(folder, f"measured-{rows}.pt", partial(_control, folder, seed, rows)))
        print(f"{folder}: {time.perf_counter() - began:.0f} s", flush=True)
    return {
        "models": len(controls),
        "questions": rows // 2,
        "decoders": pooled(controls),
        "composition": averaged_numbers([one["composition"] for one in controls]),
        "seconds": time.perf_counter() - began,
        "versions": versions(),
        "commit": commit(),
    }


def _measured(folder: Path, seed: int, rows: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    model = load(folder)
    found = heads.measured(model, 8_000_000 + seed, rows=min(rows, 160))
    return one_model(model, seed, rows), found, effects(model, seed, rows=min(rows, 96))


def _control(folder: Path, seed: int, rows: int) -> dict[str, Any]:
    return one_model(load(folder), 100 + seed, rows // 2, wide=False)


def kept(folder: Path, name: str, work: Callable[[], Any]) -> Any:
    """What was measured of a model, from the file beside it where it is there; models that ship keep nothing."""
    path = folder / name
    if folder == SHIPPED:
        return work()
    if not path.exists():
        found = work()
        part = path.with_suffix(".part")
        torch.save(found, part)
        part.replace(path)
    return torch.load(path, weights_only=True)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(one) for one in value]
    return round(value, 5) if isinstance(value, float) else value


def _folders(home: Path) -> list[Path]:
    found = sorted((p.parent for p in home.glob("*/training.json")), key=lambda p: int(p.name))
    if not found:
        raise SystemExit(f"no trained models in {home}: train some first (see --help)")
    return found


if __name__ == "__main__":
    main()
