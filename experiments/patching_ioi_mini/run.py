"""Run the main job on 64 pairs and keep its numbers: ``python -m experiments.patching_ioi_mini.run``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import interp as ip
from interp.cli import shipped_task
from interp.demo import run_demo

HERE = Path(__file__).parent


def main() -> None:
    """Sweep, confirm, and write ``results/``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    torch.manual_seed(0)
    model, task = ip.load("ioi-mini"), shipped_task(options.pairs)
    report = run_demo(model, task)
    options.out.mkdir(parents=True, exist_ok=True)
    clean, corrupt = model.inputs(task.clean), model.inputs(task.corrupt)
    metric = ip.logit_diff(list(task.answer), list(task.foil))
    for name, cells in (
        ("residual", ip.grid("resid_pre", layer="all", pos="all")),
        ("heads", ip.grid("z", layer="all", head="all")),
    ):
        ip.sweep(model, clean, corrupt, cells, metric=metric).save(options.out / name)
        ip.attribution(model, clean, corrupt, cells, metric=metric).save(options.out / f"{name}_first_order")
    place = ip.site("pattern", layer=report.heads[0]["layer"], head=report.heads[0]["head"])
    pattern = model.run(clean, capture=place).tape[place][:, 0].mean(0)
    data = {
        "report": json.loads(json.dumps(report.__dict__, default=lambda value: value.__dict__)),
        "pattern": {"site": str(place), "tokens": list(clean.labels(0)), "mean_over_pairs": pattern.tolist()},
    }
    (options.out / "report.json").write_text(json.dumps(data, indent=1) + "\n")
    print(report)


if __name__ == "__main__":
    main()
