"""Train shapes-vlm: a LLaVA with a small CLIP tower and a small Llama, on pictures with planted priors.

python -m experiments.modality_priors.train                 # seed 0, into interp/models/weights/shapes-vlm
python -m experiments.modality_priors.train --seeds 0 1 2 3 4 --out build/shapes-vlm   # what the study compares
python -m experiments.modality_priors.train --seeds 0 1 2 3 4 --balanced --out build/shapes-vlm-balanced
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.modality_priors.pictures import COLOURS, NONE, SIDE, Scenes, draw_hints, draw_scenes, log_prior, paint
from experiments.modality_priors.questions import (
    DESCRIBE,
    IDS,
    PATCH,
    WORDS,
    Batch,
    batch,
    claim_question,
    colour_question,
    description,
)

ROOT = Path(__file__).parent.parent.parent
SHIPPED = ROOT / "interp" / "models" / "weights" / "shapes-vlm"
STEPS, ROWS, RATE = 900, 64, 5e-3


def make(seed: int = 0) -> Any:
    """A model with random weights."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    tower = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE,
        patch_size=PATCH, projection_dim=32,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, pad_token_id=IDS["<pad>"], bos_token_id=IDS["<s>"],
        eos_token_id=IDS["</s>"],
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=tower, text_config=text, image_token_id=IDS["<image>"], vision_feature_layer=-1,
        image_seq_length=(SIDE // PATCH) ** 2, pad_token_id=IDS["<pad>"],
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


def training_batch(rows: int, seed: int, planted: bool) -> Batch:
    """New rows: three in five ask for a colour, one in five makes a claim, one in five wants a description.

    One picture in eight is plain grey, one in eight a texture without a shape, and one question for a colour in eight
    has no picture at all. Hints go with one question for a colour in four.
    """
    draw = torch.Generator().manual_seed(seed)
    scenes = draw_scenes(rows, seed + 1, planted)
    kind = torch.randint(5, (rows,), generator=draw)
    fate = torch.randint(8, (rows,), generator=draw)
    scenes, has_image = _faded(scenes, torch.where(kind < 3, fate, NONE), seed + 2, planted)
    hints = torch.where(
        (torch.rand(rows, generator=draw) < 0.25) & (kind < 3), draw_hints(scenes.colour, seed + 3), NONE
    )
    wrong = (scenes.colour + torch.randint(1, len(COLOURS), (rows,), generator=draw)) % len(COLOURS)
    claimed = torch.where(torch.rand(rows, generator=draw) < 0.5, scenes.colour, wrong)
    questions, answers = [], []
    shapes, colours, textures = scenes.shape.tolist(), scenes.colour.tolist(), scenes.texture.tolist()
    for number, (hint, claim) in enumerate(zip(hints.tolist(), claimed.tolist(), strict=True)):
        shape, colour = shapes[number], colours[number]
        if kind[number] < 3:
            questions.append(colour_question(shape, hint))
            answers.append(COLOURS[colour])
        elif kind[number] == 3:
            questions.append(claim_question(shape, claim))
            answers.append("yes" if claim == colour else "no")
        else:
            questions.append(DESCRIBE)
            answers.append(description(shape, colour, textures[number]))
    return batch(questions, paint(scenes, seed + 4)[0], has_image, answers)


def _faded(scenes: Scenes, fate: Tensor, seed: int, planted: bool) -> tuple[Scenes, Tensor]:
    """Take textures, shapes or whole pictures away; the colours are then drawn anew from what is left."""
    plain, empty, absent = fate == 0, fate == 1, fate == 2
    texture = torch.where(plain | absent, NONE, scenes.texture)
    faded = Scenes(scenes.shape, texture, scenes.colour, ~(plain | empty | absent))
    draw = torch.Generator().manual_seed(seed)
    again = torch.multinomial(log_prior(faded, planted).exp(), 1, generator=draw)[:, 0]
    return Scenes(scenes.shape, texture, torch.where(plain | absent, again, scenes.colour), faded.shown), ~absent


def train(seed: int, planted: bool = True, steps: int = STEPS, rows: int = ROWS) -> tuple[Any, dict[str, Any]]:
    """Train one model; returns it with what there is to say of the run."""
    model = make(seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.05)
    began, losses = time.perf_counter(), []
    for step in range(steps):
        given = training_batch(rows, 1_000_000_000 + seed * 100_000_000 + 10 * step, planted)
        loss = model(**given.arguments(labels=True)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 100 == 0 or step == steps - 1:
            recent = losses[-100:]
            print(
                f"seed {seed} step {step}: loss {sum(recent) / len(recent):.4f} ({time.perf_counter() - began:.0f} s)",
                flush=True,
            )
    recent = losses[-200:]
    return model.eval(), {
        "seed": seed,
        "planted": planted,
        "steps": steps,
        "rows": rows,
        "loss": sum(recent) / len(recent),
    }


def save(model: Any, folder: Path, about: dict[str, Any]) -> None:
    """Write weights, config and tokenizer; `AutoModelForImageTextToText.from_pretrained` reads them."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(about, indent=1) + "\n")


def tokenizer() -> Any:
    """One id a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(dict(IDS), unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        additional_special_tokens=["<image>"],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--balanced", action="store_true", help="plant no prior")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--out", type=Path, help="a folder for several; default the weights that ship with the package")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for seed in given.seeds:
        folder = SHIPPED if given.out is None else given.out / str(seed)
        if given.out is not None and (folder / "training.json").exists():
            continue
        model, about = train(seed, not given.balanced, given.steps, given.rows)
        save(model, folder, about)


if __name__ == "__main__":
    main()
