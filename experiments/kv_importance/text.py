"""Real models on English text: which cached tokens cause the next words, and how each policy's score agrees with that.

``python -m experiments.kv_importance.text --model smollm2-135m`` (or a folder, such as that of a small story-teller).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import interp as ip
from experiments import machine
from experiments.kv_importance.run import RESULTS
from interp.kv import agreement, policies

STORY = (
    "Once upon a time, there was a little girl named Lily. She had a red ball and a big brown dog. The dog's name was "
    "Max. One day, Lily and Max went to the park. Lily threw the red ball, and Max ran to get it. A boy named Tim saw "
    "them. Tim was sad because he had no ball. Lily was kind, so she gave Tim the red ball. Tim was very "
    "happy. He said, "
    '"Thank you, Lily!" They played all day. At night, Lily went home with Max. Her mom asked what she did. "I made a '
)
STORY_SUFFIX = ' friend!" said Lily'


def topic() -> str:
    """English text that comes with Python: what its documentation says of truth values and comparisons."""
    from pydoc_data.topics import topics

    return " ".join((topics["truth"] + topics["comparisons"]).split())


def split(model: ip.Model, text: str, context: int, suffix: int) -> tuple[list[int], list[int]]:
    """The first tokens of a text as a context, and what follows it."""
    ids = model.encode(text)
    if len(ids) < context + suffix:
        raise SystemExit(f"the text has {len(ids)} tokens, and {context + suffix} are asked for")
    return ids[:context], ids[context : context + suffix]


def measured(model: ip.Model, context: list[int], suffix: list[int], seed: int = 0) -> dict[str, Any]:
    """Exact effects of every unit, the estimates of them, and every policy's agreement."""
    start = time.time()
    exact = ip.kv.kv_effects(model, context, suffix, per_query=True, progress=False)
    took = time.time() - start
    effect = exact.effect[..., 0].sum(-1)
    size = np.abs(effect)
    found: dict[str, Any] = {
        "units": int(effect.size), "seconds": round(took, 2), "base_nll": float(exact.base[0]),
        "noise_floor": float(exact.noise_floor.max()), "ceiling": agreement.noise_ceiling(exact.effect[..., 0]),
        "share_of_top_1_percent": float(np.sort(size.ravel())[-max(1, size.size // 100) :].sum() / size.sum()),
    }  # fmt: skip
    estimates = {}
    for how in ("gradient", "rescaled", "integrated"):
        mine = ip.kv.kv_effects(model, context, suffix, how=how).effect[..., 0]
        estimates[how] = {
            "spearman": agreement.spearman(np.abs(mine), size),
            "pearson": float(np.corrcoef(mine.ravel(), effect.ravel())[0, 1]),
        }  # fmt: skip
    found["estimates"] = estimates
    inputs = model.inputs(torch.tensor([context]))
    every = [
        policies.streaming_llm(), policies.h2o(), policies.snapkv(16), policies.tova(), policies.key_norm(),
        policies.keydiff(), policies.expected_attention(64), policies.value_gradient(model, inputs, 16),
        policies.random(seed),
    ]  # fmt: skip
    found["policies"] = []
    for policy in every:
        scores = ip.kv.scores_of(model, inputs, policy)
        tenth = max(1, round(0.1 * len(context)))
        kept = scores.argsort(-1).argsort(-1) >= len(context) - tenth
        best = size.argsort(-1).argsort(-1) >= len(context) - tenth
        found["policies"].append(
            {
                "policy": policy.name, "spearman": agreement.spearman(scores, size),
                "spearman_per_head": float(np.nanmean(agreement.per_head(scores, size))),
                "recall_of_top_tenth": float((kept & best).sum() / best.sum()),
            }
        )  # fmt: skip
    tokens = ip.kv.kv_effects(model, context, suffix, unit="token")
    labels = tokens.config["tokens"][0]
    found["text"] = {
        "tokens": labels, "context": len(context), "token_effects": [float(x) for x in tokens.effect[..., 0]],
    }  # fmt: skip
    top = np.argsort(-size.ravel())[:12]
    found["strongest"] = [
        [
            *(int(i) for i in np.unravel_index(flat, size.shape)),
            labels[np.unravel_index(flat, size.shape)[2]],
            float(effect.ravel()[flat]),
        ]
        for flat in top
    ]
    return found


def main() -> None:
    """Measure one model and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--name", default=None, help="of the result's file")
    parser.add_argument("--context", type=int, default=200)
    parser.add_argument("--suffix", type=int, default=4)
    parser.add_argument("--text", choices=("story", "topic"), default="topic")
    given = parser.parse_args()
    model = ip.load(given.model)
    text = STORY + STORY_SUFFIX if given.text == "story" else topic()
    context, suffix = split(model, text, given.context, given.suffix)
    found = {"model": Path(given.model).name, "text_source": given.text, **measured(model, context, suffix)}
    path = RESULTS / f"text_{given.name or Path(given.model).name}.json"
    machine.write(path, found)
    print(path)


if __name__ == "__main__":
    main()
