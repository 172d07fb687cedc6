"""Numbers for a replay: a small induction study trained by an implementation that shares nothing with the study's.

python -m tests.experiments.induction_replay   # writes data/induction_replay.safetensors

It is written from the description of the model and the clamps alone: one head and one token at a time, rotary
positions as complex numbers, Adam as in its paper, in float64. It imports nothing of the project.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

PATH = Path(__file__).parent / "data" / "induction_replay.safetensors"
WIDTH, INPUT, HEADS, CLASSES, LABELS, BATCH, UPDATES, RATE = 8, 6, 2, 6, 4, 4, 300, 4e-3
SIZE = WIDTH // HEADS

CLAMPS: dict[str, dict[str, Any]] = {
    "all heads": {},
    "none": {"silent": (1,)},
    "previous token": {"silent": (1,), "previous": (0,)},
    "no previous token": {"silent": (1,), "blind": (0, 1)},
    "layer 1": {"silent": (1,), "layer 1": True},
    "match": {"silent": (1,), "match": 1.0},
    "blunt match": {"silent": (1,), "match": 0.75},
    "copy": {"copy": True},
    "layer 1 + copy": {"layer 1": True, "copy": True},
    "ablated": {"mute": (0,)},
    "pattern-preserving": {"mute": (0,), "keep": "qk"},
    "value-preserving": {"mute": (0,), "keep": "v"},
    "temperature": {"temperature": 0.5},
}
"""What each run holds, in this script's own words; head 0 of the last layer is the one that matches or copies."""


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm of vectors [B, WIDTH]."""
    centred = x - x.sum(-1, keepdim=True) / WIDTH
    spread = (centred**2).sum(-1, keepdim=True) / WIDTH
    return centred / torch.sqrt(spread + 1e-5) * weight + bias


def turned(x: Tensor, position: int) -> Tensor:
    """Rotary position of one head's vectors: entries i and i + SIZE / 2 are a complex number, turned by an angle."""
    half = SIZE // 2
    angles = torch.tensor([position / 10000 ** (2 * i / SIZE) for i in range(half)], dtype=torch.float64)
    number = torch.complex(x[:, :half], x[:, half:]) * torch.complex(angles.cos(), angles.sin())
    return torch.cat((number.real, number.imag), 1)


def projected(w: dict[str, Tensor], layer: int, part: str, normed: list[Tensor], head: int) -> list[Tensor]:
    """One head's queries (turned), keys (turned) or values of five tokens, each [B, SIZE]."""
    rows = w[f"{part}{layer}"][head * SIZE : (head + 1) * SIZE]
    found = [x @ rows.T for x in normed]
    return found if part == "v" else [turned(x, t) for t, x in enumerate(found)]


def logits(w: dict[str, Tensor], exemplars: Tensor, sequences: Tensor, clamp: dict[str, Any]) -> Tensor:
    """Logits [B, LABELS] of sequences [B, 5] (class, class, label, label, which is asked) under a clamp."""
    one, two, label_one, label_two, asked = sequences.T
    seen = [exemplars[c] @ w["embed.weight"].T + w["embed.bias"] for c in (one, two)]
    query = torch.where(asked[:, None] == 0, seen[0], seen[1])
    x = [seen[0], w["label"][label_one], seen[1], w["label"][label_two], query]

    def normed(layer: int, stream: list[Tensor]) -> list[Tensor]:
        return [norm(y, w[f"norm{layer}.weight"], w[f"norm{layer}.bias"]) for y in stream]

    def first(mute: tuple[int, ...]) -> list[Tensor]:
        out, read = list(x), normed(0, x)
        for head in set(range(HEADS)) - set(mute):
            q, k, v = (projected(w, 0, part, read, head) for part in "qkv")
            for t in range(5):
                scores = [(q[t] * k[s]).sum(1) / SIZE**0.5 for s in range(t + 1)]
                if head in clamp.get("blind", ()) and t:
                    scores[t - 1] = torch.full((len(one),), -1e9, dtype=torch.float64)
                share = torch.stack(scores, 1).softmax(1)
                if head in clamp.get("previous", ()):
                    share = torch.eye(5, dtype=torch.float64)[max(t - 1, 0), : t + 1].expand(len(one), -1)
                mixed = torch.stack([share[:, s, None] * v[s] for s in range(t + 1)]).sum(0)
                out[t] = out[t] + mixed @ w["out0"][:, head * SIZE : (head + 1) * SIZE].T
        return out

    stream = first(clamp.get("mute", ()))
    of = dict.fromkeys("qkv", stream)
    if "keep" in clamp:
        of |= dict.fromkeys(clamp["keep"], first(()))
    if "layer 1" in clamp:
        stream, left = x, [x[0], x[0], x[1], x[2], x[4]]
        of = {"q": left, "k": left, "v": x}
    read = {part: normed(1, y) for part, y in of.items()}
    final = stream[4]
    for head in range(HEADS):
        q, k, v = (projected(w, 1, part, read[part], head) for part in "qkv")
        kept = clamp.get("keep", "")  # what is preserved is a constant
        q, k, v = (
            [y.detach() if part in kept else y for y in each] for part, each in zip("qkv", (q, k, v), strict=True)
        )
        scores = torch.stack([(q[4] * k[s]).sum(1) / SIZE**0.5 for s in range(5)], 1)
        scores = scores / clamp.get("temperature", 1.0)
        if head == 0 and "copy" in clamp:
            labels = torch.arange(LABELS)
            found = torch.where(labels == label_one[:, None], scores[:, 1:2], torch.tensor(-1e9, dtype=torch.float64))
            return torch.where(labels == label_two[:, None], scores[:, 3:4], found)
        share = scores.softmax(1)
        if head == 0 and "match" in clamp:
            right = clamp["match"] * (asked == 0) + (1 - clamp["match"]) * (asked == 1)
            nothing = torch.zeros(len(one), dtype=torch.float64)
            share = torch.stack((nothing, right, nothing, 1 - right, nothing), 1)
        if head not in clamp.get("silent", ()):
            mixed = torch.stack([share[:, s, None] * v[s] for s in range(5)]).sum(0)
            final = final + mixed @ w["out1"][:, head * SIZE : (head + 1) * SIZE].T
    return norm(final, w["norm2.weight"], w["norm2.bias"]) @ w["read.weight"].T + w["read.bias"]


def train(start: dict[str, Tensor], exemplars: Tensor, batches: Tensor, clamp: dict[str, Any]) -> list[float]:
    """The loss before each update of Adam (Kingma and Ba 2015, algorithm 1)."""
    w = {name: value.clone().requires_grad_() for name, value in start.items()}
    m = {name: torch.zeros_like(value) for name, value in start.items()}
    v = {name: torch.zeros_like(value) for name, value in start.items()}
    found = []
    for t, batch in enumerate(batches, start=1):
        answers = torch.where(batch[:, 4] == 0, batch[:, 2], batch[:, 3])
        chances = logits(w, exemplars, batch, clamp).log_softmax(1)
        loss = -torch.stack([chances[row, answer] for row, answer in enumerate(answers)]).mean()
        found.append(loss.item())
        gradients = torch.autograd.grad(loss, list(w.values()), allow_unused=True)
        with torch.no_grad():
            for (name, value), g in zip(w.items(), gradients, strict=True):
                if g is None:
                    continue
                m[name] = 0.9 * m[name] + 0.1 * g
                v[name] = 0.999 * v[name] + 0.001 * g * g
                value -= RATE * (m[name] / (1 - 0.9**t)) / ((v[name] / (1 - 0.999**t)).sqrt() + 1e-8)
    return found


def main() -> None:
    """Draw weights, exemplars and batches, train under every clamp, and write all of it."""
    draw = np.random.default_rng(20240409)

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.tensor(draw.normal(scale=scale, size=shape))

    start = {"embed.weight": normal(WIDTH, INPUT, scale=INPUT**-0.5), "embed.bias": normal(WIDTH, scale=0.1)}
    start["label"] = normal(LABELS, WIDTH, scale=0.5)
    for layer in (0, 1):
        for part in ("q", "k", "v", "out"):
            start[f"{part}{layer}"] = normal(WIDTH, WIDTH, scale=WIDTH**-0.5)
    for layer in (0, 1, 2):
        start[f"norm{layer}.weight"] = 1 + normal(WIDTH, scale=0.1)
        start[f"norm{layer}.bias"] = normal(WIDTH, scale=0.1)
    start |= {"read.weight": normal(LABELS, WIDTH, scale=WIDTH**-0.5), "read.bias": normal(LABELS, scale=0.1)}
    exemplars = normal(CLASSES, INPUT, scale=1.0)
    rows = [
        [[*draw.permutation(CLASSES)[:2], *draw.permutation(LABELS)[:2], draw.integers(2)] for _ in range(BATCH)]
        for _ in range(UPDATES)
    ]
    batches = torch.tensor(np.array(rows))
    losses = torch.tensor([train(start, exemplars, batches, clamp) for clamp in CLAMPS.values()], dtype=torch.float64)
    PATH.parent.mkdir(exist_ok=True)
    kept = {f"start.{name}": value for name, value in start.items()}
    save_file(kept | {"exemplars": exemplars, "batches": batches.to(torch.uint8), "losses": losses}, PATH)
    for name, each in zip(CLAMPS, losses.tolist(), strict=True):
        print(f"{name}: {each[0]:.4f} to {np.mean(each[-20:]):.4f}")


if __name__ == "__main__":
    main()
