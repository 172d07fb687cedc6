"""Exemplars from drawings: train a small network to tell the characters of a folder apart, and keep its features.

python -m experiments.induction_formation.encode --images omniglot/images_background --out build/omniglot.safetensors
python -m experiments.induction_formation.run free --quick --features build/omniglot.safetensors --name omniglot

Every folder that holds images is a character, as in Omniglot (Lake et al. 2015: 1,623 characters, each drawn by 20
people). The network learns all of them; the study's exemplars are one drawing of each of 300, chosen by the seed.
Interrupted, the same command continues from the last checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from experiments.induction_formation.task import Task, mean_cosine
from hooks import InputsError, choice, digest_of, hash_counters
from interp.training.ensemble import Ensemble, from_modules

SIDE, WIDTH = 28, 512
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
BUILD = Path(__file__).parents[2] / "build"


def drawings(root: Path) -> Tensor:
    """Ink from 0 to 1 of every character's drawings, float32 [characters, drawings, 1, SIDE, SIDE].

    Characters are in order of their folders' paths; each gives as many drawings as the one that has fewest.

    Raises:
        InputsError: no folder with images, or one with a single drawing, which nothing generalises from.
    """
    found: dict[Path, list[Path]] = {}
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in SUFFIXES:
            found.setdefault(path.parent, []).append(path)
    fewest = min(map(len, found.values()), default=0)
    if fewest < 2:
        poorest = min(found, key=lambda folder: len(found[folder]), default=root)
        raise InputsError(
            f"{poorest} holds {fewest} images ({', '.join(SUFFIXES)}); each character needs a folder of two or more"
        )
    return torch.stack([torch.stack([_ink(path) for path in paths[:fewest]]) for paths in found.values()])


def _ink(path: Path) -> Tensor:
    with Image.open(path) as image:
        grey = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    return 1 - torch.tensor(list(grey.tobytes()), dtype=torch.float32).view(1, SIDE, SIDE) / 255


def network(characters: int, seed: int) -> nn.Sequential:
    """Three convolutions, features of `WIDTH` numbers, and a linear read-out of the character."""
    side = SIDE // 8
    with torch.random.fork_rng(devices=[]):  # the caller's draws stay what they are
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for channels in (1, 32, 64):
            wider = max(32, 2 * channels)
            layers += [nn.Conv2d(channels, wider, 3, padding=1), nn.GroupNorm(8, wider), nn.ReLU(), nn.MaxPool2d(2)]
        read = nn.Linear(128 * side * side, WIDTH), nn.ReLU(), nn.Linear(WIDTH, characters)
    return nn.Sequential(*layers, nn.Flatten(), *read)


def train(images: Tensor, steps: int, *, seed: int, batch: int, checkpoint: Path | None, device: str) -> nn.Sequential:
    """A network that tells characters apart, from the last checkpoint on.

    Args:
        images: [characters, drawings, 1, SIDE, SIDE].
        steps: updates of Adam, at 1e-3.
        seed: of the start and the batches.
        batch: drawings a step, each shifted by up to two pixels.
        checkpoint: where to keep one every 100 steps; None for nowhere.
        device: where to train.

    Raises:
        InputsError: no step or no drawing in one, or a checkpoint of other drawings or another size of batch.
        ResultError: a checkpoint of another seed.
    """
    if steps < 1 or batch < 1:
        raise InputsError(f"expected at least one step of at least one drawing, got {steps} steps of {batch}")
    characters, each = images.shape[:2]
    model = network(characters, seed)

    def loss(call: Callable[[Tensor], Tensor], data: dict[str, Tensor], step: Tensor) -> Tensor:
        row = torch.arange(batch, device=step.device)
        which = choice(characters, seed, step, row, 0)
        seen = data["images"][which, choice(each, seed, step, row, 1)]
        for axis in (2, 3):
            by = choice(5, seed, step, row, axis) - 2
            index = (torch.arange(SIDE, device=step.device) + by[:, None]) % SIDE
            seen = seen.gather(axis, index.view(batch, 1, *((SIDE, 1) if axis == 2 else (1, SIDE))).expand_as(seen))
        return nn.functional.cross_entropy(call(seen), which)

    run = Ensemble(lambda _: from_modules([model], loss, {"images": images[None]}), [seed], rate=1e-3, device=device)
    of = digest_of([images, batch])
    if checkpoint is not None and checkpoint.with_suffix(".json").exists() and run.load(checkpoint) != of:
        raise InputsError(f"{checkpoint}.json is of other images or batches: remove it, or give --out another name")
    bar = tqdm(total=steps, initial=run.step, unit="step", mininterval=5)
    while run.step < steps:
        todo = min(100, steps - run.step)
        losses = run.train(todo)
        bar.update(todo)
        bar.set_postfix(loss=f"{float(losses.mean()):.2f}")
        if checkpoint is not None:
            run.save(checkpoint, of)
    bar.close()
    model.load_state_dict(run.member(0))
    return model


@torch.no_grad()
def features(model: nn.Sequential, images: Tensor) -> Tensor:
    """Features before the read-out [n, WIDTH] of images [n, 1, SIDE, SIDE], rectified, divided by one number.

    They are not centred: the mean that all of them share is what makes the study's plateau. Their mean square is 1, as
    it is of the Gaussian vectors that they replace.
    """
    found = model[:-1](images)
    return found / found.square().mean().sqrt().clamp_min(1e-6)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, choose the characters, write their features."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="a folder of folders of drawings")
    parser.add_argument("--out", type=Path, required=True, help="the safetensors file for `run --features`")
    parser.add_argument("--classes", type=int, default=Task().n_exemplars, help="exemplars that the study needs")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    images = drawings(args.images)
    if not 0 < args.classes <= len(images):
        raise InputsError(f"{args.images} holds {len(images)} characters; the study needs {args.classes}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out.with_name(f"{args.out.stem}_encoder")
    options = {"seed": args.seed, "batch": args.batch, "checkpoint": checkpoint, "device": args.device}
    model = train(images, args.steps, **options).cpu()
    chosen = hash_counters(args.seed, 1, torch.arange(len(images))).argsort()[: args.classes]
    found = features(model, images[chosen, 0])
    save_file({"exemplars": found}, args.out)
    print(
        f"{args.out}: exemplars {[args.classes, WIDTH]}, of mean cosine {mean_cosine(found):.2f}, "
        f"from {len(images)} characters of {images.shape[1]} drawings"
    )


if __name__ == "__main__":
    main()
