"""How often the most likely word is the answer, on each task and split."""

from __future__ import annotations

from typing import Any

import interp as ip
from interp.models.english import SPLITS, TASKS, Example


def correct(model: ip.Model, examples: list[Example], batch: int = 250) -> int:
    """How many of the 2n prompts, clean and corrupt, have their answer as the argmax over the whole vocabulary."""
    prompts = [(x.clean, x.answer) for x in examples] + [(x.corrupt, x.foil) for x in examples]
    right = 0
    for start in range(0, len(prompts), batch):
        texts, answers = zip(*prompts[start : start + batch], strict=True)
        inputs = model.inputs(texts, padding="left")
        said = model.run(inputs).logits[:, -1].argmax(dim=-1).tolist()
        right += sum(word == model.token(answer) for word, answer in zip(said, answers, strict=True))
    return right


def accuracies(model: ip.Model, n: int, seed: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Measure every task on every split.

    Args:
        model: a wrapped model with its tokenizer.
        n: prompt pairs a task and split.
        seed: of the examples.

    Returns:
        ``[task][split]`` -> prompts right, prompts asked (2n), and their ratio.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for task, draw in TASKS.items():
        found[task] = {}
        for split in SPLITS:
            right = correct(model, draw(n, seed, split))
            found[task][split] = {"right": right, "of": 2 * n, "accuracy": right / (2 * n)}
    return found
