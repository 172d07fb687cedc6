"""The executors that run the user's own model under forward hooks: ``sequential``, one world at a time, and
``batched``, worlds one after another along the rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..budget import rows_per_pass
from ..program import Edits
from .forward import hooked_pass
from .job import Job, Outcome
from .session import INSIDE
from .sources import read_tapes


def run_hooked(job: Job, batch: bool) -> Iterator[list[Outcome]]:
    """Run worlds through the user's own model, and yield them a forward pass at a time.

    Args:
        job: what to run.
        batch: whether worlds of one shape share forward passes.

    Raises:
        UnfiredError: an intervention never fired.
    """
    model, worlds = job.model, job.worlds
    tapes = read_tapes(model, worlds, job.seed, job.expose, job.limit)
    inside = {item.site.layer for w in worlds for item in w.plan if item.site.name in INSIDE}
    expose = job.expose | {layer for layer in inside if layer is not None}
    groups: dict[Any, list[int]] = {}
    for index, world in enumerate(worlds):
        groups.setdefault((world.inputs.ids.shape if batch else index), []).append(index)
    for members in groups.values():
        first = worlds[members[0]].inputs
        fit = rows_per_pass(model, first, job.limit)
        if any(i.op.mixes for index in members for i in worlds[index].plan):
            fit = max(fit, len(first))
        step = min(fit, len(first))
        together = max(1, fit // step) if batch else 1
        for start in range(0, len(first), step):
            window = slice(start, min(start + step, len(first)))
            left = [index for index in members if not job.skip(index, window)]
            for at in range(0, len(left), together):
                chosen = left[at : at + together]
                edits = [Edits(worlds[i], model.sizes, tapes, job.seed, window) for i in chosen]
                session, _ = hooked_pass(model, edits, [job.reads] * len(chosen), expose)
                if job.meter is not None:
                    job.meter.whole(len(chosen) * len(first.ids[window]), first.width)
                for entry in edits:
                    entry.audit.require_fired()
                yield [
                    Outcome(index, window, tuple(kept[i] for i in range(len(job.reads))), entry.audit)
                    for index, kept, entry in zip(chosen, session.kept, edits, strict=True)
                ]
