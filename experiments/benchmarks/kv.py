"""How fast the causal importance of a cache is measured, and what eviction costs: ``python -m
experiments.benchmarks.kv``.

Exact effects of every unit against a loop that deletes one unit at a time (a forward pass of the suffix against a
cache whose
unit is masked, timed on a sample of units); gradients against a forward pass; prefill in chunks with eviction
against without;
decoding from a compressed cache against a full one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import interp as ip
from experiments import machine
from experiments.timing import interleaved, ratio
from hooks import Tail
from interp.kv import policies
from interp.kv.asked import asked, units_of
from interp.kv.exact import worlds_at_once
from interp.kv.measure import Measure

CONTEXT, SAMPLE = 256, 24


def small() -> ip.Model:
    """A Llama of the shape that the study of marked recall has."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=56, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1 << 18, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return ip.wrap(LlamaForCausalLM(config).eval())


def ids_for(model: ip.Model, count: int) -> list[int]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(4, model.architecture.vocabulary, (count,), generator=generator).tolist()


@torch.no_grad()
def loop(model: ip.Model, ids: list[int], units: list[tuple[int, int, int]]) -> np.ndarray:
    """Effects on the suffix's negative log-likelihood, one unit and one forward pass of the suffix at a time."""
    from transformers import DynamicCache

    cache: Any = DynamicCache(config=model.module.config)
    tokens = torch.tensor([ids])
    suffix, targets = tokens[:, CONTEXT:], tokens[0, CONTEXT + 1 :]
    n = suffix.shape[1]
    model.module(tokens[:, :CONTEXT], past_key_values=cache, use_cache=True, logits_to_keep=1)
    groups = model.architecture.blocks[0].attention.q.heads // model.architecture.blocks[0].attention.k.heads
    causal = torch.zeros(1, 1, n, CONTEXT + n).masked_fill(~torch.ones(n, CONTEXT + n).tril(CONTEXT).bool(), -torch.inf)

    def run(unit: tuple[int, int, int] | None) -> float:
        handle = None
        if unit is not None:
            layer, head, token = unit
            mask = causal.repeat(1, groups * model.architecture.blocks[0].attention.k.heads, 1, 1)
            mask[0, head * groups : (head + 1) * groups, :, token] = -torch.inf
            module = model.architecture.blocks[layer].attention.module

            def put(_module, args, kwargs):
                return args, {**kwargs, "attention_mask": mask.to(model.dtype)}

            handle = module.register_forward_pre_hook(put, with_kwargs=True)
        logits = model.module(suffix, past_key_values=cache, use_cache=True).logits[0, :-1]
        cache.crop(-n)
        if handle is not None:
            handle.remove()
        return float(torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum"))

    base = run(None)
    return np.array([run(unit) - base for unit in units])


@torch.no_grad()
def exact(model: ip.Model, suffix: int, layers: list[int] | None) -> dict[str, Any]:
    """Every unit of some layers (all where None) by worlds, against the loop on a sample of the same units."""
    ids = ids_for(model, CONTEXT + suffix)
    chosen = list(range(model.n_layers)) if layers is None else layers
    generator = np.random.default_rng(0)
    heads = model.architecture.blocks[0].attention.k.heads
    sample = [
        (int(generator.choice(chosen)), int(generator.integers(heads)), int(generator.integers(CONTEXT)))
        for _ in range(SAMPLE)
    ]
    (row,) = asked(model, ids[:CONTEXT], ids[CONTEXT:])
    units = units_of(("layer", "head", "token"), model, CONTEXT)

    def ours() -> np.ndarray:
        tail = Tail(model, row.ids, row.context, row.queries)
        measure = Measure.of(("nll",), row.targets, tail.logits)
        base = float(measure(tail.run()).double().sum())
        seen, _ = tail.seen()
        effect = np.zeros((model.n_layers, heads, CONTEXT))
        for layer in chosen:
            for h, k, logits in tail.without_each(layer, seen[layer], worlds_at_once(model, tail)):
                effect[layer, h.numpy(), k.numpy()] = measure(logits)[0].double().sum(1).numpy() - base
        return effect

    ours()
    seconds, found = interleaved({"ours": ours, "loop": lambda: loop(model, ids, sample)}, 3, "cpu")
    count = len(chosen) * heads * CONTEXT
    whole = [s * count / SAMPLE for s in seconds["loop"]]
    mine = np.array([found["ours"][unit] for unit in sample])
    assert units.shape == found["ours"].shape
    return {
        "what": "exact", "suffix": suffix, "layers": "all" if layers is None else layers, "units": count,
        "seconds": statistics.median(seconds["ours"]), "loop_seconds_extrapolated": statistics.median(whole),
        "sample": SAMPLE, "times": ratio(whole, seconds["ours"]), "apart": float(np.abs(mine - found["loop"]).max()),
        "largest": float(np.abs(mine).max()),
    }  # fmt: skip


def gradients(model: ip.Model, context: int, suffix: int = 4) -> dict[str, Any]:
    """First-order scores of every unit, in forward passes of the same text."""
    ids = ids_for(model, context + suffix)
    tokens = torch.tensor([ids])

    def forward() -> None:
        with torch.no_grad():
            model.module(tokens, use_cache=False, logits_to_keep=suffix)

    def ours() -> None:
        ip.kv.kv_effects(model, ids[:context], ids[context:], how="gradient", progress=False)

    forward(), ours()
    seconds, _ = interleaved({"ours": ours, "forward": forward}, 3, "cpu")
    return {
        "what": "gradient", "context": context, "seconds": statistics.median(seconds["ours"]),
        "forward_times": ratio(seconds["ours"], seconds["forward"]),
    }  # fmt: skip


def eviction(model: ip.Model, context: int, budget: int, chunk: int) -> list[dict[str, Any]]:
    """What a chunk costs with each policy, above one whose keys are all kept as long as they fit."""
    inputs = model.inputs(torch.tensor([ids_for(model, context)]))
    heads = ip.kv.RetainingHeads.for_model(model)
    some = [policies.streaming_llm(), policies.h2o(), policies.snapkv(), policies.key_norm(), heads.policy()]
    # The same keys and queries at every chunk, and no choice among them: a budget's worth of the last ones.
    runs = {p.name: (lambda p=p: ip.kv.prefill(model, inputs, p, budget, chunk=chunk)) for p in some}
    runs["full cache"] = lambda: ip.kv.prefill(model, inputs, None, None, chunk=chunk)
    for run in runs.values():
        run()
    seconds, _ = interleaved(runs, 3, "cpu")
    chunks = -(-context // chunk)
    plain = statistics.median(seconds["full cache"])
    return [
        {
            "what": "eviction", "policy": name, "context": context, "budget": budget, "chunk": chunk,
            "milliseconds_a_chunk": 1000 * statistics.median(each) / chunks,
            "of_full_cache": statistics.median(each) / plain,
        }
        for name, each in seconds.items()
    ]  # fmt: skip


@torch.no_grad()
def decoding(model: ip.Model, context: int, budget: int, tokens: int = 32) -> dict[str, Any]:
    """Seconds a token from a compressed cache and from a full one."""
    inputs = model.inputs(torch.tensor([ids_for(model, context)]))
    step = torch.tensor([[5]])

    def decode(cache: Any) -> None:
        with ip.kv.attending(cache):
            for _ in range(tokens):
                model.module(step, past_key_values=cache, use_cache=True)

    caches = {
        "compressed": ip.kv.prefill(model, inputs, policies.key_norm(), budget, chunk=1024),
        "full": ip.kv.prefill(model, inputs, None, None, chunk=1024),
    }
    seconds, _ = interleaved({name: (lambda c=c: decode(c)) for name, c in caches.items()}, 3, "cpu")
    return {
        "what": "decoding", "context": context, "budget": budget,
        "milliseconds_a_token": {name: 1000 * statistics.median(each) / tokens for name, each in seconds.items()},
        "times": ratio(seconds["full"], seconds["compressed"]),
    }  # fmt: skip


def main() -> None:
    """Measure and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--skip-smollm2", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    started, model = time.time(), small()
    rows = [{"model": "small Llama", **exact(model, 4, layers)} for layers in ([0], None)]
    rows += [{"model": "small Llama", **exact(model, n, None)} for n in (8, 16)]
    rows.append({"model": "small Llama", **gradients(model, 4096)})
    rows += [{"model": "small Llama", **row} for row in eviction(model, 4096, 512, 256)]
    rows.append({"model": "small Llama", **decoding(model, 16384, 512)})
    if not given.skip_smollm2:
        real = ip.load("smollm2-135m")
        middle = real.n_layers // 2
        rows.append({"model": "SmolLM2-135M", **exact(real, 4, [middle])})
        # Layers all the way up, every fifth: a mean over them is one over all.
        spread = list(range(2, real.n_layers, 5))
        rows += [{"model": "SmolLM2-135M", **exact(real, n, spread)} for n in (4, 8, 16)]
        rows.append({"model": "SmolLM2-135M", **gradients(real, 1024)})
    found = {
        "rows": rows, "seconds": round(time.time() - started, 1), "machine": machine.describe("cpu"),
        "versions": machine.versions(), "commit": machine.commit(),
    }  # fmt: skip
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(given.out)


if __name__ == "__main__":
    main()
