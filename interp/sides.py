"""Which of two runs is edited, and with what: the arguments that sweeps have in common."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from hooks import Inputs, InputsError, Intervention, Model, PlanError, Site, SiteError, World, align, nearest, patch
from interp.evaluation import require_eval
from interp.grids import Factory, Grid
from interp.provenance import name_of

DIRECTIONS = ("denoising", "noising")


def require_grid(grid: Any) -> None:
    """Raise InputsError unless this is a grid."""
    if not isinstance(grid, Grid):
        raise InputsError(f"a sweep goes through a grid: ip.grid({grid!r}, layer='all'), not {type(grid).__name__}")


def stated(
    model: Model,
    direction: str | None,
    clean: Inputs,
    corrupt: Inputs | None,
    grid: Grid,
    intervention: Factory | None,
) -> str:
    """The direction that is asked for: as said, or as follows from what is taken from which run.

    Raises:
        InputsError: nothing is taken from either, so it has to be said which is edited.
    """
    if direction is not None:
        return direction
    if not isinstance(clean, Inputs) or not isinstance(corrupt, Inputs) or not callable(intervention):
        return "denoising"
    require_eval(model, "a sweep")
    _, cells = grid.cells(model, clean)
    sources = [read.source for item in cells[0].plan(intervention) for read in item.reads]
    taken = [source.inputs for source in sources if isinstance(source, World)]
    if any(inputs is clean for inputs in taken) != any(inputs is corrupt for inputs in taken):
        return "denoising" if any(inputs is clean for inputs in taken) else "noising"
    raise InputsError(
        f"{name_of(intervention)} takes nothing from either run, so it does not follow which of the two it edits: say "
        "direction='noising' for the clean run, direction='denoising' for the corrupt one, or give corrupt=None"
    )


def check_model(model: Model, direction: str) -> str:
    """Check that a model can be measured, and that a direction is one, which is returned.

    Raises:
        ModelError: it is not wrapped, or in training mode.
        InputsError: an unknown direction.
    """
    require_eval(model, "a sweep")
    if direction not in DIRECTIONS:
        raise InputsError(
            f"direction is {' or '.join(map(repr, DIRECTIONS))}, not {direction!r}{nearest(direction, DIRECTIONS)}"
        )
    return direction


def source_of(
    model: Model,
    clean: Inputs,
    corrupt: Inputs | None,
    direction: str,
    intervention: Factory | None,
    grid: Grid | None = None,
) -> tuple[Inputs, World | None, Factory]:
    """The inputs that are edited, the world that values are taken from, and what is done at a site.

    A plan that is held on the model is in that world too: of a pair of runs, both are under it. Rows of a pair may have
    other lengths where the grid counts its positions from the end.

    Raises:
        InputsError: prompts that are not Inputs, are missing, or do not correspond.
    """
    if intervention is not None and not callable(intervention):
        raise PlanError(f"intervention is a function of a site, such as ip.zero, not {intervention!r}")
    for name, inputs in (("clean", clean), ("corrupt", corrupt)):
        if not isinstance(inputs, Inputs) and (inputs is not None or name == "clean"):
            raise InputsError(f"{name} is {type(inputs).__name__}: prepare prompts with model.inputs(...)")
    if corrupt is None:
        if intervention is None:
            raise InputsError("patching takes values from another run: give corrupt prompts, or an intervention=")
        return clean, None, intervention
    apart = intervention is None and grid is not None and grid.from_the_end and not _alike(clean, corrupt)
    if not apart:
        align(clean, corrupt)
    base, other = (corrupt, clean) if direction == "denoising" else (clean, corrupt)
    source = World(other, model.held_on(other)[0])
    if apart:
        return base, source, partial(_from_the_end, source=source)
    return base, source, intervention or partial(patch, source=source)


def _alike(clean: Inputs, corrupt: Inputs) -> bool:
    """Whether rows have the same lengths, or do not correspond for another reason, which `align` tells."""
    return len(clean) != len(corrupt) or clean.pixels is not None or bool((clean.lengths == corrupt.lengths).all())


def _from_the_end(site: Site, source: World) -> Intervention:
    """Patch positions that are counted from the end, each run's own.

    Raises:
        SiteError: some rows lack them, so that they stand as a mask, of columns of one of the two runs.
    """
    if isinstance(site.pos, Tensor):
        raise SiteError(f"{site.name}: rows lack a position; in pairs of other lengths every row has each of them")
    return patch(site, source, source_site=site)
