"""The copy-on-write executor: worlds on one input are computed together, and only where they differ from the base.

A world joins at the layer and at the positions where its plan first changes a value. From then on it carries the tokens
that differ (`Packed`); every step of a block that works token by token runs on one long row of them, and attention
alone fills in the rest of a world's keys and values from the base. Tokens that nothing read depends on are dropped, so
the last layer is computed only at the positions that are read.

The base is the same program, run for one world in which every token differs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...budget import bytes_per_token
from ...meter import Meter
from ...models.architecture import Architecture
from ...plan.inputs import Inputs
from ...plan.plan import Origin, World
from ...plan.region import Region, entire, resolve
from ...plan.sites import Site, execution_order
from ...plan.tape import Tape
from ...program import Edits, Key, source_id
from ..job import Job, Outcome
from ..sources import all_reads, read_tapes
from .attention import seen_by
from .chunk import Chunk
from .tokens import Packed

COMPANIONS = {
    "q_input": ("attn_in", "q"),
    "k_input": ("attn_in", "k"),
    "v_input": ("attn_in", "v"),
    "scores": ("z",),
    "pattern": ("z",),
    "result": ("z",),
    "mlp_pre": ("mlp_in",),
    "mlp_post": ("mlp_in",),
}
"""Sites whose base value an edit at another one needs besides its own."""


def record_keys(keys: Iterable[Key]) -> frozenset[Key]:
    """The sites of which the base's value is needed where worlds edit or keep `keys`."""
    keys = set(keys)
    more = {(name, layer, stack) for at, layer, stack in keys for name in COMPANIONS.get(at, ())}
    return frozenset(keys | more)


@dataclass(eq=False)
class SharedRun:
    """One batch of rows: its base, and the worlds that are run against it.

    Attributes:
        arch: the model's parts.
        whole: the base's inputs.
        window: the rows of them that are run.
        reads: the sites whose values are wanted of every world.
        sizes: sizes of the head and last axes of every site, by key.
        device: the model's.
        exposed: layers whose attention is computed with its inside exposed, for every world alike.
        recorded: sites of which the base's value will be needed, besides those that every run needs.
        trim: whether tokens that no read depends on may be dropped.
        base: the base's value [b, T, ...] of the sites that are recorded, by key.
        meter: counts the work.
    """

    arch: Architecture
    whole: Inputs
    window: slice
    reads: Sequence[Site]
    sizes: dict[Key, dict[str, int]]
    device: torch.device
    exposed: frozenset[int]
    recorded: frozenset[Key]
    trim: bool = True
    base: dict[Key, Tensor] = field(default_factory=dict)
    meter: Meter | None = None
    base_logits: dict[int, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        depth = len(self.arch.blocks)
        self.inputs = self.whole.rows(self.window)
        self.stop = max((execution_order(r.key, depth)[0] for r in self.reads), default=-1)
        # The base goes on to whatever worlds may need of it, also where no read depends on that.
        self.base_stop = max([self.stop, *(execution_order(key, depth)[0] for key in self.recorded)])
        real = self.inputs.mask
        self.needed = [real] * depth
        if self.trim and all(r.name == "logits" for r in self.reads) and self.reads:
            read = torch.zeros_like(real)
            for r in self.reads:
                region = self.region(r)
                marks = torch.ones_like(region.cols, dtype=torch.bool)
                if region.valid is not None:
                    marks = region.full_valid()[..., 0]
                read |= torch.zeros_like(real).scatter(1, self.unembedded(region), marks)
            # What is read depends on the tokens that attention sees from there, at every layer but the last.
            self.needed = [real & seen_by(read, self.arch.causal)] * (depth - 1) + [read & real]

    def region(self, site: Site) -> Region:
        """A read resolved on these rows, as wide as on all of them."""
        return (resolve if site.restricted else entire)(site, self.whole, self.sizes[site.key]).rows(self.window)

    def unembedded(self, region: Region) -> Tensor:
        """int64 [b, n]: the columns of the final states that a part of the logits is made of."""
        return region.cols if self.arch.readout is None else torch.full_like(region.cols, self.arch.readout)

    def embedded(self, inputs: Inputs, chosen: Tensor) -> Tensor:
        """Embeddings [N, M] of the tokens of a batch that are chosen, bool [b, T]."""
        if inputs.pixels is None:
            return self.arch.embed(inputs.ids[chosen].to(self.device))
        rows = chosen.any(1)
        like = next(self.arch.embed.parameters())
        whole = self.arch.embed(inputs.pixels[rows].to(self.device, like.dtype))
        return whole.flatten(0, 1).index_select(0, chosen[rows].flatten().nonzero().squeeze(1).to(self.device))

    def run_base(self, world: Edits) -> list[Tensor]:
        """Compute the base, keep what worlds will need of it, and return its reads."""
        real = self.inputs.mask
        chunk = Chunk(self, [world], is_base=True)
        x = Packed(real, self.embedded(self.inputs, real), len(self.inputs))
        return chunk.run(x)[0]

    def run_worlds(self, worlds: Sequence[Edits]) -> list[list[Tensor]]:
        """Run worlds against the base and return the reads of each; a world's own inputs may differ from the base's."""
        chunk = Chunk(self, worlds)
        dirty, pieces = [], []
        for edits in worlds:
            assert edits.window is not None
            own = edits.world.inputs
            own = self.inputs if own is self.whole else own.rows(edits.window)
            differs = own.differs(self.inputs) & self.inputs.mask
            dirty.append(differs)
            if bool(differs.any()):
                pieces.append(self.embedded(own, differs))
        nothing = torch.zeros_like(self.inputs.mask)
        values = torch.cat(pieces) if pieces else self.embedded(self.inputs, nothing)
        return chunk.run(Packed(torch.cat(dirty), values, len(self.inputs)))


def run_shared(job: Job) -> Iterator[list[Outcome]]:
    """Run worlds against bases that those with one `Inputs` object share, and yield them a chunk at a time."""
    groups: dict[int, list[int]] = {}
    for index, world in enumerate(job.worlds):
        groups.setdefault(id(world.inputs), []).append(index)
    for members in groups.values():
        yield from _run_group(job, members)


def _run_group(job: Job, members: Sequence[int]) -> Iterator[list[Outcome]]:
    """Run the worlds of one base, by their numbers."""
    model, mine = job.model, [job.worlds[i] for i in members]
    inputs = mine[0].inputs
    # Reference sets are needed whole; other worlds that are read go through the network beside their readers.
    sources = all_reads(mine)
    apart = {source_id(r.source, w) for w in mine for i in w.plan for r in i.reads if not r.aligned}
    apart |= {key for key, (source, _) in sources.items() if not _shares_base(source, inputs)}
    fixed = read_tapes(model, mine, job.seed, job.expose, job.limit, only=apart)
    sources = {key: found for key, found in sources.items() if key not in apart}
    order = sorted(range(len(mine)), key=lambda i: _first_column(mine[i], inputs))
    own = [r for w in mine for i in w.plan for r in i.reads if r.source is Origin.HERE]
    keys = {item.site.key for world in mine for item in world.plan} | {r.key for r in job.reads}
    keys |= {r.site.key for r in own if r.site is not None}
    keys |= {site.key for _, sites in sources.values() for site in sites}
    per_row = bytes_per_token(model) * inputs.width
    step = max(1, min(len(inputs), int(job.limit // 2 // (per_row * model.n_layers))))
    for start in range(0, len(inputs), step):
        window = slice(start, min(start + step, len(inputs)))
        left = [i for i in order if not job.skip(members[i], window)]
        if not left:
            continue
        run = SharedRun(
            arch=model.architecture,
            whole=inputs,
            window=window,
            reads=job.reads,
            sizes=model.sizes,
            device=model.device,
            exposed=job.expose,
            recorded=record_keys(keys),
            # A value read from another position of the same world may be one that nothing else needs.
            trim=not own,
            meter=job.meter,
        )
        run.run_base(Edits(World(inputs), model.sizes, {}, job.seed, window))
        tapes = {**fixed, **_tapes_beside(run, sources, job.seed)}
        together = max(1, int(job.limit // (per_row * len(run.inputs))))
        for at in range(0, len(left), together):
            chosen = left[at : at + together]
            edits = [Edits(mine[i], model.sizes, tapes, job.seed, window) for i in chosen]
            yield [
                Outcome(members[i], window, tuple(values), entry.audit)
                for i, entry, values in zip(chosen, edits, run.run_worlds(edits), strict=True)
            ]


def _shares_base(source: World, inputs: Inputs) -> bool:
    """Whether a world that is read can be run against the base of `inputs`: the same layout, and no plan of its own."""
    same_layout = source.inputs.mask.shape == inputs.mask.shape and bool((source.inputs.mask == inputs.mask).all())
    return same_layout and not len(source.plan)


def _tapes_beside(run: SharedRun, sources: Mapping[Any, tuple[World, list[Site]]], seed: int) -> dict[Any, Tape]:
    """Run the worlds that are read as worlds of the same base: where their inputs agree with it, so do their values,
    bitwise.
    """
    tapes = {}
    for key, (source, sites) in sources.items():
        view = replace(run, reads=sites, trim=False)
        values = view.run_worlds([Edits(source, run.sizes, {}, seed, run.window)])[0]
        kept = tuple(zip(sites, values, strict=True))
        tapes[key] = Tape(source.inputs, kept, run.sizes, run.window)
    return tapes


def _first_column(world: World, inputs: Inputs) -> int:
    """About where a world forks from its base: worlds that fork at one place pack well together."""
    first = inputs.width
    for item in world.plan:
        pos = item.site.pos
        if isinstance(pos, int) and pos >= 0:
            first = min(first, pos)
        elif isinstance(pos, int):
            first = min(first, inputs.width + pos)
        elif isinstance(pos, tuple) and min(pos) >= 0:
            first = min(first, min(pos))
        else:
            return 0
    return first
