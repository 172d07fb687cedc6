"""Train every member of the study together, measure as it goes, and keep what came out.

python -m experiments.induction_formation.run --device cuda     # the paper's settings, on a GPU
python -m experiments.induction_formation.run --short           # the same for 24,000 steps, on two CPU cores
python -m experiments.induction_formation.run --quick           # a higher learning rate and few steps

Interrupted, the same command continues from the last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from experiments.induction_formation import toy
from experiments.induction_formation.measure import at_the_end, during
from experiments.induction_formation.members import program
from experiments.induction_formation.network import Shape
from experiments.induction_formation.settings import QUICK, SHORT, Roster, Settings, roster
from experiments.induction_formation.task import Task, exemplars
from experiments.machine import commit
from hooks import InputsError, digest_of
from interp.training.ensemble import Ensemble

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build"


def train(
    settings: Settings, people: Roster, table: torch.Tensor, work: Path, device: str, compile: bool, until: float
) -> Ensemble:
    """Train from the last checkpoint on, writing a line of measurements every so many steps to ``work/log.jsonl``.

    Args:
        settings: sizes.
        people: the members.
        table: exemplars [n_exemplars, d_input].
        work: folder of the log and the checkpoint.
        device: where to train.
        compile: whether to compile the update.
        until: seconds after which to stop at the next checkpoint.
    """
    work.mkdir(parents=True, exist_ok=True)
    log, checkpoint = work / "log.jsonl", work / "checkpoint"
    shape = Shape(d_input=table.shape[1])
    run = Ensemble(
        program(table, shape=shape, batch=settings.batch),
        people.members,
        rate=settings.rate,
        compile=compile,
        device=device,
    )
    seconds = 0.0
    of = digest_of([table])
    if checkpoint.with_suffix(".json").exists():
        note = run.load(checkpoint)
        if note["exemplars"] != of:
            raise InputsError(f"{checkpoint}.json was trained on other exemplars: give --name another one")
        seconds = note["seconds"]
        with open(log, "r+b") as file:  # what was measured after the checkpoint is measured again
            file.truncate(note["log_bytes"])
    else:
        log.write_bytes(b"")
    began = time.perf_counter()
    bar = tqdm(total=settings.steps, initial=run.step, unit="step", mininterval=5)
    while run.step < settings.steps:
        step = run.step
        line: dict[str, Any] = {"step": step, **during(run, settings, people, table, shape)}
        losses = run.train(settings.every)
        line["training_loss"] = rounded(losses.double().mean(0))
        with open(log, "a") as file:
            file.write(json.dumps(line) + "\n")
        bar.update(settings.every)
        if run.step % settings.checkpoint == 0 or run.step >= settings.steps:
            spent = seconds + time.perf_counter() - began
            run.save(checkpoint, {"exemplars": of, "log_bytes": log.stat().st_size, "seconds": spent})
            if time.perf_counter() - began > until:
                break
    bar.close()
    return run


def results(settings: Settings, people: Roster, run: Ensemble, table: torch.Tensor, work: Path) -> dict[str, Any]:
    """All that the figures need, as JSON data."""
    lines = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    note = json.loads((work / "checkpoint.json").read_text())["note"]
    loss = np.array([line["training_loss"] for line in lines]).T
    end = [line["step"] + settings.every for line in lines]
    below = loss < 0.4 * np.log(2)
    change = [end[int(row.argmax())] if row.any() else None for row in below]

    def series(indices: Sequence[int]) -> dict[str, Any]:
        return {"loss": [loss[i].tolist() for i in indices], "phase_change": [change[i] for i in indices]}

    logged = {name: [line[name] for line in lines] for name in ("splits", "strengths", "previous")}
    return {
        "setting": asdict(settings),
        "exemplars": {"shape": list(table.shape), "digest": note["exemplars"]},
        "machine": {"device": str(run.rates.device), "threads": torch.get_num_threads(), "cpu": platform.machine()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": commit(),
        "members": len(people.members),
        "seconds": round(note["seconds"], 1),
        "steps_at": end,
        "free": {**series(people.free), **logged},
        "progress": {k: [line["progress"][k] for line in lines] for k in lines[0]["progress"]},
        "alone": [series(each) for each in people.alone],
        "clamped": {name: series(each) for name, each in people.treated.items()},
        "sizes": [
            {"kind": kind, "classes": classes, "labels": labels, "phase_change": [change[i] for i in each],
             "final_loss": [loss[i, -1] for i in each]}
            for (kind, classes, labels), each in people.sizes.items()
        ],
        "end": at_the_end(run, people, table, Shape(d_input=table.shape[1])),
        "toy": toy.run(settings.seeds),
    }  # fmt: skip


def features(path: Path) -> torch.Tensor:
    """The exemplars [n_exemplars, width] of a safetensors file.

    Raises:
        InputsError: it holds none.
    """
    found = load_file(path)
    if "exemplars" not in found:
        raise InputsError(f"{path} holds {sorted(found)}; expected 'exemplars' [{Task().n_exemplars}, width]")
    return found["exemplars"]


def rounded(values: torch.Tensor) -> Any:
    """Numbers to four digits, nested as the tensor is."""
    return np.round(values.double().cpu().numpy(), 4).tolist()


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reduced = parser.add_mutually_exclusive_group()
    reduced.add_argument("--short", action="store_true", help="a reduced setting: 24,000 steps")
    reduced.add_argument("--quick", action="store_true", help="a reduced setting: a higher learning rate, few steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--eager", action="store_true", help="do not compile (no C++ compiler is needed)")
    parser.add_argument("--features", type=Path, help="safetensors with 'exemplars' [300, width] instead of Gaussians")
    parser.add_argument("--steps", type=int, help="updates, instead of the setting's")
    parser.add_argument("--rate", type=float, help="learning rate, instead of the setting's")
    parser.add_argument("--name", help="of the results, where the setting is not a named one")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop at the first checkpoint after these")
    args = parser.parse_args(argv)
    settings = QUICK if args.quick else SHORT if args.short else Settings()
    given = {name: getattr(args, name) for name in ("steps", "rate", "name") if getattr(args, name) is not None}
    if (given or args.features) and not args.name:
        parser.error("results of another setting, or of other exemplars, need a name of their own: give --name")
    settings = replace(settings, **given, reduced=settings.reduced or bool(given))
    if settings.steps < 1 or settings.steps % settings.every:
        parser.error(f"--steps is a multiple of {settings.every}, the steps between measurements; got {settings.steps}")
    torch.set_num_threads(args.threads)
    table = features(args.features) if args.features else exemplars(Task())
    people, work = roster(settings), BUILD / f"induction_{settings.name}"
    run = train(settings, people, table, work, args.device, not args.eager, args.minutes * 60)
    if run.step < settings.steps:
        print(f"stopped at step {run.step} of {settings.steps}; the same command continues")
        return
    out = HERE / "results" / f"{settings.name}.json"
    out.parent.mkdir(exist_ok=True)
    part = out.with_suffix(".part")
    part.write_text(json.dumps(results(settings, people, run, table, work)) + "\n")
    os.replace(part, out)
    print(f"{out}: {len(people.members)} members, {settings.steps} steps" + (", reduced" * settings.reduced))


if __name__ == "__main__":
    main()
