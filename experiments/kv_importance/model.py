"""The small Llama of the study, trained on marked recall until it answers from a full cache."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

import interp as ip
from experiments.kv_importance.task import KEYS, VOCABULARY, draw

FOLDER = Path("build/kv_importance")
LAYERS, WIDTH, HEADS, GROUPS = 2, 64, 4, 2
RATE = 3e-3
STAGES = (0, 14, 20, 32, 48)
"""Lengths of the contexts that it is trained on, one after another; 0 is for repeated tokens, from which it learns to
find what followed a token before, in a fraction of the steps that the task alone takes.
"""
PERIOD = 12


def fresh(seed: int = 0):
    """The model, untrained."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=GROUPS, max_position_embeddings=512, rope_theta=10000.0,
        bos_token_id=1, eos_token_id=None, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def repeated(rows: int, seed: int) -> torch.Tensor:
    """`PERIOD` different tokens, three times over, int64 [rows, 3 `PERIOD`]."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(rows, VOCABULARY - KEYS.start, generator=generator)
    return (draws.argsort(1)[:, :PERIOD] + KEYS.start).repeat(1, 3)


def accuracy(model, rows: int = 500, seed: int = 10_000, arm: str | None = None) -> float:
    """Share of rows whose answer is the most likely token, from a full cache."""
    task = draw(rows, seed, arm)
    ids = torch.cat([task.context, task.suffix], 1)
    with torch.no_grad():
        best = model(ids).logits[:, -2].argmax(-1)
    return float((best == task.suffix[:, -1]).float().mean())


def train(seed: int, folder: Path = FOLDER, steps: int = 6000, rows: int = 32, goal: float = 0.99) -> ip.Model:
    """Train the model of a seed, or load it where it was trained before."""
    from transformers import LlamaForCausalLM

    place = folder / f"llama-{seed}"
    if (place / "model.safetensors").exists():
        return ip.wrap(LlamaForCausalLM.from_pretrained(place, attn_implementation="sdpa").eval())
    model, start, reached = fresh(seed), time.time(), 0.0
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.01)
    stages, right = list(STAGES), 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 50) * (0.4 if len(stages) == 1 else 1)
        length, number = stages[0], seed * 1_000_003 + step
        if length:
            task = draw(rows, number, length=length)
            ids = torch.cat([task.context, task.suffix, task.drill], 1)
            # The values that are asked for, the answer's first: nothing else can be foretold.
            at = torch.arange(length + 1, ids.shape[1] - 1, 3)
        else:
            ids, at = repeated(rows, number), torch.arange(PERIOD, 3 * PERIOD - 1)
        logits = model(ids, use_cache=False).logits[:, at]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, at + 1].flatten())
        optimizer.zero_grad()
        loss.backward()
        # A single large step on the way can end on a plateau that the model never leaves.
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        # Texts grow as they are mastered: in short ones the key that is asked for is found sooner.
        now = float((logits.argmax(-1) == ids[:, at + 1]).float().mean())
        right = 0.9 * right + 0.1 * now
        if len(stages) > 1 and right > 0.9:
            stages.pop(0)
            right = 0.0
        if step % 50 == 49:
            reached = accuracy(model.eval()) if len(stages) == 1 else 0.0
            model.train()
            took = time.time() - start
            print(f"seed {seed} step {step + 1} length {length} loss {loss.item():.3f} right {right:.2f} "
                  f"accuracy {reached:.3f} {took:.0f} s", flush=True)  # fmt: skip
            if reached >= goal:
                break
    model.eval().save_pretrained(place)
    told = {"seed": seed, "steps": step + 1, "accuracy": reached, "seconds": round(time.time() - start, 1)}
    (place / "training.json").write_text(json.dumps(told, indent=1) + "\n")
    return ip.wrap(model)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=6000)
    given = parser.parse_args()
    for one in given.seeds:
        train(one, steps=given.steps)
