"""Watch heads become induction heads, live, while Hugging Face's Trainer trains a two-layer Llama."""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

import interp as ip
from interp import training as tr

STEPS, BATCH, FOLDER = int(sys.argv[1]) if len(sys.argv) > 1 else 800, 64, "build/induction_live"


def example(seed: int) -> dict[str, torch.Tensor]:
    """32 tokens, 4 to 16 random ones over and over; what is to be predicted begins with their second copy."""
    period = 4 + seed % 13
    ids = torch.randperm(64, generator=torch.Generator().manual_seed(seed))[:period].repeat(8)[:32]
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(32) <= period, -100)}


def heads(model: ip.Model) -> dict[str, torch.Tensor]:
    previous, prefix = tr.previous_token_strength(model, fixed), tr.prefix_matching(model, fixed)
    return {"previous token": previous[0], "induction": prefix[1], "copying": tr.copying(model, fixed)[1]}


def show(found: dict[str, float], step: int) -> None:
    print(f"{step:5}  " + (" ".join(f"{x:5.2f}" for x in found.values()) if len(found) > 1 else str(found)), flush=True)


torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
model = ip.wrap(LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.05, bos_token_id=None, eos_token_id=None)))
fixed = tr.repeated_tokens(model, rows=16, length=16)
callbacks = [tr.Probe(heads, every=50), tr.PhaseChange(0.5, plateau=(50, 150), smooth=10)]
monitor = tr.Monitor(model, callbacks, log=f"{FOLDER}/log.jsonl", logger=show)
quiet = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "logging_steps": 1}
options = TrainingArguments(FOLDER, max_steps=STEPS, learning_rate=3e-3, per_device_train_batch_size=BATCH, **quiet)
data = [example(seed) for seed in range(STEPS * BATCH)]
trainer = Trainer(model.module, options, train_dataset=data, callbacks=[tr.trainer_callback(monitor)])
trainer.pop_callback(PrinterCallback)
print(" step  layer 0: previous token   layer 1: induction        layer 1: copying, in nats    (4 heads each)")
trainer.train()
