"""Which of two runs is edited, and with what: the arguments that sweeps have in common."""

from __future__ import annotations

from typing import Any

from hooks import Inputs, InputsError, Model, PlanError, World, align, nearest
from interp.evaluation import require_eval
from interp.grids import Factory, Grid
from interp.pairing import Corresponding
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
    _, cells = (grid.on(clean, corrupt, True, False) if grid.paired else grid).cells(model, clean)
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
    grid: Grid,
    seed: int = 0,
    executor: str = "auto",
    budget: int | None = None,
) -> tuple[Inputs, World | None, Factory, Grid]:
    """The inputs that are edited, the world that values are taken from, what is done at a site, and the grid on them.

    A plan that is held on the model is in that world too: of a pair of runs, both are under it. Rows of a pair may have
    other lengths where the grid says which positions correspond: counts them from the end, or pairs them.

    Raises:
        InputsError: prompts that are not Inputs, are missing, or do not correspond.
        SiteError: positions that are paired and do not correspond.
    """
    if intervention is not None and not callable(intervention):
        raise PlanError(f"intervention is a function of a site, such as ip.zero, not {intervention!r}")
    for name, inputs in (("clean", clean), ("corrupt", corrupt)):
        if not isinstance(inputs, Inputs) and (inputs is not None or name == "clean"):
            raise InputsError(f"{name} is {type(inputs).__name__}: prepare prompts with model.inputs(...)")
    if corrupt is None:
        if intervention is None:
            raise InputsError("patching takes values from another run: give corrupt prompts, or an intervention=")
        return clean, None, intervention, grid
    apart = grid.from_the_end and (intervention is None or grid.paired) and not _alike(clean, corrupt)
    if not apart:
        align(clean, corrupt)
    denoising = direction == "denoising"
    base, other = (corrupt, clean) if denoising else (clean, corrupt)
    source = World(other, model.held_on(other)[0])
    grid = grid.on(base, other, not denoising, intervention is None) if grid.paired else grid
    options = {"seed": seed, "executor": executor, "budget": budget}
    return base, source, intervention or Corresponding(model, source, apart, grid.matches, options), grid


def _alike(clean: Inputs, corrupt: Inputs) -> bool:
    """Whether rows have the same lengths, or do not correspond for another reason, which `align` tells."""
    return len(clean) != len(corrupt) or clean.pixels is not None or bool((clean.lengths == corrupt.lengths).all())
