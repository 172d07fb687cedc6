"""Watch heads become induction heads, live, while Hugging Face's Trainer trains a two-layer GPT-2."""

import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainingArguments

import interp as ip
from interp import training as tr

STEPS, BATCH, FOLDER = int(sys.argv[1]) if len(sys.argv) > 1 else 2000, 64, "build/induction_live"


def example(seed: int) -> dict[str, torch.Tensor]:
    """32 random tokens that repeat with a random period; what is to be predicted begins with the second copy."""
    ids = torch.randperm(64, generator=torch.Generator().manual_seed(seed))[: 8 + seed % 9].repeat(4)[:32]
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(32) < 8 + seed % 9, -100)}


def heads(model: ip.Model) -> dict[str, torch.Tensor]:
    previous, prefix = tr.previous_token_strength(model, fixed), tr.prefix_matching(model, fixed)
    return {"previous token": previous[0], "induction": prefix[1], "copying": tr.copying(model, fixed)[1]}


def show(found: dict[str, float], step: int) -> None:
    print(f"{step:5}  " + (" ".join(f"{x:5.2f}" for x in found.values()) if len(found) > 1 else str(found)), flush=True)


torch.manual_seed(0)
model = ip.wrap(GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=64, n_layer=2, n_head=4)))
fixed = tr.repeated_tokens(model, rows=16, length=16)
callbacks = [tr.Probe(heads, every=100), tr.PhaseChange(0.5, plateau=(100, 300), smooth=10)]
monitor = tr.Monitor(model, callbacks, log=f"{FOLDER}/log.jsonl", logger=show)
quiet = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "logging_steps": 1}
options = TrainingArguments(FOLDER, max_steps=STEPS, learning_rate=3e-3, per_device_train_batch_size=BATCH, **quiet)
data = [example(seed) for seed in range(STEPS * BATCH // 4)]
trainer = Trainer(model.module, options, train_dataset=data, callbacks=[tr.trainer_callback(monitor)])
trainer.pop_callback(PrinterCallback)
print(" step  layer 0: previous token   layer 1: induction        layer 1: copying, in nats    (4 heads each)")
trainer.train()
