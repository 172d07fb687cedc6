"""The branches that are compared, by name, and the logits of all of them on some questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

import interp as ip
from experiments.modality_priors.questions import IDS, Batch
from interp.attention import Branch, attention, relatives

FORMS = ("random", "uniform", "reversed", "shuffled")
SAMPLES = 4
ROWS = 100


def branches(model: ip.Model, batch: Batch, wide: bool = True) -> dict[str, Branch]:
    """Every world that is subtracted somewhere.

    Args:
        model: the wrapped model.
        batch: what is asked.
        wide: every form in every layer; else all layers at once.
    """
    found = {}
    layers = {"all": "all"} | ({str(layer): layer for layer in range(3)} if wide else {})
    for form in FORMS:
        for name, chosen in layers.items():
            found[f"vision {form} {name}"] = Branch(attention(model, form, stack="vision", layers=chosen))
            found[f"language {form} {name}"] = Branch(attention(model, form, layers=chosen))
            found[f"to image {form} {name}"] = Branch(attention(model, form, layers=chosen, keys="image"))
    for draw in range(1, SAMPLES):
        found[f"language random all, draw {draw}"] = Branch(attention(model, "random", seed=draw))
        found[f"vision random all, draw {draw}"] = Branch(attention(model, "random", stack="vision", seed=draw))
    found["no image"] = relatives.text_alone(batch.input_ids == IDS["<image>"])
    found["VCD 500"] = Branch(images=relatives.diffused(500))
    found["VCD 900"] = Branch(images=relatives.diffused(900))
    found["blank image"] = Branch(images=torch.zeros_like)
    found["DoLa 0"] = relatives.early_exit(model, 0)
    found["DoLa 1"] = relatives.early_exit(model, 1)
    return found


def logits(model: ip.Model, batch: Batch, worlds: Mapping[str, Branch], own: Branch | None = None) -> dict[str, Tensor]:
    """The logits [B, V] of the next token in each world, and in the model's own ("own"), some rows at a time."""
    parts: dict[str, list[Tensor]] = {name: [] for name in ("own", *worlds)}

    def keep(found: Tensor, _moment: object) -> Tensor:
        for name, one in zip(parts, found, strict=True):
            parts[name].append(one[:, -1])
        return found[0]

    for start in range(0, len(batch.input_ids), ROWS):
        rows = slice(start, start + ROWS)
        part = cut(batch, rows)
        mine = [Branch(b.plan, None if b.hide is None else b.hide[rows], b.images) for b in worlds.values()]
        with torch.no_grad(), model.fork(*mine, combine=keep, own=own):
            model.module(**part.arguments())
    return {name: torch.cat(each).double() for name, each in parts.items()}


def cut(batch: Batch, rows: slice) -> Batch:
    """Some rows of a batch in which every row has a picture."""
    assert batch.pixel_values is not None
    return Batch(batch.input_ids[rows], batch.attention_mask[rows], batch.labels[rows], batch.pixel_values[rows])


def averaged(found: dict[str, Tensor], names: Sequence[str]) -> Tensor:
    """The mean of several draws of a counterfactual."""
    return torch.stack([found[name] for name in names]).mean(0)
