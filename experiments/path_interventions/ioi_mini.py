"""The indirect-object circuit of ioi-mini: ``python -m experiments.path_interventions.ioi_mini``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import interp as ip
from experiments.path_interventions.pipeline import analyse, told, write
from interp import paths
from interp.models import english

OUT = Path(__file__).parent / "results"
PLACES = {"answer": 2, "first giver": 4, "second giver": 10, "end": -1}
"""Where the names are in the template with the order A B B A (the answer, the giver, the giver again), and the end."""


def task(model: ip.Model, n: int, seed: int, split: str) -> tuple[ip.Inputs, ip.Inputs, ip.Metric]:
    """Pairs that differ in who gives, and the logit difference."""
    drawn = english.indirect_object(n, seed, split, template=english.INDIRECT_OBJECT[0], order="ABBA")
    metric = ip.logit_diff([e.answer for e in drawn], [e.foil for e in drawn])
    return model.inputs([e.clean for e in drawn]), model.inputs([e.corrupt for e in drawn]), metric


def behaviour(model: ip.Model, clean: ip.Inputs) -> list[dict[str, Any]]:
    """What each head attends to where Wang et al. (2022) look, mean over prompts.

    Duplicate token: from the second giver to the first. S-inhibition, or here giver finding: from the end to the second
    giver. Name mover: from the end to the answer. `copying` is how much of that head's output, for the token attended
    to most from the end, raises that token's own logit over the mean of all names.
    """
    sites = [ip.site("pattern", layer=layer) for layer in range(model.n_layers)]
    tape = model.run(clean, capture=sites).tape
    names = torch.tensor([model.token(name) for name in english.NAMES])
    embed, unembed = model.architecture.embed.weight, model.architecture.unembed.weight
    listed = []
    for layer, place in enumerate(sites):
        pattern = tape[place]
        block = model.architecture.blocks[layer]
        for head in range(block.attention.q.heads):
            mine = pattern[:, head]
            end, again = mine[:, -1], mine[:, PLACES["second giver"]]
            columns = slice(head * block.attention.q.width, (head + 1) * block.attention.q.width)
            with torch.no_grad():
                value = block.attention.v(block.of_attention.pre(embed[names]))[:, head]
                direct = value @ block.attention.out.weight[:, columns].T @ unembed[names].T
            own = direct.diagonal() - direct.mean(1)
            listed.append(
                {
                    "head": f"a{layer}.h{head}",
                    "duplicate token": float(again[:, PLACES["first giver"]].mean()),
                    "end to second giver": float(end[:, PLACES["second giver"]].mean()),
                    "end to first giver": float(end[:, PLACES["first giver"]].mean()),
                    "end to answer": float(end[:, PLACES["answer"]].mean()),
                    "copying": float(own.mean()),
                    "copies": float((direct.argmax(1) == torch.arange(len(names))).double().mean()),
                }
            )
    return listed


def routes(
    model: ip.Model, clean: ip.Inputs, corrupt: ip.Inputs, metric: ip.Metric, scores: ip.Result
) -> list[dict[str, Any]]:
    """Frozen paths through the head that matters most, and the head's change through chosen receivers."""
    best = max(
        (c for c in scores.top(40) if c["edge"].startswith("input->a") and c["edge"].endswith("<v>")),
        key=lambda c: abs(c["effect"]),
    )["edge"]
    head = best.removeprefix("input->").removesuffix("<v>")
    options: dict[str, Any] = {"metric": metric, "direction": "noising"}
    whole = float(np.mean(scores.source - scores.base))
    found = []
    for path in (
        f"input->{head}<v>->logits",
        f"input->{head}<v>->m0->logits",
        f"input->{head}<v>->m0->m2->logits",
        f"input->{head}<v>->m0->m1->logits",
        f"input->{head}<v>->m0->m1->m2->logits",
    ):
        result = paths.path_patch(model, clean, corrupt, path, semantics="frozen", **options)
        found.append({"path": path, "semantics": "frozen", "share": float(result.mean()) / whole})
    for receivers in (["m0"], ["m0", "m1", "m2", "logits"], ["logits"]):
        result = paths.path_patch(model, clean, corrupt, (head, receivers), semantics="set", **options)
        found.append(
            {"path": f"{head} -> {', '.join(receivers)}", "semantics": "set", "share": float(result.mean()) / whole}
        )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study and write its results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    model = ip.load("ioi-mini")
    train, held_out = task(model, options.pairs, 0, "train"), task(model, options.pairs, 1, "names")
    scores, record = analyse(model, train, held_out, options.out, "ioi_mini")
    record["heads"] = behaviour(model, train[0])
    record["routes"] = routes(model, *train, scores["exact"])
    write(record, options.out, "ioi_mini")
    print(told(record))
    for row in record["heads"]:
        print({k: v if isinstance(v, str) else round(v, 2) for k, v in row.items()})
    for row in record["routes"]:
        print(f"{row['share']:+.2f}  {row['semantics']}: {row['path']}")


if __name__ == "__main__":
    main()
