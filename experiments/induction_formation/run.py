"""Train the members of the study's figures together, measure as it goes, and keep what came out.

python -m experiments.induction_formation.run free      # figures 3, 4 and what 5b trains freely
python -m experiments.induction_formation.run clamped   # figures 5b and 6 under clamps
python -m experiments.induction_formation.run shared    # classes that share a mean: the plateau; progress
python -m experiments.induction_formation.run sizes     # figure 6, normal training
python -m experiments.induction_formation.run free --quick   # ten times the learning rate for a tenth of the updates

Each is as long as the paper's runs, or stops once nothing more is read of its members. Interrupted, the same command
continues from the last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
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

from experiments.induction_formation.measure import at_the_end, during, rounded
from experiments.induction_formation.members import program
from experiments.induction_formation.network import Shape
from experiments.induction_formation.settings import FIGURES, TRAININGS, VARIED, Roster, Setting, quick, roster
from experiments.induction_formation.task import Task, exemplars, mean_cosine
from experiments.machine import commit
from hooks import InputsError, ModelError, digest_of
from interp.training.ensemble import Ensemble

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build"
CHANGED = 0.4 * math.log(2)
"""The phase change is the first update at which the training loss is below this, in nats."""
AFTER = 1.2
"""Where only phase changes are read, members train this many times as long as the last of a condition took."""


def train(
    setting: Setting, people: Roster, table: torch.Tensor, work: Path, device: str, compile: bool, until: float
) -> Ensemble:
    """Train from the last checkpoint on, writing a line of measurements every so many updates to ``work/log.jsonl``.

    Members of which nothing more is read at the start are left as they are, and only the others go on.

    Args:
        setting: sizes.
        people: the members.
        table: exemplars [n_exemplars, d_input], or several tables of them.
        work: folder of the log and the checkpoint.
        device: where to train.
        compile: whether to compile the update.
        until: seconds after which to stop at the next checkpoint; with 0, nothing is trained.

    Returns:
        every member, as far as it was trained.

    Raises:
        InputsError: a checkpoint of other exemplars, or of another setting.
        ModelError: a loss that is not finite.
    """
    work.mkdir(parents=True, exist_ok=True)
    log, checkpoint = work / "log.jsonl", work / "checkpoint"
    shape, rate = Shape(d_input=table.shape[-1]), setting.rate
    build = program(table, shape=shape, batch=setting.batch, labels=max(m.task.n_labels for m in people.members))
    whole = Ensemble(build, people.members, rate=rate, device=device)
    seconds = 0.0
    of = {"exemplars": digest_of([table]), "batch": setting.batch, "every": setting.every, "window": setting.window}
    if checkpoint.with_suffix(".json").exists():
        note = whole.load(checkpoint)
        if other := {name: note[name] for name, value in of.items() if note[name] != value}:
            raise InputsError(f"{checkpoint}.json was trained with other {', '.join(other)}: give --name another one")
        seconds = note["seconds"]
        with open(log, "r+b") as file:  # what was measured after the checkpoint is measured again
            file.truncate(note["log_bytes"])
    else:
        log.write_bytes(b"")
    went = going(setting, people, changes(lines_of(work), setting), whole.step)
    if not went or not until:
        return whole
    run = Ensemble(build, [people.members[i] for i in went], rate=rate, compile=compile, device=device)
    everyone = range(len(went))
    run.take_over(whole, went, everyone)
    began, done = time.perf_counter(), False
    bar = tqdm(total=setting.updates, initial=run.step, unit="update", mininterval=5)
    while not done:
        line: dict[str, Any] = {"step": run.step, "members": went, **during(run, went, setting, people, table, shape)}
        losses = run.train(setting.every).double()
        if lost := [m for m, fine in zip(went, losses.isfinite().all(0).tolist(), strict=True) if not fine]:
            raise ModelError(
                f"between updates {line['step']} and {run.step}, the losses of members {lost} are not finite"
            )
        line["windows"] = rounded(losses.view(-1, setting.window, losses.shape[1]).mean(1))
        with open(log, "a") as file:
            file.write(json.dumps(line) + "\n")
        bar.update(setting.every)
        if run.step % setting.checkpoint == 0 or run.step >= setting.updates:
            spent = seconds + time.perf_counter() - began
            whole.take_over(run, everyone, went)
            whole.save(checkpoint, {**of, "log_bytes": log.stat().st_size, "seconds": spent})
            late = time.perf_counter() - began > until
            done = late or not going(setting, people, changes(lines_of(work), setting), run.step)
    bar.close()
    return whole


def lines_of(work: Path) -> list[dict[str, Any]]:
    """What has been measured so far."""
    return [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]


def curves(lines: Sequence[dict[str, Any]], members: int) -> list[list[float]]:
    """Each member's training losses by window, for as long as it was trained."""
    found: list[list[float]] = [[] for _ in range(members)]
    for line in lines:
        for window in line["windows"]:
            for member, loss in zip(line["members"], window, strict=True):
                found[member].append(loss)
    return found


def changes(lines: Sequence[dict[str, Any]], setting: Setting) -> list[int | None]:
    """The update of each member's phase change: the end of the first window whose mean training loss is below it."""
    members = 1 + max((member for line in lines for member in line["members"]), default=-1)
    below = [[loss < CHANGED for loss in curve] for curve in curves(lines, members)]
    return [setting.window * (curve.index(True) + 1) if any(curve) else None for curve in below]


def going(setting: Setting, people: Roster, changed: Sequence[int | None], step: int) -> list[int]:
    """The members of which more is read: of a condition that is shorter than the paper's, with changes not long past.

    Args:
        setting: sizes.
        people: the members.
        changed: the update of each member's phase change, None where it has had none.
        step: updates so far.
    """
    found = set()
    for condition in people.conditions:
        times = [changed[i] if i < len(changed) else None for i in condition.members]
        past = FIGURES[condition.figure].change_only and all(t is not None and step >= AFTER * t for t in times)
        if step < setting.of(condition.figure) and not past:
            found.update(condition.members)
    return sorted(found)


def results(setting: Setting, people: Roster, run: Ensemble, table: torch.Tensor, work: Path) -> dict[str, Any]:
    """All that the figures need, as JSON data."""
    lines = lines_of(work)
    note = json.loads((work / "checkpoint.json").read_text())["note"]
    changed, per = changes(lines, setting), setting.every // setting.window
    losses = [np.reshape(curve, (-1, per)).mean(1) for curve in curves(lines, len(people.members))]
    tables = table if table.ndim == 3 else table[None]
    names = [name for name in lines[0] if name not in ("step", "members", "windows")]
    logged = {name: [line[name] for line in lines if name in line] for name in names}
    found = {
        "setting": asdict(setting),
        "reduced": setting.reduced,
        "exemplars": {
            "shape": list(table.shape),
            "digest": note["exemplars"],
            "cosine": [
                [cosine, round(mean_cosine(rows), 4)] for cosine, rows in zip(setting.cosines, tables, strict=True)
            ],
        },
        "machine": {"device": str(run.rates.device), "threads": torch.get_num_threads(), "cpu": platform.machine()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": commit(),
        "seconds": round(note["seconds"], 1),
        "updates": run.step,
        "figures": {
            figure: {"paper": FIGURES[figure].updates, "asked": setting.of(figure)} for figure in setting.figures
        },
        "updates_at": [line["step"] + setting.every for line in lines],
        "members": [
            {
                "seed": member.seed,
                "batches": member.data_seed,
                "phase_change": change,
                "loss": np.round(curve, 4).tolist(),
            }
            for member, change, curve in zip(people.members, changed, losses, strict=True)
        ],
        "conditions": [asdict(condition) for condition in people.conditions],
        "during": logged,
    }
    for condition in people.find("3 and 4", "all heads"):
        found["end"] = at_the_end(run, condition.members, table, Shape(d_input=table.shape[-1]))
    return found


def features(path: Path) -> torch.Tensor:
    """The exemplars [n_exemplars, width] of a safetensors file.

    Raises:
        InputsError: it holds none, of another number, or not finite ones.
    """
    found, rows = load_file(path), Task().n_exemplars
    if "exemplars" not in found:
        raise InputsError(f"{path} holds {sorted(found)}; expected 'exemplars' [{rows}, width]")
    table = found["exemplars"]
    if table.ndim != 2 or len(table) != rows or not table.is_floating_point() or not bool(table.isfinite().all()):
        raise InputsError(
            f"{path}: exemplars are finite numbers [{rows}, width]; got {table.dtype} {list(table.shape)}"
        )
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("training", choices=list(TRAININGS), help="whose figures")
    parser.add_argument("--quick", action="store_true", help="a reduced setting: a higher rate and fewer updates")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--eager", action="store_true", help="do not compile (no C++ compiler is needed)")
    parser.add_argument("--features", type=Path, help="safetensors with 'exemplars' [300, width] instead of Gaussians")
    parser.add_argument(
        "--vary", choices=VARIED, default="both", help="what differs between seeds; the rest is seed 0's"
    )
    parser.add_argument("--seeds", type=int, help="members a condition, in all figures, instead of the setting's")
    parser.add_argument("--name", help="of the results, where the setting is not a named one")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop at the first checkpoint after these")
    args = parser.parse_args(argv)
    setting = TRAININGS[args.training]
    setting = quick(setting) if args.quick else setting
    own = args.features is not None or args.vary != "both" or args.seeds is not None
    if own and not args.name:
        parser.error("results of another setting, or of other exemplars, need a name of their own: give --name")
    if args.seeds is not None:
        if args.seeds < 1:
            parser.error(f"--seeds is at least 1, got {args.seeds}")
        counts = {name: args.seeds for name in ("seeds", "clamp_seeds", "size_seeds", "alone_seeds")}
        setting = replace(setting, **counts)
    if args.features:
        table = features(args.features)
        setting = replace(setting, cosines=setting.cosines[:1])
    else:
        table = torch.stack([exemplars(Task(), cosine=cosine) for cosine in setting.cosines])
    setting = replace(setting, vary=args.vary, name=args.name or setting.name)
    torch.set_num_threads(args.threads)
    people, work = roster(setting), BUILD / f"induction_{setting.name}"
    run = train(setting, people, table, work, args.device, not args.eager, args.minutes * 60)
    out = HERE / "results" / f"{setting.name}.json"
    out.parent.mkdir(exist_ok=True)
    part = out.with_suffix(".part")
    part.write_text(json.dumps(results(setting, people, run, table, work)) + "\n")
    os.replace(part, out)
    more = "" if run.step >= setting.updates else "; the same command continues, where more is to be read"
    print(f"{out}: {len(people.members)} members, {run.step:,} updates of {setting.batch} sequences{more}")


if __name__ == "__main__":
    main()
