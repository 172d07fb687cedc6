"""One version's side of `versions`: reads the names of tasks, and says of each how long it took and what came out.

It uses nothing but the public functions that every version has, and is run by its path, with the version to measure on
PYTHONPATH.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import interp as ip

METRIC = ip.logit_diff(5, 9)


def gpt2(layers: int = 12, width: int = 768, heads: int = 12, vocabulary: int = 50257) -> Any:
    """A GPT-2 of GPT-2 small's size with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": width, "n_layer": layers, "n_head": heads, "vocab_size": vocabulary}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).eval()


def tasks(model: ip.Model) -> dict[str, Callable[[], Any]]:
    """What is measured, by name; each gives numbers that all versions are to give."""
    vocabulary, layers = model.architecture.vocabulary, model.n_layers

    def prompts(tokens: int, shared: int) -> tuple[ip.Inputs, ip.Inputs]:
        draw = torch.Generator().manual_seed(0)
        clean = torch.randint(vocabulary, (1, tokens), generator=draw)
        corrupt = (clean + torch.randint(1, vocabulary, clean.shape, generator=draw)) % vocabulary
        corrupt[:, :shared] = clean[:, :shared]
        return model.inputs(clean), model.inputs(corrupt)

    def sweep(grid: ip.Grid, tokens: int, shared: int, **options: Any) -> Callable[[], Any]:
        clean, corrupt = prompts(tokens, shared)
        return lambda: ip.sweep(model, clean, corrupt, grid, metric=METRIC, progress=False, **options).effect

    def edges() -> Callable[[], Any]:
        clean, corrupt = prompts(16, 0)
        late = [reader.name for reader in ip.paths.Graph.of(model).readers if (reader.layer or 0) >= layers - 2]
        return lambda: ip.paths.edge_sweep(model, clean, corrupt, metric=METRIC, readers=late, progress=False).effect

    def scores() -> Callable[[], Any]:
        clean, corrupt = prompts(16, 0)
        return lambda: ip.paths.edge_scores(model, clean, corrupt, metric=METRIC, method="eap").effect

    def forwards(plan: Any, how: str) -> Callable[[], Any]:
        inputs, _ = prompts(64, 0)

        def run() -> Any:
            found = []
            for _ in range(10):
                if how == "run":
                    found.append(model.run(inputs, plan).logits[0, -1, :50])
                else:
                    with model.apply(plan), torch.no_grad():
                        found.append(model.module(input_ids=inputs.ids, use_cache=False).logits[0, -1, :50])
            return torch.stack(found)

        return run

    residuals, heads = ip.grid("resid_pre", layer="all", pos="all"), ip.grid("z", layer="all", head="all")
    middle = layers // 2
    steering = ip.steer(ip.site("resid_post", layer=middle), torch.ones(model.architecture.width))
    found = {
        f"{name}, {tokens} tokens, from token {shared + 1}": sweep(grid, tokens, shared)
        for tokens, shared in ((16, 0), (16, 3), (64, 0))
        for name, grid in (("resid_pre", residuals), ("heads", heads))
    }
    pattern = ip.grid("pattern", layer=[middle], head="all")
    found["patterns of a layer, 16 tokens"] = sweep(pattern, 16, 0)
    found["resid_pre, 16 tokens, batched"] = sweep(
        ip.grid("resid_pre", layer=[middle], pos="all"), 16, 0, executor="batched"
    )
    found["every edge into the last two layers, 16 tokens"] = edges()
    found["EAP scores, 16 tokens"] = scores()
    found["10 runs under steering, 64 tokens"] = forwards(steering, "run")
    found["10 calls under steering, 64 tokens"] = forwards(steering, "apply")
    return found


def certificate(model: ip.Model) -> list[float]:
    """What comparing the model's description with the model costs, once: forward passes of 16 tokens, five times."""
    from hooks import choose

    inputs, ratios = model.inputs(torch.arange(16)[None]), []
    for _ in range(5):
        fresh = ip.wrap(model.module)
        first, again = (_seconds(partial(choose, fresh, [ip.World(inputs)])) for _ in range(2))
        ratios.append((first - again) / _seconds(partial(model.run, inputs)))
    return ratios


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Answer on standard output until standard input ends."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    model = ip.wrap(gpt2(**json.loads(sys.argv[1])))
    known = tasks(model)
    print(json.dumps({"tasks": list(known)}), flush=True)
    known["certificate"] = lambda: certificate(model)
    for line in sys.stdin:
        run = known[line.strip()]
        start = time.perf_counter()
        values = run()
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "values": torch.as_tensor(values).double().tolist()}), flush=True)


if __name__ == "__main__":
    main()
