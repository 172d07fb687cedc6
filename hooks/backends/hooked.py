"""The executors that run the user's own model under forward hooks: ``sequential``, one world at a time, and
``batched``, worlds one after another along the rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..budget import rows_per_pass
from ..plan.inputs import Inputs
from ..resolving import resolve
from .exposing import INSIDE
from .job import Job, Outcomes, Record
from .native import layer_of
from .passes import run_pass
from .sources import read_tapes


def run_hooked(job: Job, batch: bool) -> Iterator[Outcomes]:
    """Run worlds through the user's own model, and yield them a forward pass at a time.

    Args:
        job: what to run.
        batch: whether worlds of one shape share forward passes.

    Raises:
        UnfiredError: an intervention never fired.
    """
    network, worlds = job.network, job.worlds
    tapes = read_tapes(network, worlds, job.seed, job.expose, job.limit, graph=job.through_reads)
    expose = job.expose | {layer_of(item.site) for w in worlds for item in w.plan if item.site.name in INSIDE}
    groups: dict[Any, list[int]] = {}
    for index, world in enumerate(worlds):
        groups.setdefault((_shape(world.inputs) if batch else index), []).append(index)
    for members in groups.values():
        first = worlds[members[0]].inputs
        fit = rows_per_pass(network, first, job.limit)
        if any(i.op.mixes for index in members for i in worlds[index].plan):
            fit = max(fit, len(first))
        step = min(fit, len(first))
        together = max(1, fit // step) if batch else 1
        for window in job.windows(len(first), step):
            left = [index for index in members if job.skip is None or not job.skip(index, window)]
            for at in range(0, len(left), together):
                chosen = left[at : at + together]
                programs = [
                    resolve(worlds[i], network.sizes, tapes, device=network.device, seed=job.seed, window=window)
                    for i in chosen
                ]
                inputs = [worlds[i].inputs.rows(window) for i in chosen]
                run, logits = run_pass(network, programs, inputs, [job.reads] * len(chosen), expose, job.graph)
                if job.meter is not None:
                    job.meter.whole(len(chosen) * len(first.ids[window]), first.width)
                records = tuple(Record.of(p, state) for p, state in zip(programs, run.states, strict=True))
                for record in records:
                    record.audit.require_fired()
                outputs = logits.chunk(len(chosen))
                for w, index in enumerate(chosen):
                    yield Outcomes.of_one(index, window, run.values(w), records[w], outputs[w])


def _shape(inputs: Inputs) -> Any:
    """What inputs that share a pass have in common: rows and columns, of the text, a tower and what is encoded."""
    source = None if inputs.source is None else inputs.source.ids.shape
    return inputs.ids.shape, None if inputs.pictures is None else inputs.pictures.columns.width, source
