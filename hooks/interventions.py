"""What is done at a site: pure functions ``f(x, *reads, ctx)`` of the value there and of values read elsewhere.

Each returns a new tensor of the shape, dtype and device of `x`, reads nothing on the host, and acts on every row and
position by itself, unless it says that it mixes them. The functions are frozen dataclasses, so that a plan can be
printed, compared and saved; the builders at the end (`patch`, `steer`, ...) are what users write.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .context import Context, Reference, fit
from .errors import PlanError, ShapeError, SiteError
from .inputs import Inputs
from .patterns import Attend, AttendBack, CopyScores, ForbidBack, FromPositions
from .plan import Intervention, Op, Origin, Plan, Read, Source, World
from .random import choice, normal
from .sites import Site, site
from .tape import Tape

Value = Tensor | float


@dataclass(frozen=True, eq=False)
class Patch(Op):
    """The value read, in place of x (Vig et al. 2020; Meng et al. 2022)."""

    name: ClassVar[str] = "patch"

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        return reads[0].expand_as(x)


@dataclass(frozen=True, eq=False)
class PatchConstant(Patch):
    """The value read, in place of x, as a constant: no gradient flows into what is read."""

    name: ClassVar[str] = "patch_constant"
    reads_constants: ClassVar[bool] = True

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        return reads[0].detach().expand_as(x)


@dataclass(frozen=True, eq=False)
class Freeze(Patch):
    """The value that this world has without any intervention."""

    name: ClassVar[str] = "freeze"


@dataclass(frozen=True, eq=False)
class Clamp(Op):
    """A given value, in place of x."""

    value: Value
    name: ClassVar[str] = "clamp"

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        return torch.zeros_like(x) + fit(self.value, x, ctx)


@dataclass(frozen=True, eq=False)
class Zero(Op):
    """Zero ablation."""

    name: ClassVar[str] = "zero"

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        return torch.zeros_like(x)


@dataclass(frozen=True, eq=False)
class Mean(Op):
    """Mean ablation: the mean over the rows of a reference set, for each position, or pooled over positions too."""

    pooled: bool = False
    name: ClassVar[str] = "mean"

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        reference, layout = reads[0], ctx.references[0]
        assert layout is not None
        dims = (0, ctx.axes.index("pos")) if self.pooled else (0,)
        if layout.valid is None:
            mean = reference.mean(dim=dims, keepdim=True)
        else:
            real = layout.valid.expand_as(reference)
            mean = torch.where(real, reference, 0).sum(dims, keepdim=True) / real.sum(dims, keepdim=True).clamp_min(1)
        kept = Reference(None, tuple(axis for axis in layout.by_position if axis not in dims))
        return torch.zeros_like(x) + kept.pick(mean, ctx)


@dataclass(frozen=True, eq=False)
class Resample(Op):
    """Resample ablation: the value of a random row of a reference set, one row for each row of x (Chan et al. 2022)."""

    seed: int = 0
    name: ClassVar[str] = "resample"
    needs_full_rows: ClassVar[bool] = True

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        layout = ctx.references[0]
        assert layout is not None
        donor = choice(len(reads[0]), ctx.seed, self.seed, ctx.row)
        return layout.pick(reads[0].index_select(0, donor), ctx).expand_as(x)


@dataclass(frozen=True, eq=False)
class Noise(Op):
    """x + std * standard normal noise, a function of seed, site, row, position and entry (Meng et al. 2022)."""

    std: Value
    seed: int = 0
    name: ClassVar[str] = "noise"

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        draw = normal(ctx.seed, self.seed, ctx.salt, *ctx.counters(x.ndim))
        return x + fit(self.std, x, ctx) * draw.to(x.dtype)


@dataclass(frozen=True, eq=False)
class Steer(Op):
    """x + scale * vector (Turner et al. 2023)."""

    vector: Tensor
    scale: Value = 1.0
    name: ClassVar[str] = "steer"

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        return x + fit(self.scale, x, ctx) * fit(self.vector, x, ctx)


@dataclass(frozen=True, eq=False)
class Scale(Op):
    """factor * x."""

    factor: Value
    name: ClassVar[str] = "scale"

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        return x * fit(self.factor, x, ctx)


def _orthonormal(directions: Tensor, x: Tensor) -> Tensor:
    """Rows of an orthonormal basis [k, D] of the span of `directions` [D] or [k, D], in x's dtype; differentiable."""
    if directions.device != x.device or directions.shape[-1] != x.shape[-1] or directions.ndim > 2:
        raise ShapeError(
            f"directions of shape {list(directions.shape)} on {directions.device} for an activation on {x.device} "
            f"whose last axis has {x.shape[-1]} entries; expected [{x.shape[-1]}] or [k, {x.shape[-1]}]"
        )
    wide = directions if directions.dtype == torch.float64 else directions.float()
    if wide.ndim == 1:
        return (wide / wide.norm())[None].to(x.dtype)
    return torch.linalg.qr(wide.T)[0].T.to(x.dtype)


@dataclass(frozen=True, eq=False)
class ProjectOut(Op):
    """x without its component in the span of the directions (Ravfogel et al. 2020)."""

    directions: Tensor
    name: ClassVar[str] = "project_out"

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        basis = _orthonormal(self.directions, x)
        return x - (x @ basis.T) @ basis


@dataclass(frozen=True, eq=False)
class Interchange(Op):
    """x with its component in a subspace replaced by that of the value read (Geiger et al. 2024, DAS)."""

    directions: Tensor
    name: ClassVar[str] = "interchange"

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        basis = _orthonormal(self.directions, x)
        return x + ((reads[0] - x) @ basis.T) @ basis


@dataclass(frozen=True, eq=False)
class Knockout(Op):
    """-inf on attention scores: the query cannot attend to the key (Geva et al. 2023)."""

    name: ClassVar[str] = "knockout"
    writes_inf: ClassVar[bool] = True

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        return torch.full_like(x, -torch.inf)


@dataclass(frozen=True, eq=False)
class Recompute(Op):
    """x itself, but all that follows is computed again: what that changes is rounding, the noise floor of an effect."""

    name: ClassVar[str] = "recompute"
    always: ClassVar[bool] = True

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        return x


@dataclass(frozen=True, eq=False)
class Custom(Op):
    """A function of the user's. It cannot be saved, because loading a plan runs no code."""

    fn: Callable[..., Tensor]
    mixing: frozenset[str] = field(default=frozenset())
    name: ClassVar[str] = "intervene"

    @property
    def mixes(self) -> frozenset[str]:  # type: ignore[override]
        return self.mixing

    def __call__(self, x: Tensor, *reads: Tensor, ctx: Context) -> Tensor:
        return self.fn(x, *reads, ctx=ctx)

    def __str__(self) -> str:
        return getattr(self.fn, "__name__", type(self.fn).__name__)


OPS: dict[str, type[Op]] = {
    op.name: op
    for op in (
        Patch, PatchConstant, Freeze, Clamp, Zero, Mean, Resample, Noise, Steer, Scale, ProjectOut, Interchange,
        Knockout, Recompute, Attend, AttendBack, ForbidBack, CopyScores, FromPositions,
    )
}  # fmt: skip
"""The functions that a saved plan may name."""


def patch(
    where: Site | str, source: Source, *, source_site: Site | str | None = None, stop_gradient: bool = False
) -> Intervention:
    """Replace the value at a site by the value that another world has there.

    Args:
        where: the site.
        source: a `World`, a `Plan` (this world's inputs under that plan instead), a `Tape` of a run, or a tensor with
            the part's shape (or the whole activation's).
        source_site: read another site or other positions of the source instead; as many positions as `where` selects.
        stop_gradient: take the value as a constant; otherwise gradients flow through what is read.
    """
    return Intervention(
        site(where), PatchConstant() if stop_gradient else Patch(), (_read("patch", source, source_site),)
    )


def clamp(where: Site | str, value: Value) -> Intervention:
    """Set the value at a site to a number, or to a tensor with the sizes of the site's last axes (see `fit`)."""
    return Intervention(site(where), Clamp(value))


def zero(where: Site | str) -> Intervention:
    """Set the value at a site to zero."""
    return Intervention(site(where), Zero())


def mean(where: Site | str, source: Source | None = None, *, pooled: bool = False) -> Intervention:
    """Set the value at a site to its mean over a reference set.

    Args:
        where: the site.
        source: the reference set: a `World`, a `Tape`, or a tensor of the whole activation [R, T, ...], with any number
            of rows.
        pooled: average over the positions too, instead of each position by itself.

    Raises:
        PlanError: no reference set is given.
    """
    return Intervention(site(where), Mean(pooled), (_read("mean", source, aligned=False),))


def resample(where: Site | str, source: Source | None = None, *, seed: int = 0) -> Intervention:
    """Set each row's value at a site to that of a random row of a reference set; see `mean`.

    The row drawn depends on the seeds and the id of the row alone, so all sites of one seed draw the same donor.
    """
    return Intervention(site(where), Resample(seed), (_read("resample", source, aligned=False),))


def noise(where: Site | str, std: Value, *, seed: int = 0) -> Intervention:
    """Add Gaussian noise of deviation `std` (in the units of the activation) at a site."""
    return Intervention(site(where), Noise(std, seed))


def steer(where: Site | str, vector: Tensor, scale: Value = 1.0) -> Intervention:
    """Add `scale * vector` at a site; the vector has the sizes of the site's last axes, as [M] (see `fit`)."""
    if not isinstance(vector, Tensor):
        raise ShapeError(f"steer takes a tensor, not {type(vector).__name__}")
    return Intervention(site(where), Steer(vector, scale))


def scale(where: Site | str, factor: Value) -> Intervention:
    """Multiply the value at a site by a number, or by a tensor with the sizes of its last axes."""
    return Intervention(site(where), Scale(factor))


def project_out(where: Site | str, directions: Tensor) -> Intervention:
    """Remove the span of `directions`, [D] or [k, D] and not necessarily orthogonal, from the last axis of a site."""
    return Intervention(site(where), ProjectOut(directions))


def interchange(
    where: Site | str, directions: Tensor, source: Source, *, source_site: Site | str | None = None
) -> Intervention:
    """Replace the component in the span of `directions` ([D] or [k, D]) by the one that the source has; see `patch`."""
    return Intervention(site(where), Interchange(directions), (_read("interchange", source, source_site),))


def knockout(where: Site | str) -> Intervention:
    """Forbid attention edges: `where` is ``scores`` or ``pattern``, restricted to heads, query and key positions."""
    place = site(where)
    if place.name not in ("scores", "pattern"):
        raise SiteError(f"knockout cuts attention edges: its site is scores or pattern, not {place.name!r}")
    scores = Site("scores", place.layer, place.stack, place.head, place.pos, place.key_pos)
    return Intervention(scores, Knockout())


def freeze(where: Site | str, *, stop_gradient: bool = False) -> Intervention:
    """Hold a site at the value that this world has without interventions; see `patch` for the gradient."""
    return Intervention(site(where), PatchConstant() if stop_gradient else Freeze(), (Read(Origin.UNEDITED),))


def recompute(where: Site | str) -> Intervention:
    """Change nothing, but have everything after the site computed again; its effect is the rounding of the executor."""
    return Intervention(site(where), Recompute())


def intervene(
    where: Site | str, fn: Callable[..., Tensor], reads: Read | tuple[Read, ...] = (), mixes: tuple[str, ...] = ()
) -> Intervention:
    """Apply a function of your own: ``fn(x, *reads, ctx=ctx)``, pure, same shape, dtype and device.

    Args:
        where: the site.
        fn: the function; `ctx` is a `Context`.
        reads: the values it reads besides, each a `Read` (see `here`).
        mixes: ``("row",)`` and/or ``("pos",)`` where the function lets rows or positions depend on one another.
    """
    unknown = set(mixes) - {"row", "pos"}
    if unknown:
        raise PlanError(f"mixes names 'row' and/or 'pos', not {sorted(unknown)}")
    return Intervention(site(where), Custom(fn, frozenset(mixes)), reads if isinstance(reads, tuple) else (reads,))


def here(where: Site | str) -> Read:
    """Read this world's own value, as edited, at a site that it computes earlier."""
    return Read(Origin.HERE, site(where))


def _read(what: str, source: Any, where: Site | str | None = None, aligned: bool = True) -> Read:
    """A read of what a user gave as a source."""
    if isinstance(source, Inputs):
        source = World(source)
    if isinstance(source, Intervention):
        source = Plan((source,))
    if not isinstance(source, (World, Plan, Tape, Tensor)):
        given = "nothing" if source is None else type(source).__name__
        raise PlanError(f"{what} takes values from a World, a Plan, a Tape or a tensor (source=), not {given}")
    return Read(source, None if where is None else site(where), aligned)
