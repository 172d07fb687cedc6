"""The interventions that users write: a site, a function of its value (`hooks.plan.operations`), what that reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..errors import PlanError, ShapeError, SiteError, nearest
from .operation import Value
from .operations.attention import Knockout
from .operations.counterfactual import FORMS
from .operations.custom import Custom, takes_values_alone
from .operations.patching import Freeze, Patch, PatchConstant
from .operations.references import Mean, Resample
from .operations.subspaces import Interchange, ProjectOut
from .operations.values import Clamp, Noise, Recompute, Scale, Steer, Zero
from .plan import Intervention, Origin, Read, Source
from .sites import Site, site


def patch(
    where: Site | str, source: Source, *, source_site: Site | str | None = None, stop_gradient: bool = False
) -> Intervention:
    """Replace the value at a site by the value that another world has there.

    Args:
        where: the site.
        source: a `World`, a `Plan` (this world's inputs under that plan instead), a `Tape` of a run, or a tensor with
            the part's shape (or the whole activation's).
        source_site: read another site or other positions of the source instead (which a tensor does not have); as many
            positions as `where` selects.
        stop_gradient: take the value as a constant; otherwise gradients flow through what is read.
    """
    return Intervention(
        site(where), PatchConstant() if stop_gradient else Patch(), (_read("patch", source, source_site),)
    )


def clamp(where: Site | str, value: Value) -> Intervention:
    """Set the value at a site to a number, or to a tensor with exactly the sizes of the site's last axes."""
    return Intervention(site(where), Clamp(_value("clamp", value)))


def zero(where: Site | str) -> Intervention:
    """Set the value at a site to zero."""
    return Intervention(site(where), Zero())


def mean(
    where: Site | str,
    source: Source | None = None,
    *,
    pooled: bool = False,
    but_bos: bool = False,
    source_site: Site | str | None = None,
) -> Intervention:
    """Set the value at a site to its mean over a reference set.

    Args:
        where: the site.
        source: the reference set: a `World`, a `Tape`, or a tensor of the whole activation [R, T, ...], with any number
            of rows.
        pooled: average over the positions too, instead of each position by itself: over those that `where` lists, in
            each row of the reference set that has them (positions for each row are of a reference set of as many rows),
            or, where it lists none (a slice lists none), over all. Its rows may have any lengths.
        but_bos: leave BOS, which would outweigh all else, out of a mean over all positions.
        source_site: the site of the reference set, or its positions, that a pooled mean is over, where they are others.

    Raises:
        PlanError: no reference set is given, other positions of it without `pooled`, or BOS is to be left out where
            each position is averaged by itself.
    """
    if but_bos and not pooled:
        raise PlanError(
            "but_bos leaves BOS out of a mean over positions: give pooled=True; else it has a mean of its own"
        )
    if source_site is not None and not pooled:
        raise PlanError("source_site names other positions of the reference set, over which a mean is pooled=True")
    return Intervention(site(where), Mean(pooled, but_bos), (_read("mean", source, source_site, aligned=False),))


def resample(where: Site | str, source: Source | None = None, *, seed: int = 0) -> Intervention:
    """Set each row's value at a site to that of a random row of a reference set; see `mean`.

    The row drawn depends on the seeds and the id of the row alone, so all sites of one seed draw the same donor.
    """
    return Intervention(site(where), Resample(seed), (_read("resample", source, aligned=False),))


def noise(where: Site | str, std: Value, *, seed: int = 0) -> Intervention:
    """Add Gaussian noise of deviation `std` (in the units of the activation) at a site."""
    return Intervention(site(where), Noise(_value("noise", std), seed))


def steer(where: Site | str, vector: Tensor, scale: Value = 1.0) -> Intervention:
    """Add `scale * vector` at a site; the vector has the sizes of the site's last axes, as [M]."""
    if not isinstance(vector, Tensor):
        raise ShapeError(f"steer takes a tensor, not {type(vector).__name__}")
    return Intervention(site(where), Steer(vector, _value("steer", scale)))


def scale(where: Site | str, factor: Value) -> Intervention:
    """Multiply the value at a site by a number, or by a tensor with the sizes of its last axes."""
    return Intervention(site(where), Scale(_value("scale", factor)))


def project_out(where: Site | str, directions: Tensor) -> Intervention:
    """Remove the span of `directions`, [D] or [k, D] and not necessarily orthogonal, from the last axis of a site.

    Raises:
        ShapeError, PlanError: directions of another form, or that depend on one another.
    """
    return Intervention(site(where), ProjectOut(_directions("project_out", directions)))


def interchange(
    where: Site | str, directions: Tensor, source: Source, *, source_site: Site | str | None = None
) -> Intervention:
    """Replace the component in the span of `directions` ([D] or [k, D]) by the one that the source has; see `patch`.

    Raises:
        ShapeError, PlanError: directions of another form, or that depend on one another.
    """
    op = Interchange(_directions("interchange", directions))
    return Intervention(site(where), op, (_read("interchange", source, source_site),))


def knockout(where: Site | str) -> Intervention:
    """Forbid attention edges: `where` is ``scores`` or ``pattern``, restricted to heads, query and key positions."""
    place = site(where)
    if place.name not in ("scores", "pattern"):
        raise SiteError(f"knockout cuts attention edges: its site is scores or pattern, not {place.name!r}")
    scores = Site("scores", place.layer, place.stack, place.head, place.pos, place.key_pos)
    return Intervention(scores, Knockout())


def counterfactual(where: Site | str, form: str = "random", *, seed: int = 0) -> Intervention:
    """Replace attention by attention that does not look at what it attends to (CausalMM, Zhou et al. 2025).

    Each query's weights stay a distribution over the keys that the masks allow: they keep their sum, which is 1 without
    attention sinks, and over a part of the keys (``key_pos=``) the sum that this part has. A draw is a function of
    seed, layer, head, row and absolute positions alone.

    Args:
        where: ``pattern``, restricted to heads, query and key positions.
        form: ``"random"``, independent uniform weights; ``"uniform"``, equal ones; ``"reversed"``, the row's largest
            weight minus each; ``"shuffled"``, the row's weights permuted among its keys.
        seed: of the draw, besides that of the run.

    Raises:
        SiteError: the site is none of attention patterns.
        PlanError: an unknown form, or a seed that is no int.
    """
    place = site(where)
    if place.name != "pattern":
        raise SiteError(f"counterfactual attention replaces a pattern: its site is 'pattern', not {place.name!r}")
    if form not in FORMS:
        raise PlanError(f"unknown form of attention {form!r}{nearest(str(form), FORMS)}; there are {', '.join(FORMS)}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise PlanError(f"a seed is an int, not {seed!r}")
    return Intervention(place, FORMS[form](seed))


def freeze(where: Site | str, *, stop_gradient: bool = False) -> Intervention:
    """Hold a site at the value that this world has without interventions; see `patch` for the gradient."""
    return Intervention(site(where), PatchConstant() if stop_gradient else Freeze(), (Read(Origin.UNEDITED),))


def recompute(where: Site | str) -> Intervention:
    """Change nothing, but have everything after the site computed again; its effect is the rounding of the executor."""
    return Intervention(site(where), Recompute())


def intervene(
    where: Site | str, fn: Callable[..., Tensor], reads: Read | Sequence[Read] = (), mixes: Sequence[str] = ()
) -> Intervention:
    """Apply a function of your own: ``fn(x, *reads, ctx=ctx)``, or ``fn(x, *reads)`` if it takes no ctx; pure, same
    shape, dtype and device.

    Args:
        where: the site.
        fn: the function; `ctx` is a `Context`.
        reads: the values it reads besides, each a `Read` (see `here`).
        mixes: ``("row",)`` and/or ``("pos",)`` where the function lets rows or positions depend on one another.

    Raises:
        PlanError: `fn` is no function, or takes other arguments (TransformerLens's ``f(x, hook)``); `reads` holds
            anything but reads; or `mixes` names something else.
    """
    if not callable(fn):
        raise PlanError(f"intervene takes a function, fn(x, *reads, ctx=ctx), not {type(fn).__name__}")
    listed = (reads,) if isinstance(reads, Read) else tuple(reads)
    odd = next((read for read in listed if not isinstance(read, Read)), None)
    if odd is not None:
        raise PlanError(f"reads are made with Read(source) or here(site), not {type(odd).__name__}")
    mixing = frozenset((mixes,) if isinstance(mixes, str) else mixes)
    if mixing - {"row", "pos"}:
        raise PlanError(f"mixes names 'row' and/or 'pos', not {sorted(mixing - {'row', 'pos'})}")
    return Intervention(site(where), Custom(fn, mixing, takes_values_alone(fn, len(listed))), listed)


def here(where: Site | str) -> Read:
    """Read this world's own value, as edited, at a site that it computes earlier."""
    return Read(Origin.HERE, site(where))


def _read(what: str, source: Source | None, where: Site | str | None = None, aligned: bool = True) -> Read:
    """A read of what a user gave as a source."""
    if source is None:
        raise PlanError(f"{what} takes values from a World, a Plan, a Tape or a tensor: give source=")
    return Read(source, None if where is None else site(where), aligned)


def _value(what: str, value: Any) -> Value:
    """A number or a tensor; an array would broadcast unseen."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise PlanError(f"{what} takes a number or a tensor, not {type(value).__name__}")
    return value if isinstance(value, (int, float)) else float(value)


def _directions(what: str, directions: Any) -> Tensor:
    """Directions [D] or [k, D] that span as many dimensions as there are of them.

    Raises:
        ShapeError: they are not of that form.
        PlanError: they are zero, not finite, or depend on one another.
    """
    if not isinstance(directions, Tensor) or not directions.is_floating_point():
        given = directions.dtype if isinstance(directions, Tensor) else type(directions).__name__
        raise ShapeError(f"{what} takes directions as a floating-point tensor [D] or [k, D], not {given}")
    if directions.ndim not in (1, 2) or not directions.numel():
        raise ShapeError(f"{what} takes directions [D] or [k, D], got shape {list(directions.shape)}")
    if torch.compiler.is_compiling():
        return directions
    try:
        finite = bool(directions.isfinite().all())
        # Their unit vectors, so that a short one is not taken for one that depends on the others.
        unit = torch.nn.functional.normalize(torch.atleast_2d(directions.detach()).double(), dim=-1)
        rank = int(torch.linalg.matrix_rank(unit)) if finite else 0
    except RuntimeError:  # within torch.vmap a tensor has no value to look at
        return directions
    if not finite:
        raise PlanError(f"{what} is given directions that are not finite numbers")
    if rank < len(unit):
        raise PlanError(
            f"{what}: {len(unit)} directions span {rank} dimensions; leave out what is zero or depends on the others"
        )
    return directions
