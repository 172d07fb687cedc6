"""POPE, MME and VLind-Bench with a model of one's own, decoded in several ways: answers, scores and a table.

python -m experiments.modality_priors.benchmarks pope --model llava-1.5-7b-hf --files coco_pope_*.json \\
    --images val2014 --methods plain causalmm vcd --out build/pope
python -m experiments.modality_priors.benchmarks mme --model FOLDER --files MME_release --out build/mme
python -m experiments.modality_priors.benchmarks vlind --model FOLDER --files data.json --images counterfactual \\
    --factual factual --out build/vlind

The model is a folder as `save_pretrained` writes it, with its processor; nothing is downloaded. An interrupted run goes
on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import interp as ip
from experiments.machine import commit, versions
from interp.attention import Branch, Decoder, Term, attention, debiased, relatives
from interp.attention.evaluation import (
    Item,
    answer,
    read_mme,
    read_pope,
    read_vlind,
    score_mme,
    score_pope,
    score_vlind,
)

Method = Callable[[ip.Model, Tensor], Decoder | None]
"""From the model and the columns bool [B, P] that are images' to a way of decoding; None for the model's own."""


def _replaced(model: ip.Model, _images: Tensor, stacks: Sequence[str | None]) -> Decoder:
    return Decoder(tuple(Term(Branch(attention(model, "random", stack=stack))) for stack in stacks))


METHODS: dict[str, Method] = {
    "plain": lambda _model, _images: None,
    "cut-off": lambda _model, _images: Decoder(),
    "causalmm": partial(_replaced, stacks=("vision", None)),
    "causalmm-vision": partial(_replaced, stacks=("vision",)),
    "causalmm-language": partial(_replaced, stacks=(None,)),
    "vcd": lambda _model, _images: relatives.vcd(),
    "no-image": lambda _model, images: relatives.without_image(images),
    "m3id": lambda _model, images: relatives.m3id(images),
    "pai": lambda model, images: relatives.pai(model, images),
    "dola": lambda model, _images: relatives.dola(model, range(0, model.n_layers // 2, 2)),
}


def load(folder: Path, dtype: str, device: str) -> tuple[ip.Model, Any]:
    """The model of a folder and its processor, which pads on the left."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    module = AutoModelForImageTextToText.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return ip.wrap(module.to(device).eval(), processor.tokenizer), processor


def prompt_of(processor: Any, question: str, prompt: str | None) -> str:
    """A question with the picture's token: by the template of a chat where there is one, or by a text of one's own."""
    if prompt is None and getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return (prompt or "{image}\n{question}").format(image=processor.image_token, question=question)


def ask(
    items: Sequence[Item],
    *,
    model: ip.Model,
    processor: Any,
    method: str,
    prompt: str | None,
    new: int,
    sample: bool,
    seed: int,
) -> list[str]:
    """What the model answers, decoded in some way."""
    from PIL import Image

    pictures = [Image.open(item.image).convert("RGB") for item in items]
    texts = [prompt_of(processor, item.question, prompt) for item in items]
    given = processor(text=texts, images=[[picture] for picture in pictures], padding=True, return_tensors="pt")
    taken = inspect.signature(model.module.forward).parameters
    # Some tokenizers make tensors that the model does not take.
    batch = {name: value.to(model.module.device) for name, value in given.items() if name in taken}
    batch = {name: v.to(model.module.dtype) if v.is_floating_point() else v for name, v in batch.items()}
    images = batch["input_ids"] == model.module.config.image_token_id
    options = {"max_new_tokens": new, "do_sample": sample, "pad_token_id": processor.tokenizer.pad_token_id}
    decoder = METHODS[method](model, images)
    # A draw is a function of the question, so that a run which was interrupted gives what it would have given.
    torch.manual_seed(seed + zlib.crc32(items[0].key.encode()))
    if decoder is None:
        out = model.module.generate(**batch, **options)
    else:
        with debiased(model, decoder, seed=seed):
            out = model.module.generate(**batch, **options)
    return processor.tokenizer.batch_decode(out[:, images.shape[1] :], skip_special_tokens=True)


def weights_of(folder: Path) -> str:
    """A digest of a folder's config, and of the names, sizes and first bytes of its other files."""
    digest = hashlib.sha256()
    for path in sorted(
        p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".bin", ".jinja", ".model")
    ):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + file.read(1 << 20))
    return digest.hexdigest()[:16]


def benchmark(given: argparse.Namespace, path: Path) -> tuple[list[Item], Callable[[dict[str, str]], dict[str, float]]]:
    """The questions of a file (a folder, of MME), and what scores their answers."""
    if given.benchmark == "pope":
        items = read_pope(path, given.images, suffix=given.suffix)
        return items, lambda said: asdict(score_pope(items[: given.limit], said))
    if given.benchmark == "mme":
        items = read_mme(path)

        def scored(said: dict[str, str]) -> dict[str, float]:
            found = score_mme(items, said)
            tasks = {task: one.score for task, one in found.tasks.items()}
            return {"perception": found.perception, "cognition": found.cognition, **tasks}

        return items, scored
    instances, items = read_vlind(path, given.images, given.factual)
    return items, lambda said: asdict(score_vlind(instances, items, said))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The scores as a table of Markdown, one line a file and method."""
    names = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    lines = [f"| file | method | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for row in rows:
        values = (f"{row['scores'][name]:.4g}" if name in row["scores"] else "" for name in names)
        lines.append(f"| {row['file']} | {row['method']} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=("pope", "mme", "vlind"))
    parser.add_argument("--model", type=Path, required=True, help="a folder of weights and a processor")
    parser.add_argument("--files", type=Path, nargs="+", required=True, help="as they are published; of MME the folder")
    parser.add_argument("--images", type=Path, help="the pictures of POPE, the counterfactual ones of VLind-Bench")
    parser.add_argument("--factual", type=Path, help="the factual pictures of VLind-Bench")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=["plain", "causalmm"])
    parser.add_argument("--prompt", help="with {image} and {question}; default the chat template of the processor")
    parser.add_argument("--suffix", default="", help="put after each question of POPE")
    parser.add_argument("--new", type=int, default=16, help="tokens of an answer, at most")
    parser.add_argument("--sample", action="store_true", help="draw tokens, as the paper does; default the likeliest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--limit", type=int, help="only so many questions of each file")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    lacking = {"pope": ("images",), "mme": (), "vlind": ("images", "factual")}[given.benchmark]
    for name in lacking:
        if getattr(given, name) is None:
            parser.error(f"{given.benchmark} needs --{name}")
    if given.limit is not None and given.benchmark != "pope":
        parser.error("--limit is for pope: the other benchmarks score groups of questions together")
    model, processor = load(given.model, given.dtype, given.device)
    same = {name: getattr(given, name) for name in ("prompt", "new", "sample", "seed", "dtype", "batch")}
    same |= {"weights": weights_of(given.model), "versions": versions()}
    rows = []
    for path in given.files:
        items, scored = benchmark(given, path)
        items = items[: given.limit]
        for method in given.methods:
            name = re.sub(r"[^\w.-]+", "_", f"{given.benchmark}-{path.stem}-{method}") + ".jsonl"
            asking = partial(
                ask, model=model, processor=processor, method=method, prompt=given.prompt, new=given.new,
                sample=given.sample, seed=given.seed,
            )  # fmt: skip
            said = answer(items, asking, given.out / name, batch=given.batch, setting=same | {"method": method})
            rows.append({"file": path.name, "method": method, "questions": len(items), "scores": scored(said)})
    report = {
        "benchmark": given.benchmark,
        "model": given.model.name,
        "setting": same,
        "rows": rows,
        "commit": commit(),
    }
    (given.out / f"{given.benchmark}.json").write_text(json.dumps(report, indent=1) + "\n")
    (given.out / f"{given.benchmark}.md").write_text(table(rows))
    print(table(rows), end="")
    return rows


if __name__ == "__main__":
    main()
