"""The command line: ``python -m interp demo | sites | patch``.

Exit codes: 0 when it worked, 1 when the question had no answer (nothing changed anything), 2 when the input was wrong,
130 when it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hooks import KINDS, InputsError, InterpError, Model, UnfiredError, nearest, text_ids
from interp.printed import as_json, as_table
from interp.tasks import shipped_task, smollm2_task

AXES = ("layer", "head", "pos", "key_pos")
EXAMPLE = (
    "example:\n"
    '  python -m interp demo --model gpt2 --clean "The Eiffel Tower is in the city of" \\\n'
    '      --corrupt "The Brandenburg Gate is in the city of" --answer " Paris" --foil " Berlin"\n'
    "The two prompts need the same number of tokens. Repeat --clean, --corrupt, --answer and --foil for more pairs."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 2
    try:
        return options.run(options)
    except UnfiredError as error:
        print(f"interp: {error}", file=sys.stderr)
        return 1
    except (InterpError, OSError) as error:
        print(f"interp: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interp: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m interp",
        description="Causal analysis of transformers: which parts of a model cause its answer.",
        epilog="`python -m interp COMMAND --help` explains a command.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="find the parts of a model that cause its answer, confirm them, draw them",
        description="Find which positions, attention heads and MLPs cause a model's answer, confirm it, and draw it.\n"
        "Without options: the indirect-object task of the model that ships with the package, and lists that are\n"
        "said twice. --model smollm2-135m does the same on a real pretrained model, dequantised from 4 bits.",
        epilog=EXAMPLE,
        formatter_class=raw,
    )
    _model_option(demo)
    _prompt_options(demo)
    demo.add_argument("--out", default="interp-demo", metavar="DIR", help="where figures go (default: %(default)s)")
    demo.add_argument(
        "--pairs", type=int, metavar="N", help="pairs of the model's own task (default: 48; smollm2-135m: 12)"
    )
    demo.set_defaults(run=_demo)

    sites = commands.add_parser(
        "sites",
        help="list what a model offers to read and to edit",
        description="List the sites of a model, with their shapes and TransformerLens's names. B rows, T query\n"
        "positions, S key positions, H heads, K key/value heads, D head width, M model width, F MLP\n"
        "width, V vocabulary.",
        formatter_class=raw,
    )
    _model_option(sites)
    sites.add_argument("--json", action="store_true", help="print JSON instead of a table")
    sites.set_defaults(run=_sites)

    patch = commands.add_parser(
        "patch",
        help="one patching sweep, to a table, JSON or a figure",
        description="Patch one kind of site, cell by cell, and print the effect on the logit difference answer - foil.",
        epilog=EXAMPLE.replace("demo", "patch", 1),
        formatter_class=raw,
    )
    _model_option(patch)
    _prompt_options(patch)
    patch.add_argument("--site", default="resid_pre", help="what is patched: see `sites` (default: %(default)s)")
    patch.add_argument(
        "--axes", default="layer,pos", help=f"axes of the grid, of {','.join(AXES)} (default: %(default)s)"
    )
    patch.add_argument(
        "--direction", choices=("denoising", "noising"), default="denoising",
        help="denoising puts clean values into the corrupt run, noising the reverse (default: %(default)s)",
    )  # fmt: skip
    patch.add_argument("--zero", action="store_true", help="set the site to zero in the clean run, instead of patching")
    patch.add_argument(
        "--top", type=_positive, default=10, metavar="K", help="rows of the table (default: %(default)s)"
    )
    patch.add_argument("--json", action="store_true", help="print every cell as JSON instead of a table")
    patch.add_argument("--figure", metavar="FILE", help="draw a heatmap there (.png, .pdf, .svg)")
    patch.add_argument("--save", metavar="PATH", help="save the result there; an interrupted sweep goes on from it")
    patch.set_defaults(run=_patch)
    return parser


def _positive(text: str) -> int:
    """A number of things, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: at least one is needed")
    return number


def _require_writable(option: str, name: str | None, *, folder: bool = False) -> None:
    """Check where something is to be written, before the work is done.

    Raises:
        InputsError: it cannot be written there.
    """
    if name is None:
        return
    path = Path(name)
    if path.is_dir() and not folder:
        raise InputsError(f"{option} {name}: that is a folder; name a file in it")
    if path.exists() and not path.is_dir() and folder:
        raise InputsError(f"{option} {name}: that is a file; name a folder")
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not os.access(there, os.W_OK):
        raise InputsError(f"{option} {name}: {there} cannot be written")
    if there.is_file() and there != path:
        raise InputsError(f"{option} {name}: {there} is a file, not a folder")


def _require_figure(name: str | None) -> None:
    """Check that a figure can be written in the type that its name says.

    Raises:
        InputsError: it cannot.
    """
    if name is None:
        return
    _require_writable("--figure", name)
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    kind = Path(name).suffix.removeprefix(".").lower()
    if kind not in known:
        kinds = f"it is one of {', '.join(sorted(known))}"
        raise InputsError(f"--figure {name}: {f'.{kind} is no type of figure' if kind else 'no type'}; {kinds}")


def _model_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="ioi-mini", metavar="NAME",
        help="a model that ships (ioi-mini), smollm2-135m, a folder, or a name on the hub (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="where to run: cpu, cuda, cuda:1 (default: %(default)s)")


def _prompt_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clean", action="append", metavar="TEXT", help="a prompt that shows the behaviour")
    parser.add_argument(
        "--corrupt", action="append", metavar="TEXT", help="the same prompt, changed so that it does not"
    )
    parser.add_argument(
        "--answer",
        action="append",
        metavar="TEXT",
        help="what the clean prompt calls for, a token; to `patch` it may be several, which are put after both prompts",
    )
    parser.add_argument(
        "--foil",
        action="append",
        metavar="TEXT",
        help="the token that the corrupt prompt calls for; without it, `patch` measures the answer's log-probability",
    )


def _load(options: argparse.Namespace) -> Model:
    from interp.loading import load

    try:
        return load(options.model, device=options.device)
    except (RuntimeError, AssertionError) as error:  # torch's way of saying that there is no such device
        raise InputsError(f"device {options.device!r} cannot be used: {str(error).splitlines()[0]}") from error


def _task(options: argparse.Namespace, needs_foil: bool = True) -> Any:
    from interp.demo import Task

    given = {name: getattr(options, name) or [] for name in ("clean", "corrupt", "answer", "foil")}
    if not any(given.values()):
        from interp.pretrained import NAME

        pairs = getattr(options, "pairs", None)
        if options.model == NAME:
            return smollm2_task(12 if pairs is None else pairs)
        if options.model != "ioi-mini":
            raise InputsError("another model needs prompts: give --clean, --corrupt, --answer and --foil")
        return shipped_task(48 if pairs is None else pairs)
    missing = [name for name, value in given.items() if not value and (needs_foil or name != "foil")]
    if missing:
        wanted = "all of --clean, --corrupt, --answer, --foil" if needs_foil else "--clean, --corrupt and --answer"
        raise InputsError(f"--{' and --'.join(missing)} missing: a pair needs {wanted}")
    n = len(given["clean"])
    if len(given["corrupt"]) != n:
        raise InputsError(f"{n} times --clean and {len(given['corrupt'])} times --corrupt: give one of each for a pair")
    for name in ("answer", "foil"):
        if name == "foil" and not given[name]:
            continue
        if len(given[name]) not in (1, n):
            raise InputsError(f"{len(given[name])} times --{name} for {n} pairs: give it once, or once for each")
        given[name] = given[name] * n if len(given[name]) == 1 else given[name]
    clean, corrupt, answer, foil = (tuple(given[name]) for name in ("clean", "corrupt", "answer", "foil"))
    return Task(clean, corrupt, answer, foil)


def _demo(options: argparse.Namespace) -> int:
    from interp.demo import run_demo

    _require_writable("--out", options.out, folder=True)
    task = _task(options)
    print(run_demo(_load(options), task, Path(options.out)))
    return 0


def _sites(options: argparse.Namespace) -> int:
    model = _load(options)
    if not options.json:
        print(f"{model!r}\n{model.sites()}")
        return 0
    listed = [
        {
            "name": s.name,
            "layers": s.layers,
            "axes": list(s.letters),
            "shape": list(s.shape),
            "transformer_lens": s.hook,
        }
        for s in model.sites()
    ]
    print(json.dumps(listed, indent=1))
    return 0


def _patch(options: argparse.Namespace) -> int:
    from hooks import zero
    from interp.grids import grid
    from interp.sweeps import sweep

    _require_figure(options.figure)
    _require_writable("--save", options.save)
    if options.site not in KINDS:
        raise InputsError(f"--site {options.site!r} is not a site{nearest(options.site, KINDS)}")
    axes = [axis.strip() for axis in options.axes.split(",") if axis.strip()]
    cells = grid(options.site, **{axis: "all" for axis in axes})
    task, model = _task(options, needs_foil=False), _load(options)
    task, metric = _measured(task, model)
    clean, corrupt = model.inputs(task.clean), None if options.zero else model.inputs(task.corrupt)
    result = sweep(
        model,
        clean,
        corrupt,
        cells,
        metric=metric,
        intervention=zero if options.zero else None,
        direction=options.direction,
        path=options.save,
    )
    if options.figure:
        Path(options.figure).absolute().parent.mkdir(parents=True, exist_ok=True)
        result.figure().savefig(options.figure, dpi=200)
    print(as_json(result) if options.json else as_table(result, options.top))
    return 0


def _measured(task: Any, model: Model) -> tuple[Any, Any]:
    """What is run and measured: answers of several tokens stand at the end of both prompts."""
    from interp.metrics import log_prob, logit_diff

    words = task.answer + task.foil
    one = model.architecture.readout is not None or all(len(text_ids(model.tokenizer, word)) == 1 for word in words)
    pos = -1 if one else "answer"
    if not one:
        clean, corrupt = (
            tuple(_going_on(model, *pair) for pair in zip(side, task.answer, strict=True))
            for side in (task.clean, task.corrupt)
        )
        task = replace(task, clean=clean, corrupt=corrupt)
    answer, foil = list(task.answer), list(task.foil)
    return task, logit_diff(answer, foil, pos=pos) if foil else log_prob(answer, pos=pos)


def _going_on(model: Model, prompt: str, answer: str) -> str:
    """The text of a prompt and its answer, whose tokens it ends with."""
    wanted = text_ids(model.tokenizer, answer)
    for text in (prompt + answer, f"{prompt} {answer}"):
        try:
            if model.inputs([text]).ids[0, -len(wanted) :].tolist() == wanted:
                return text
        except InterpError:  # a word that only the other text has
            continue
    raise InputsError(f"{answer!r} after {prompt!r} is not in the tokens that it is alone; mind its first space")
