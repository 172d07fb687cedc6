"""What a knock-out costs in long texts: seconds and memory of a forward pass, by tokens.

``python -m experiments.benchmarks.long --out experiments/benchmarks/long.json``
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import interp as ip
from experiments.machine import describe, versions

LENGTHS = (8192, 32768)


def measure(tokens: int, plan: bool, device: str) -> dict[str, float]:
    """Seconds and peak memory in MB of one pass of a small Llama, with a key knocked out in its last layer or none.

    The peak is of the process on a CPU, above what it took before the pass; on a GPU of what torch had allocated.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokens,
    )
    made: Any = LlamaForCausalLM(config)
    module = made.eval().to(device)
    model = ip.wrap(module)
    ids = torch.randint(256, (1, tokens), device=device)
    forbid = ip.knockout(ip.site("scores", 1, head=1, key_pos=0)).at(pos=slice(1, None))
    module.model(ids[:, :64], use_cache=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    with torch.no_grad():
        if plan:
            with model.apply(forbid) as audit:
                module(input_ids=ids, use_cache=False, logits_to_keep=1)
            assert audit[0].status == "fired"
        else:
            module(input_ids=ids, use_cache=False, logits_to_keep=1)
    seconds = time.perf_counter() - start
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if device != "cpu":
        peak = torch.cuda.max_memory_allocated() / 2**20
    return {"seconds": seconds, "megabytes": peak}


def tables(record: dict[str, Any]) -> str:
    """The record as the table of the README."""
    lines = [
        "| tokens | seconds | MB | with a knock-out, seconds | MB | a pattern alone would take |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["lengths"]:
        plain, forbidden, pattern = row["plain"], row["knockout"], 2 * 4 * row["tokens"] ** 2 / 2**20
        lines.append(
            f"| {row['tokens']:,} | {plain['seconds']:.1f} | {plain['megabytes']:.0f} | {forbidden['seconds']:.1f} | "
            f"{forbidden['megabytes']:.0f} | {pattern:,.0f} MB |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure each in a process of its own, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("TOKENS", "PLAN"), help="measure one, in this process")
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(measure(int(args.one[0]), args.one[1] == "knockout", args.device)))
        return
    rows: list[dict[str, Any]] = []
    record = {"machine": describe(args.device), "versions": versions(), "lengths": rows}
    for tokens in args.lengths:
        row: dict[str, Any] = {"tokens": tokens}
        for kind in ("plain", "knockout"):
            command = [sys.executable, "-m", "experiments.benchmarks.long", "--device", args.device, "--one"]
            done = subprocess.run([*command, str(tokens), kind], capture_output=True, text=True, check=True)
            row[kind] = json.loads(done.stdout.splitlines()[-1])
            print(f"{tokens} tokens, {kind}: {row[kind]}", flush=True)
        rows.append(row)
        if args.out is not None:
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(tables(record))


if __name__ == "__main__":
    main()
