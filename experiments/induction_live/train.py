"""Watch heads become induction heads, live, while Hugging Face's Trainer trains a two-layer GPT-2."""

import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainingArguments

import interp as ip

STEPS, BATCH, FOLDER = int(sys.argv[1]) if len(sys.argv) > 1 else 2000, 64, "build/induction_live"


def example(seed: int) -> dict[str, torch.Tensor]:
    """32 random tokens that repeat with a random period; what is to be predicted begins with the second copy."""
    draw, period = torch.Generator().manual_seed(seed), 8 + seed % 9
    ids = torch.randperm(64, generator=draw)[:period].repeat(4)[:32]
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(32) < period, -100)}


def heads(model: ip.Model) -> dict[str, torch.Tensor]:
    """Layer 0: attention to the token before. Layer 1: attention to what came after this token's last occurrence."""
    previous, prefix = ip.training.previous_token_strength(model, fixed), ip.training.prefix_matching(model, fixed)
    return {"previous token": previous[0], "induction": prefix[1], "copying": ip.training.copying(model, fixed)[1]}


def show(found: dict[str, float], step: int) -> None:
    print(f"{step:5}  " + (" ".join(f"{x:5.2f}" for x in found.values()) if len(found) > 1 else str(found)), flush=True)


torch.manual_seed(0)
shape = {"vocab_size": 64, "n_positions": 32, "n_embd": 64, "n_layer": 2, "n_head": 4}
gpt2 = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=None, eos_token_id=None))
model = ip.wrap(gpt2)
fixed = ip.training.repeated_tokens(model, rows=16, length=16)
drop = ip.training.PhaseChange(0.5, plateau=(100, 300), smooth=10)
monitor = ip.training.Monitor(model, [ip.training.Probe(heads, 100), drop], log=f"{FOLDER}/log.jsonl", logger=show)
quiet = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False}
options = TrainingArguments(FOLDER, max_steps=STEPS, learning_rate=3e-3, per_device_train_batch_size=BATCH,
                            logging_steps=1, **quiet)  # fmt: skip
trainer = Trainer(gpt2, options, train_dataset=[example(seed) for seed in range(STEPS * BATCH // 4)])
trainer.pop_callback(PrinterCallback)
trainer.add_callback(ip.training.trainer_callback(monitor))
print(" step  layer 0: previous token   layer 1: induction        layer 1: copying, in nats    (4 heads each)")
trainer.train()
