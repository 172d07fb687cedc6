"""How fast the causal importance of a cache is measured, and what eviction costs: ``python -m
experiments.benchmarks.kv``.

Exact effects of every unit against a loop that deletes one unit at a time (a forward pass of the suffix against a
cache whose unit is masked, timed on a sample of units); gradients against a forward pass; what scoring and letting go
add to a chunk, and prefill in chunks with eviction against without; decoding from a compressed cache against a full
one. The file is written anew after each of these.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

import interp as ip
from experiments import machine, tables
from experiments.timing import interleaved, ratio
from hooks import Tail
from interp.kv import policies
from interp.kv.asked import asked, units_of
from interp.kv.exact import worlds_at_once
from interp.kv.measure import Measure
from interp.kv.seam import Attending

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
def exact(model: ip.Model, suffix: int, layers: list[int] | None, repetitions: int = 3) -> dict[str, Any]:
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

    if repetitions > 1:
        ours()
    runs = {"ours": ours, "loop": lambda: loop(model, ids, sample)}
    seconds, found = interleaved(runs, repetitions, "cpu")
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


def gradients(model: ip.Model, context: int, suffix: int = 4, repetitions: int = 3) -> dict[str, Any]:
    """First-order scores of every unit, in forward passes of the same text."""
    ids = ids_for(model, context + suffix)
    tokens = torch.tensor([ids])

    def forward() -> None:
        with torch.no_grad():
            model.module(tokens, use_cache=False, logits_to_keep=suffix)

    def ours() -> None:
        ip.kv.kv_effects(model, ids[:context], ids[context:], how="gradient", progress=False)

    forward(), ours()
    seconds, _ = interleaved({"ours": ours, "forward": forward}, repetitions, "cpu")
    return {
        "what": "gradient", "context": context, "seconds": statistics.median(seconds["ours"]),
        "forward_times": ratio(seconds["ours"], seconds["forward"]),
    }  # fmt: skip


def eviction(model: ip.Model, context: int, budget: int, chunk: int, repetitions: int = 3) -> Iterator[dict[str, Any]]:
    """What a chunk costs with each policy, and how much of that is scoring and letting go; and with all keys kept."""
    inputs = model.inputs(torch.tensor([ids_for(model, context)]))
    heads = ip.kv.RetainingHeads.for_model(model)
    some = [policies.streaming_llm(), policies.h2o(), policies.snapkv(), policies.key_norm(), heads.policy()]
    after, choosing = Attending.after, {}

    def timed(self: Attending, *given: Any) -> None:
        start = time.perf_counter()
        after(self, *given)
        assert self.policy is not None
        choosing[self.policy.name] = choosing.get(self.policy.name, 0.0) + time.perf_counter() - start

    runs = {p.name: (lambda p=p: ip.kv.prefill(model, inputs, p, budget, chunk=chunk)) for p in some}
    runs["full cache"] = lambda: ip.kv.prefill(model, inputs, None, None, chunk=chunk)
    for run in runs.values():
        run()
    with patch.object(Attending, "after", timed):
        seconds, _ = interleaved(runs, repetitions, "cpu")
    chunks = -(-context // chunk)
    plain = statistics.median(seconds["full cache"])
    for name, each in seconds.items():
        taken = statistics.median(each)
        yield {
            "what": "eviction", "policy": name, "context": context, "budget": budget, "chunk": chunk,
            "milliseconds_a_chunk": 1000 * taken / chunks, "of_full_cache": taken / plain,
            "overhead_milliseconds_a_chunk": 1000 * choosing.get(name, 0.0) / repetitions / chunks,
        }  # fmt: skip


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


def _of_small(suffixes: list[int], length: int) -> Iterator[dict[str, Any]]:
    """What is measured of the small Llama, one row of JSON data after another."""
    model = small()
    yield exact(model, suffixes[0], [0])
    for suffix in suffixes:
        yield exact(model, suffix, None)
    yield gradients(model, length)
    yield decoding(model, 4 * length, length // 8)
    yield from eviction(model, length, length // 8, length // 16)


def _of_smollm2(suffixes: list[int], length: int, whole: bool) -> Iterator[dict[str, Any]]:
    """The same of SmolLM2-135M, each timed once but for short ones; every layer where the `whole` is asked for."""
    model = ip.load("smollm2-135m")
    for suffix in suffixes:
        yield exact(model, suffix, [model.n_layers // 2], 1)
    yield gradients(model, length, repetitions=1)
    yield decoding(model, length, length // 8)
    yield from eviction(model, length // 2, length // 8, length // 16, 1)
    if whole:  # tens of minutes
        yield exact(model, suffixes[0], None, 1)


def report(record: dict[str, Any]) -> str:
    """What was measured as tables."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in record["rows"]:
        rows.setdefault(row["what"], []).append(row)
    told = [f"Measured with {record['machine']['threads']} thread(s) of {record['machine']['cpu']}."]
    told.append(
        tables.table(
            ("exact effects of", "layers", "suffix", "units", "seconds", "loop, seconds", "times faster"),
            [
                (
                    r["model"], "all" if r["layers"] == "all" else ", ".join(map(str, r["layers"])), r["suffix"],
                    f"{r['units']:,}", f"{r['seconds']:.3g}", f"{r['loop_seconds_extrapolated']:.3g}",
                    tables.times(r["times"]),
                )
                for r in rows.get("exact", [])
            ],
        )
    )  # fmt: skip
    told += [
        f"{r['model']}: gradients of every unit in a context of {r['context']:,} tokens take "
        f"{tables.times(r['forward_times'])} forward passes."
        for r in rows.get("gradient", [])
    ]
    told += [
        f"{r['model']}: decoding from {r['budget']:,} of {r['context']:,} keys is {tables.times(r['times'])} times as "
        f"fast as from all ({r['milliseconds_a_token']['compressed']:.3g} and "
        f"{r['milliseconds_a_token']['full']:.3g} milliseconds a token)."
        for r in rows.get("decoding", [])
    ]
    told.append(
        tables.table(
            ("prefill of", "policy", "context", "budget", "chunk", "ms a chunk", "of it overhead", "of full cache"),
            [
                (
                    r["model"], r["policy"], r["context"], r["budget"], r["chunk"], f"{r['milliseconds_a_chunk']:.3g}",
                    f"{r['overhead_milliseconds_a_chunk']:.2g}", f"{r['of_full_cache']:.2f}",
                )
                for r in rows.get("eviction", [])
            ],
        )
    )  # fmt: skip
    return "\n\n".join(told)


def main() -> None:
    """Measure and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--skip-smollm2", action="store_true")
    parser.add_argument("--suffixes", type=int, nargs="+", default=[4, 8, 16], help="in tokens")
    parser.add_argument("--length", type=int, default=4096, help="of the context of all but exact effects, in tokens")
    parser.add_argument("--whole", action="store_true", help="every layer of SmolLM2, too")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--write-readme", action="store_true", help="measure nothing; put the tables in README.md")
    given = parser.parse_args()
    if given.write_readme:
        tables.written(given.out, given.out.with_name("README.md"), report)
        return
    torch.set_num_threads(given.threads)
    started, rows = time.time(), []
    parts = {"small Llama": _of_small(given.suffixes, given.length)}
    if not given.skip_smollm2:
        parts["SmolLM2-135M"] = _of_smollm2(given.suffixes, given.length, given.whole)
    for name, part in parts.items():
        for row in part:
            rows.append({"model": name, **row})
            machine.write(given.out, {"rows": rows, "seconds": round(time.time() - started, 1)})
    print(given.out)


if __name__ == "__main__":
    main()
