"""Training an ensemble beside a loop over separate eager runs, in member-updates a second.

python -m experiments.induction_formation.benchmark --out experiments/induction_formation/benchmark.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments import machine
from experiments.induction_formation.by_hand import logits_under
from experiments.induction_formation.members import Member, initial_params, program
from experiments.induction_formation.module import InductionModel
from experiments.induction_formation.network import Shape
from experiments.induction_formation.task import Batch, Task, draw, exemplars, source
from experiments.induction_formation.treatments import Treatment, only_head
from experiments.tables import table, written
from experiments.timing import interleaved, ratio, timed
from interp.training.ensemble import Ensemble

TARGET = 8
JAX = (110, 210)
"""Updates a second of the authors' JAX code, which trains one member, on two CPU cores: the slowest and the fastest."""
TREATMENTS = (
    only_head(0),
    only_head(0, first_layer=True),
    only_head(0, match=0),
    only_head(0, copy=0),
    only_head(0, first_layer=True, copy=0),
    Treatment(previous_token=(0,)),
    Treatment(no_previous_token=tuple(range(8))),
    Treatment(ablate_first=(0,), preserve=("q", "k")),
)
"""The treatments of the members, in turn."""


@dataclass(frozen=True)
class Setting:
    """Sizes of everything.

    Attributes:
        members: how many, one entry a measurement.
        batch: sequences a step and member.
        steps: of the ensemble in a repetition; the loop takes a fifth of them for each of at most `looped` members.
        looped: members of the loop that are really run; their time is extrapolated by the number of members, since
            each costs the same.
        compared: first steps over which losses are compared.
        treatments: whether members are treated, one entry a measurement.
        compile: whether the compiled ensemble is measured, or the eager one alone.
    """

    members: tuple[int, ...] = (1, 8, 32)
    batch: int = 32
    steps: int = 100
    looped: int = 8
    compared: int = 10
    treatments: tuple[bool, ...] = (False, True)
    compile: bool = True
    repetitions: int = 5
    rate: float = 1e-3
    device: str = "cpu"
    threads: int = 2
    quick: bool = False


class Loop:
    """One member as a user would train it: the plain module, eager, torch's Adam."""

    def __init__(self, member: Member, treatment: Treatment, exemplar_table: Tensor, setting: Setting) -> None:
        start = {name: value[0] for name, value in initial_params([member], Shape()).items()}
        self.model = InductionModel.of(start, exemplar_table).to(setting.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=setting.rate)
        self.treatment, self.setting, self.step = treatment, setting, 0
        where = source([member.task], [member.seed])
        self.where = {name: value.to(setting.device) for name, value in where.items()}

    def train(self, steps: int) -> list[Tensor]:
        """Losses of some steps; batches are drawn as the ensemble draws them."""
        found = []
        for _ in range(steps):
            batch = Batch(*(value[0] for value in draw(self.where, self.step, self.setting.batch)))
            if self.treatment == Treatment():
                logits = self.model(batch.ids(len(self.model.embed.exemplars)))[:, -1]
            else:
                logits = logits_under(self.model, batch, self.treatment)
            loss = torch.nn.functional.cross_entropy(logits, batch.answer)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.step += 1
            found.append(loss.detach())
        return found


def measure_size(setting: Setting, members: int, treated: bool) -> dict[str, Any]:
    """Member-steps a second of the compiled ensemble, the eager one and the loop, and how far their losses differ."""
    exemplar_table = exemplars(Task()).float()
    held = [TREATMENTS[seed % len(TREATMENTS)] if treated else Treatment() for seed in range(members)]
    people = [Member(seed, treatment) for seed, treatment in enumerate(held)]
    build = program(exemplar_table, batch=setting.batch)
    options: dict[str, Any] = {"rate": setting.rate, "device": setting.device}
    ways = ("compiled", "eager") if setting.compile else ("eager",)
    together = {name: Ensemble(build, people, compile=name == "compiled", **options) for name in ways}
    pairs = list(zip(people, held, strict=True))[: setting.looped]
    loops = [Loop(member, treatment, exemplar_table, setting) for member, treatment in pairs]
    losses = {"loop": torch.stack([torch.stack(loop.train(setting.compared)) for loop in loops], 1)}
    took = {}
    for name, ensemble in together.items():
        took[name], found = timed(partial(ensemble.train, setting.compared), setting.device)
        losses[name] = found[:, : len(loops)]

    loop_steps = max(1, setting.steps // 5)
    runs: dict[str, Callable[[], Any]] = {
        name: partial(ensemble.train, setting.steps) for name, ensemble in together.items()
    }
    runs["loop"] = lambda: [loop.train(loop_steps) for loop in loops]
    seconds, _ = interleaved(runs, setting.repetitions, setting.device)
    done = {name: setting.steps * members for name in together} | {"loop": loop_steps * len(loops)}
    per = {name: [s / done[name] for s in each] for name, each in seconds.items()}
    return {
        "members": members,
        "clamped": treated,
        "looped": len(loops),
        "member_steps_per_second": {name: 1 / sorted(each)[len(each) // 2] for name, each in per.items()},
        "over_loop": {name: ratio(per["loop"], per[name]) for name in together},
        "first_call_seconds": took[ways[0]],
        "largest_difference": {name: float((losses[name] - losses["loop"]).abs().max()) for name in together},
        "loss_range": [float(losses["loop"].min()), float(losses["loop"].max())],
    }


def measure(setting: Setting, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Everything, as JSON data; `save` is given what there is after each part."""
    start = time.perf_counter()
    torch.set_num_threads(setting.threads)
    record: dict[str, Any] = {
        "setting": asdict(setting),
        "versions": machine.versions(),
        "commit": machine.commit(),
        "machine": machine.describe(setting.device),
        "sizes": [],
    }
    for treated in setting.treatments:
        for members in setting.members:
            record["sizes"].append(measure_size(setting, members, treated))
            save(record)
            seconds = time.perf_counter() - start
            print(f"{seconds:4.0f} s  {record['sizes'][-1]['member_steps_per_second']}", flush=True)
    return record


def tables(record: dict[str, Any]) -> str:
    """The record in Markdown."""
    place = record["machine"]
    where = place["gpu"] or f"{place['cpu']}, {place['threads']} threads"
    head = ["members", "treatments", "compiled", "eager", "loop", "compiled / loop", "target", "largest difference"]
    rows = []
    for size in record["sizes"]:
        speed, over = size["member_steps_per_second"], size["over_loop"]["compiled"]
        rows.append(
            [
                size["members"],
                "mixed" if size["clamped"] else "none",
                *(f"{speed[name]:,.0f}" for name in ("compiled", "eager", "loop")),
                f"{over['ratio']:.1f} ({over['min']:.1f} to {over['max']:.1f})",
                "" if size["members"] < TARGET or record["setting"]["quick"] else f"≥ {TARGET}",
                f"{size['largest_difference']['compiled']:.1e}",
            ]
        )
    versions = ", ".join(f"{name} {record['versions'][name]}" for name in ("python", "torch"))
    compile_seconds = max(size["first_call_seconds"] for size in record["sizes"])
    fastest = max(size["member_steps_per_second"]["compiled"] for size in record["sizes"])
    return (
        f"Measured on {where}; {versions}; commit `{record['commit'][:12]}`. "
        f"First calls, which compile or find kernels in the compiler's cache, took at most {compile_seconds:.0f} s.\n\n"
        f"Member-updates a second:\n\n{table(head, rows)}\n\n"
        "In brackets: the smallest and the largest ratio of a repetition. Differences are of the losses of the first "
        f"{record['setting']['compared']} steps, in nats. The authors' JAX code, which trains one member, does "
        f"{JAX[0]} to {JAX[1]} updates a second on two such cores; the fastest ensemble here does "
        f"{fastest / JAX[1]:.0f} to {fastest / JAX[0]:.0f} times as many member-updates."
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, save and print; or bring the README up to date with what was saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file that is written")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--members", type=int, nargs="+", help="instead of 1, 8 and 32; 1024 for a GPU")
    parser.add_argument("--repetitions", type=int, help="of each measurement, instead of 5")
    parser.add_argument("--treatments", choices=["none", "mixed"], help="one of the two, instead of both")
    parser.add_argument("--eager", action="store_true", help="without the compiled ensemble, and without a table")
    parser.add_argument("--quick", action="store_true", help="few steps of few members, to see that everything runs")
    parser.add_argument("--write-readme", action="store_true", help="measure nothing; put the table in README.md")
    args = parser.parse_args(argv)
    if args.write_readme:
        written(args.out, Path(__file__).parent / "README.md", tables)
        return
    setting = Setting(device=args.device, threads=args.threads, compile=not args.eager)
    if args.quick:
        setting = replace(setting, members=(1, 2), steps=5, repetitions=2, compared=3, quick=True)
    if args.members:
        setting = replace(setting, members=tuple(args.members))
    if args.repetitions:
        setting = replace(setting, repetitions=args.repetitions)
    if args.treatments:
        setting = replace(setting, treatments=(args.treatments == "mixed",))
    record = measure(setting, lambda record: _write(args.out, record))
    if setting.compile:
        print(tables(record))


def _write(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
