"""The study: ``python -m experiments.kv_importance.run`` trains the small Llama and judges every policy on marked
recall.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import interp as ip
from experiments import machine
from experiments.kv_importance.model import FOLDER, accuracy, train
from experiments.kv_importance.task import ARMS, Recall, draw
from interp.kv import policies
from interp.kv.labels import paired

RESULTS = Path(__file__).parent / "results"
BUDGETS = (0.05, 0.1, 0.2, 0.5)
HEADS = {
    "published": "heads, published label", "interventional": "heads, interventional label", "both": "heads, both labels"
}  # fmt: skip
CHUNK, STABILIZERS, STREAM_BUDGETS, STREAM_ROWS = 12, 1, (5, 10, 24), 64


def heads_of(model: ip.Model, seed: int, rows: int, steps: int) -> dict[str, ip.kv.Policy]:
    """Retaining heads trained on either label and on both, on the same contexts, for as many steps."""
    task, made = draw(rows, 50_000 + seed), {}
    said = {
        label: ip.kv.examples(model, task.context, task.suffix, label, answer=1)
        for label in ("published", "interventional")
    }
    said["both"] = [paired(*pair) for pair in zip(said["published"], said["interventional"], strict=True)]
    for label, some in said.items():
        name = HEADS[label]
        heads = ip.kv.RetainingHeads.for_model(model, 64, seed=seed)
        ip.kv.train_heads(heads, some, steps=steps, batch=8, learning_rate=2e-3, seed=seed)
        made[name] = heads.policy(name)
    return made


def static() -> list[ip.kv.Policy]:
    """Policies that know nothing of the model but what they see, with windows that fit contexts of 48 tokens."""
    return [
        policies.streaming_llm(2), policies.h2o(), policies.snapkv(8, 3), policies.tova(), policies.key_norm(),
        policies.keydiff(), policies.expected_attention(16),
    ]  # fmt: skip


def judged(model: ip.Model, some: list[ip.kv.Policy], arm: str, seed: int, rows: int) -> ip.kv.Judged:
    """Every policy on rows of one arm."""
    task = draw(rows, 90_000 + seed, arm)
    gradient = partial(policies.value_gradient, window=8)
    return ip.kv.judge(
        model, task.context, task.suffix, [*some, gradient], budgets=BUDGETS, answer=1, drop=0.1, progress=False
    )


def streamed(model: ip.Model, policy: ip.kv.Policy, budget: int, task: Recall) -> float:
    """Share of right answers after prefill in chunks under a budget."""
    cache = ip.kv.prefill(
        model, model.inputs(task.context), policy, budget, chunk=CHUNK, stabilizers=min(STABILIZERS, budget - 1)
    )
    logits = ip.kv.follow(model, cache, task.suffix[:, :-1])[:, -1]
    return float((logits.argmax(-1) == task.suffix[:, -1]).float().mean())


def pooled(parts: list[ip.kv.Judged]) -> list[dict[str, Any]]:
    """The table of several seeds' rows together, with the spread of the seeds' own means beside it."""
    rows = {name: np.concatenate([getattr(p, name) for p in parts], -1) for name in (
        "spearman", "kendall", "per_head", "recall", "nll", "oracle", "full", "correct", "full_correct", "ceiling"
    )}  # fmt: skip
    whole = ip.kv.Judged(parts[0].policies, parts[0].budgets, misjudged={}, **rows)
    table = whole.table()
    for line in table:
        p, b = whole.policies.index(line["policy"]), whole.budgets.index(line["budget"])
        line["accuracy_by_seed"] = [float(part.correct[p, b].mean()) for part in parts]
        line["regret_by_seed"] = [float(part.regret[p, b].mean()) for part in parts]
    return table


def study(seeds: list[int], rows: int, label_rows: int, steps: int, folder: Path) -> dict[str, Any]:
    """All arms, all policies, all seeds, as JSON data."""
    started, found = time.time(), {"arms": {}, "streamed": [], "models": []}
    models, heads = {}, {}
    for seed in seeds:
        models[seed] = train(seed, folder)
        trained = json.loads((folder / f"llama-{seed}" / "training.json").read_text())
        by_arm = {arm: accuracy(models[seed].module, 500, 20_000, arm) for arm in ARMS}
        found["models"].append({**trained, "accuracy_by_arm": by_arm})
        heads[seed] = heads_of(models[seed], seed, label_rows, steps)
        print(f"seed {seed}: heads trained, {time.time() - started:.0f} s", flush=True)
    for arm in ARMS:
        parts = [judged(models[s], [*heads[s].values(), *static()], arm, s, rows) for s in seeds]
        found["arms"][arm] = {
            "table": pooled(parts),
            "full_accuracy": float(np.mean([p.full_correct for p in parts])),
            "misjudged": {name: [list(u) for u in parts[0].misjudged[name]] for name in parts[0].policies},
        }
        for seed in seeds:
            task = draw(STREAM_ROWS, 120_000 + seed, arm)
            for policy in [*heads[seed].values(), *static(), policies.random(seed)]:
                for budget in STREAM_BUDGETS:
                    right = streamed(models[seed], policy, budget, task)
                    found["streamed"].append(
                        {"arm": arm, "seed": seed, "policy": policy.name, "budget": budget, "accuracy": right}
                    )
        print(f"{arm}: {time.time() - started:.0f} s", flush=True)
    found["setting"] = {
        "seeds": seeds, "rows": rows, "label_rows": label_rows, "head_steps": steps, "budgets": list(BUDGETS),
        "chunk": CHUNK, "stabilizers": STABILIZERS, "seconds": round(time.time() - started, 1),
    }  # fmt: skip
    return found


def compact(found: dict[str, Any]) -> str:
    """JSON with five digits of each number, and a line for each policy and budget."""

    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: short(one) for name, one in value.items()}
        if isinstance(value, list | tuple):
            return [short(one) for one in value]
        return float(f"{value:.5g}") if isinstance(value, float) else value

    return re.sub(r' ?(\{"(?:arm|policy)":)', r"\n\1", json.dumps(short(found)))


def main() -> None:
    """Run the study and write its results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=16, help="contexts of each arm and seed")
    parser.add_argument("--label-rows", type=int, default=200, help="contexts that heads are trained on")
    parser.add_argument("--steps", type=int, default=400, help="of the training of heads")
    parser.add_argument("--models", type=Path, default=FOLDER)
    parser.add_argument("--out", type=Path, default=RESULTS, help="a folder, which gets one file a seed")
    given = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    given.out.mkdir(parents=True, exist_ok=True)
    for seed in given.seeds:
        found = study([seed], given.rows, given.label_rows, given.steps, given.models)
        found |= {"machine": machine.describe("cpu"), "versions": machine.versions(), "commit": machine.commit()}
        path = given.out / f"marked_recall_{seed}.json"
        path.write_text(compact(found) + "\n")
        print(path, flush=True)


if __name__ == "__main__":
    main()
