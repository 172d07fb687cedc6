"""Memory and speed of prefill at a fixed budget: ``python -m experiments.kv_importance.long``.

On a CPU a small random Llama reads up to 32k tokens; with ``--device cuda`` one of the shape of Llama-3.1-8B (random,
bfloat16) reads up to 128k at the published settings. Every length runs in a process of its own, whose peak memory is
its own.
"""

from __future__ import annotations

import argparse
import re
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import interp as ip
from experiments import machine
from interp.kv import policies

RESULTS = Path(__file__).parent / "results"
SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8,
         "num_key_value_heads": 2, "vocab_size": 256}  # fmt: skip
LARGE = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 128256}  # fmt: skip
SETTINGS = {
    "cpu": {"lengths": (8192, 16384, 32768), "eviction": ip.kv.Eviction(1024, chunk=512, stabilizers=128, local=100)},
    "cuda": {"lengths": (32768, 131072), "eviction": ip.kv.Eviction(16384, chunk=1024, stabilizers=2500, local=100)},
}


def model_for(device: str) -> ip.Model:
    """A random Llama, on its device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LARGE if device == "cuda" else SMALL
    config = LlamaConfig(
        **shape, max_position_embeddings=1 << 18, rope_theta=500000.0, bos_token_id=None, eos_token_id=None
    )
    torch.manual_seed(0)
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
        try:
            return ip.wrap(LlamaForCausalLM(config).eval())
        finally:
            torch.set_default_dtype(before)


def one(device: str, length: int, evicting: bool, threads: int) -> dict[str, Any]:
    """Peak memory above the model's, tokens a second of prefill, and milliseconds a token of decoding."""
    torch.set_num_threads(threads)
    model = model_for(device)
    generator = torch.Generator().manual_seed(0)
    inputs = model.inputs(torch.randint(0, 256, (1, length), generator=generator))
    heads = ip.kv.RetainingHeads.for_model(model, 1024 if device == "cuda" else None)
    heads = heads.to(model.dtype)
    eviction = SETTINGS[device]["eviction"]
    small = model.inputs(inputs.ids[:, :256])
    ip.kv.prefill(model, small, policies.streaming_llm(), 128, chunk=128)  # what the first call loads is no part of it
    before = _held(device)
    start = time.perf_counter()
    if evicting:
        cache = ip.kv.prefill(model, inputs, heads.policy(), eviction)
    else:
        cache = ip.kv.prefill(model, inputs, None, None, chunk=eviction.chunk)
    _wait(device)
    prefill = time.perf_counter() - start
    step, count = torch.tensor([[5]], device=model.device), 16
    start = time.perf_counter()
    with torch.no_grad(), ip.kv.attending(cache):
        for _ in range(count):
            model.module(step, past_key_values=cache, use_cache=True)
    _wait(device)
    return {
        "tokens": length, "evicting": evicting, "kept": cache.layers[0].width - count,
        "peak_megabytes": (_peak(device) - before) / 1e6, "cache_megabytes": cache.bytes / 1e6,
        "prefill_tokens_a_second": length / prefill,
        "decoding_milliseconds": 1000 * (time.perf_counter() - start) / count,
    }  # fmt: skip


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _held(device: str) -> float:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    return _status("VmRSS")


def _peak(device: str) -> float:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else float("nan")


def main() -> None:
    """Measure and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens, in place of those of the device")
    parser.add_argument("--out", type=Path, default=RESULTS, help="a folder")
    given = parser.parse_args()
    rows, path = [], given.out / f"long_{given.device}.json"
    for length in given.lengths or SETTINGS[given.device]["lengths"]:
        for evicting in (True, False):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                rows.append(pool.submit(one, given.device, length, evicting, given.threads).result())
            print(rows[-1], flush=True)
            machine.write(path, {"rows": rows}, given.device)
    print(path)


if __name__ == "__main__":
    main()
