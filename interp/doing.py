"""What was done to get a result, in the words that titles and axes use."""

from __future__ import annotations

from interp.effects import Effects

READINGS = {
    "logit lens": "the metric read from the stream",
    "direct logit attribution": "direct contribution",
}
"""Results in which nothing was edited, by what their config calls the grid; and what their numbers are."""
FIRST_ORDER = "first order (attribution patching)"


def edits(result: Effects) -> bool:
    """Whether something was edited, so that numbers are differences from the unedited run."""
    return result.config.get("grid") not in READINGS


def done(result: Effects) -> str:
    """What was done, in a few words: "patch, denoising", "zero in the clean run", "logit lens"; or nothing."""
    config = result.config
    if not edits(result):
        return str(config["grid"])
    what, direction = config.get("intervention"), config.get("direction")
    if what is None and "values" not in config:
        return ""
    if what is None:  # edges, which say what their values are
        what = {"patch": "patch of edges"}.get(str(config.get("values")), f"{config.get('values', 'edit')} of edges")
    run = {"denoising": "the corrupt run", "noising": "the clean run"}.get(str(direction), "the clean run")
    if direction in ("denoising", "noising") and str(what).startswith("patch"):
        text = f"{what}, {direction}"
    else:
        text = f"{what} in {run}" if direction is not None else str(what)
    return f"{text}, first order" if config.get("executor") == FIRST_ORDER else text


def meaning(result: Effects) -> str:
    """What the numbers are."""
    if not edits(result):
        return READINGS[str(result.config["grid"])]
    return "estimated effect" if result.config.get("executor") == FIRST_ORDER else "effect"
