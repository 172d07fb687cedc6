"""Train `ioi-mini`, the small transformer that ships with the package, from scratch on one CPU core.

python -m experiments.ioi_mini.train            # the shipped model; a few minutes on a free core
python -m experiments.ioi_mini.train --quick    # a few steps, written to build/ioi-mini-quick
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor
from tqdm import trange

import interp as ip
from experiments.ioi_mini.evaluate import accuracies
from interp.models import Transformer, TransformerConfig, WordTokenizer
from interp.models.english import documents, vocabulary

STUDY = Path(__file__).parent
ROOT = STUDY.parent.parent
SHIPPED = ROOT / "interp" / "models" / "weights" / "ioi-mini"
QUICK = ROOT / "build" / "ioi-mini-quick"


@dataclass(frozen=True)
class Settings:
    """What a training run depends on, besides the versions of what it runs on.

    Attributes:
        seed: of the weights and of the training texts.
        steps: batches, none of them seen twice.
        batch: texts in a batch.
        rate: highest learning rate, after a linear warm-up of `warmup` steps and before a cosine to zero.
        decay: AdamW's weight decay, on matrices.
        clip: largest norm of the gradient.
        n_layers: blocks L.
        d_model: width of the residual stream M.
        n_heads: heads a layer H.
        d_mlp: hidden width of the MLPs F.
        evaluate_pairs: prompt pairs a task and split in the evaluation.
        evaluate_seed: of those pairs.
    """

    seed: int = 0
    steps: int = 4000
    batch: int = 64
    rate: float = 3e-3
    warmup: int = 100
    decay: float = 0.1
    clip: float = 1.0
    n_layers: int = 3
    d_model: int = 64
    n_heads: int = 4
    d_mlp: int = 256
    evaluate_pairs: int = 1000
    evaluate_seed: int = 1

    def config(self, vocab_size: int) -> TransformerConfig:
        """The model's shape; rotary positions, because what is learned should not depend on where it stands."""
        return TransformerConfig(
            vocab_size=vocab_size,
            n_layers=self.n_layers,
            d_model=self.d_model,
            n_heads=self.n_heads,
            d_mlp=self.d_mlp,
            positions="rotary",
        )


def train(settings: Settings, tokenizer: WordTokenizer, progress: bool = True) -> tuple[Transformer, list[float]]:
    """Train a model from scratch.

    Args:
        settings: what to do; the same settings give the same weights, bit for bit, on the same machine and versions.
        tokenizer: of the training texts.
        progress: whether to show a bar.

    Returns:
        The model in evaluation mode, and the loss of each step (nats a token, over all tokens but the first).
    """
    losses = []
    with reproducible(settings.seed):
        model = Transformer(settings.config(len(tokenizer))).train()
        matrices = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim == 1]
        groups = [{"params": matrices, "weight_decay": settings.decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.98))
        texts = documents(settings.seed)
        for step in (bar := trange(settings.steps, desc="training", unit="step", disable=not progress)):
            for group in optimizer.param_groups:
                group["lr"] = settings.rate * schedule(step, settings)
            ids = pad([tokenizer(text)["input_ids"] for text in islice(texts, settings.batch)])
            # Padding is on the right, where causal attention keeps it from every real token: no mask is needed.
            logits = model(ids.clamp(min=0)[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=-1)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            optimizer.step()
            losses.append(loss.item())
            if step % 20 == 0:
                bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return model.eval(), losses


def schedule(step: int, settings: Settings) -> float:
    """The learning rate of a step as a share of the highest."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.5 * (1 + math.cos(math.pi * done))


def pad(rows: Sequence[Sequence[int]]) -> Tensor:
    """Ids [B, T], with -1 to the right of the shorter rows."""
    length = max(map(len, rows))
    return torch.tensor([[*row, *[-1] * (length - len(row))] for row in rows])


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """One thread, deterministic kernels and a seed, for as long as the block runs."""
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(strict)


def write(folder: Path, results: Path, files: dict[str, bytes]) -> None:
    """Write a model's files to `folder` and what came out to `results`: all to temporary names, then all renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    results.parent.mkdir(parents=True, exist_ok=True)
    targets = {results if name == "results.json" else folder / name: data for name, data in files.items()}
    for path, data in targets.items():
        path.with_name(path.name + ".part").write_bytes(data)
    for path in targets:
        os.replace(path.with_name(path.name + ".part"), path)


def commit() -> str | None:
    """The commit that is checked out, "-dirty" where files differ from it; None without git."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return asked.stdout.strip() or None


def as_json(data: dict[str, Any]) -> bytes:
    """JSON, one value a line."""
    return (json.dumps(data, indent=1) + "\n").encode()


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, measure, and only then write; interrupted before that, it leaves every file as it was."""
    parser = argparse.ArgumentParser(prog="python -m experiments.ioi_mini.train", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="40 steps and 20 prompt pairs: does it run?")
    parser.add_argument("--steps", type=int, help="batches to train on")
    parser.add_argument("--seed", type=int, help="of the weights and the training texts")
    parser.add_argument("--out", type=Path, help="folder for the model and results.json; default: the shipped files")
    given = parser.parse_args(arguments)
    settings = Settings()
    if given.quick:
        settings = replace(settings, steps=40, warmup=10, evaluate_pairs=20)
    changes = {name: value for name in ("steps", "seed") if (value := getattr(given, name)) is not None}
    settings = replace(settings, **changes)
    if settings.steps < 1:
        parser.error(f"--steps must be positive; got {settings.steps}")
    folder = given.out or (QUICK if given.quick else SHIPPED)
    if folder == SHIPPED and settings != Settings():
        parser.error("what ships is trained with the default settings: give --out FOLDER for other steps or seeds")
    results = (STUDY if folder == SHIPPED else folder) / "results.json"

    tokenizer = WordTokenizer(vocabulary())
    began, busy = time.perf_counter(), time.process_time()
    model, losses = train(settings, tokenizer)
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    with reproducible(settings.seed):
        measured = accuracies(ip.wrap(model, tokenizer), settings.evaluate_pairs, settings.evaluate_seed)

    weights = save(model.state_dict())
    every = max(1, settings.steps // 50)
    found = {
        "settings": asdict(settings),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()},
        "commit": commit(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
        "bytes": len(weights),
        "sha256": hashlib.sha256(weights).hexdigest(),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(busy, 1),
        "loss": {str(step): round(losses[step], 4) for step in [*range(0, settings.steps, every), settings.steps - 1]},
        "accuracy": measured,
    }
    config = {"model_type": "interp", **model.config.to_dict()}
    files = {"config.json": as_json(config), "tokenizer.json": tokenizer.to_json().encode()}
    write(folder, results, {**files, "model.safetensors": weights, "results.json": as_json(found)})
    for task, splits in measured.items():
        print(f"{task:16}", "  ".join(f"{split} {x['accuracy']:.2%}" for split, x in splits.items()))
    print(f"{folder}: {len(weights):,} bytes of weights, {seconds:.0f} s, {busy:.0f} s of them on the core")
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
