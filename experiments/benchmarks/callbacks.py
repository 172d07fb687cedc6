"""What callbacks cost a training loop: a probe beside the same one by hand, and a plan held in every step.

python -m experiments.benchmarks.callbacks --out experiments/benchmarks/callbacks.json
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import interp as ip
from experiments import machine
from experiments.tables import table, times, written
from experiments.timing import interleaved, ratio


@dataclass(frozen=True)
class Training:
    """A small Llama that trains on random tokens, and what is measured on the way.

    Attributes:
        batch, width: sequences and tokens of a training step.
        rows, length: prompts that a probe runs on, random tokens of that length twice over.
        steps: of a run.
        every: steps between probes.
        repetitions: interleaved ones of every way.
        device: where it trains.
    """

    sizes: dict[str, int] = field(
        default_factory=lambda: {
            "vocab_size": 64,
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
    )
    batch: int = 64
    width: int = 32
    rows: int = 16
    length: int = 16
    steps: int = 40
    every: int = 10
    repetitions: int = 5
    device: str = "cpu"


def bare(model: LlamaForCausalLM, batches: Tensor, setting: Training) -> Tensor:
    """A loop without anything."""
    for optimizer, ids in _steps(model, batches):
        _update(model, optimizer, ids)
    return torch.empty(0)


def by_hand(model: LlamaForCausalLM, batches: Tensor, setting: Training) -> Tensor:
    """The prefix-matching score as a user would write it: eager attention for the probe, and its weights returned."""
    fixed, found = prompts(setting).to(setting.device), []

    def probe() -> None:
        model.set_attn_implementation("eager")
        model.eval()
        with torch.no_grad():
            patterns = torch.stack(model(fixed, output_attentions=True).attentions)
        model.train()
        model.set_attn_implementation("sdpa")
        query = torch.arange(setting.length, 2 * setting.length)
        found.append(patterns[:, :, :, query, query - setting.length + 1].mean((1, 3)))

    for step, (optimizer, ids) in enumerate(_steps(model, batches)):
        if step % setting.every == 0:
            probe()
        _update(model, optimizer, ids)
    probe()
    return torch.stack(found)


def probed(model: LlamaForCausalLM, batches: Tensor, setting: Training) -> Tensor:
    """The same score by a `Probe`."""
    wrapped, found = ip.wrap(model), []
    fixed = wrapped.inputs(prompts(setting))

    def score(model: ip.Model) -> float:
        found.append(ip.training.prefix_matching(model, fixed))
        return 0.0

    _monitored(wrapped, batches, [ip.training.Probe(score, every=setting.every, name="score")])
    return torch.stack(found)


def held(model: LlamaForCausalLM, batches: Tensor, setting: Training) -> Tensor:
    """A previous-token pattern held in every step."""
    _monitored(ip.wrap(model), batches, [ip.training.Clamp(ip.training.previous_token(0, head=0))])
    return torch.empty(0)


WAYS: dict[str, Callable[[LlamaForCausalLM, Tensor, Training], Tensor]] = {
    "bare": bare,
    "by hand": by_hand,
    "probed": probed,
    "clamped": held,
}


def prompts(setting: Training) -> Tensor:
    """Distinct random tokens, twice over [rows, 2 length]."""
    order = torch.Generator().manual_seed(1)
    one = [torch.randperm(setting.sizes["vocab_size"], generator=order)[: setting.length] for _ in range(setting.rows)]
    return torch.stack(one).repeat(1, 2)


def measure(setting: Training) -> dict[str, Any]:
    """Ratios of running times, and how far weights and scores differ."""
    torch.manual_seed(0)
    start: Any = LlamaForCausalLM(LlamaConfig(**setting.sizes, bos_token_id=None, eos_token_id=None)).train()
    start = start.to(setting.device)
    batches = torch.randint(setting.sizes["vocab_size"], (setting.steps, setting.batch, setting.width))
    batches = batches.to(setting.device)
    models: dict[str, LlamaForCausalLM] = {}

    def run(name: str) -> Tensor:
        models[name] = copy.deepcopy(start)
        return WAYS[name](models[name], batches, setting)

    seconds, found = interleaved(
        {name: lambda name=name: run(name) for name in WAYS}, setting.repetitions, setting.device
    )
    weights = {name: torch.cat([p.detach().flatten() for p in model.parameters()]) for name, model in models.items()}
    probes = len(found["probed"])
    one = {
        name: [probe - plain for probe, plain in zip(seconds[name], seconds["bare"], strict=True)]
        for name in ("probed", "by hand")
    }
    step = [s / setting.steps for s in seconds["bare"]]
    return {
        "probes": probes,
        "seconds": {name: _median(each) for name, each in seconds.items()},
        "over_bare": {name: ratio(seconds[name], seconds["bare"]) for name in WAYS if name != "bare"},
        "steps_a_probe": {name: _median(each) / probes / _median(step) for name, each in one.items()},
        "largest_difference_of_weights": float((weights["probed"] - weights["bare"]).abs().max()),
        "weights_that_a_clamp_moves": float((weights["clamped"] - weights["bare"]).abs().max()),
        "largest_difference_of_scores": float((found["probed"] - found["by hand"]).abs().max()),
        "scores": [float(found["probed"].min()), float(found["probed"].max())],
    }


def tables(record: dict[str, Any]) -> str:
    """The record in Markdown."""
    place, setting, found = record["machine"], record["setting"], record["callbacks"]
    names = {
        "by hand": f"a probe every {setting['every']} steps, by hand",
        "probed": f"a `Probe` every {setting['every']} steps",
        "clamped": "a `Clamp` in every step",
    }
    rows = []
    for name, title in names.items():
        over, steps = found["over_bare"][name], found["steps_a_probe"].get(name)
        rows.append([title, times(over, digits=2), "" if steps is None else f"{steps:.2f}"])
    versions = ", ".join(f"{name} {record['versions'][name]}" for name in ("python", "torch", "transformers"))
    return (
        f"Measured on {place['cpu']}, {place['threads']} threads; {versions}; commit `{record['commit'][:12]}`.\n\n"
        f"{table(['loop', 'over the bare loop', 'a probe, in training steps'], rows)}\n\n"
        f"Weights after {setting['steps']} steps with probes differ from those without by "
        f"{found['largest_difference_of_weights']:.0e}; the two probes' scores by at most "
        f"{found['largest_difference_of_scores']:.0e} of {found['scores'][1]:.2f}."
    )


def _steps(model: LlamaForCausalLM, batches: Tensor) -> Any:
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for ids in batches:
        yield optimizer, ids


def _update(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, ids: Tensor) -> Tensor:
    logits = model(ids).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def _monitored(model: ip.Model, batches: Tensor, callbacks: list[ip.training.Callback]) -> None:
    monitor = ip.training.Monitor(model, callbacks)
    for optimizer, ids in _steps(model.module, batches):  # type: ignore[arg-type]
        with monitor.step() as step:
            step.loss(_update(model.module, optimizer, ids))  # type: ignore[arg-type]
    monitor.finish()


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, save and print; or bring the README up to date with what was saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file that is written")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="few steps, to see that everything runs")
    parser.add_argument("--write-readme", action="store_true", help="measure nothing; put the table in README.md")
    args = parser.parse_args(argv)
    if args.write_readme:
        written(args.out, Path(__file__).parent / "README.md", tables)
        return
    torch.set_num_threads(args.threads)
    setting = replace(Training(), steps=6, every=2, repetitions=2) if args.quick else Training()
    record = {
        "setting": asdict(setting),
        "versions": machine.versions(),
        "commit": machine.commit(),
        "machine": machine.describe("cpu"),
        "callbacks": measure(setting),
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(tables(record))


if __name__ == "__main__":
    main()
