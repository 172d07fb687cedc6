"""Plausible one-line mistakes, each put into a copy of the code to see that the tests notice it: `make mutants`.

The mistakes are in `tests/mutant_list.py`. Each is made where its text stands under hooks/ or interp/, whichever file
that is, so that code can move between files; where the text is gone or stands twice, the mutant is stale and has to be
written again.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("hooks", "interp")
COPIED = ("hooks", "interp", "tests", "experiments", "figures", "pyproject.toml", "README.md", "Makefile")
CAUGHT, LIVES, STALE, BROKEN = "caught", "lives", "stale", "broken"
LONGEST = 1800
"""Seconds that the tests may take: a mistake that goes on for ever is noticed, too."""


class Mutant(NamedTuple):
    """A mistake, and the tests that must notice it.

    Attributes:
        name: what it is called, short.
        find: text that stands exactly once in the code.
        put: what is put in its place.
        tests: the files or tests, as pytest names them, with a space between two.
    """

    name: str
    find: str
    put: str
    tests: str


class Outcome(NamedTuple):
    """What came of a mutant: "caught", "lives", "stale" (no such text) or "broken" (its tests did not run), and why."""

    name: str
    status: str
    why: str = ""


def place(root: Path, text: str) -> Path | str:
    """The one file of the code that holds a text once, or why there is none."""
    counts = {
        path: path.read_text(encoding="utf-8").count(text)
        for top in SOURCES
        for path in sorted(root.glob(f"{top}/**/*.py"))
    }
    found = [path for path, count in counts.items() if count]
    if sum(counts.values()) == 1:
        return found[0]
    named = ", ".join(str(path.relative_to(root)) for path in found)
    return f"its text stands {sum(counts.values())} times" + (f", in {named}" if named else "")


def copy_tree(root: Path, target: Path) -> None:
    """Copy what the tests need of a checkout."""
    for name in COPIED:
        if (root / name).is_dir():
            shutil.copytree(root / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (root / name).exists():
            shutil.copy(root / name, target / name)


def pytest(tree: Path, arguments: Sequence[str]) -> tuple[int, str]:
    """Run some tests of a tree, until the first that fails: pytest's exit status, and the end of what it printed."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree),
        # A file that changes twice within a second, to the same size, would pass for unchanged.
        "PYTHONDONTWRITEBYTECODE": "1",
        # Loading the plugins of all that is installed takes longer than most of the tests.
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "-p", "no:cacheprovider", *arguments]
    options = {"cwd": tree, "env": environment, "capture_output": True, "text": True, "timeout": LONGEST}
    try:
        done = subprocess.run(command, check=False, **options)
    except subprocess.TimeoutExpired:
        return 1, f"nothing came of it in {LONGEST} seconds"
    return done.returncode, "\n".join((done.stdout + done.stderr).strip().splitlines()[-3:])


def attempt(tree: Path, mutant: Mutant) -> Outcome:
    """Make one mistake in a copy of the code, run its tests, and take it back."""
    found = place(tree, mutant.find)
    if isinstance(found, str):
        return Outcome(mutant.name, STALE, found)
    before = found.read_text(encoding="utf-8")
    found.write_text(before.replace(mutant.find, mutant.put), encoding="utf-8")
    try:
        status, said = pytest(tree, mutant.tests.split())
    finally:
        found.write_text(before, encoding="utf-8")
    if status == 0:
        return Outcome(mutant.name, LIVES, str(found.relative_to(tree)))
    return Outcome(mutant.name, CAUGHT) if status == 1 else Outcome(mutant.name, BROKEN, said)


def attempt_all(root: Path, mutants: Sequence[Mutant], jobs: int = 2) -> list[Outcome]:
    """Try mutants on copies of a checkout, `jobs` at a time; each is printed as it is known.

    Tests that fail without any mistake would pass for catching one: where some do, every mutant is broken.
    """
    with tempfile.TemporaryDirectory() as folder:
        trees: queue.Queue[Path] = queue.Queue()
        for job in range(jobs):
            tree = Path(folder) / str(job)
            tree.mkdir()
            copy_tree(root, tree)
            trees.put(tree)
        status, said = pytest(tree, list(dict.fromkeys(test for mutant in mutants for test in mutant.tests.split())))
        if status:
            print(f"the tests do not pass without a mistake:\n{said}", flush=True)
            return [Outcome(mutant.name, BROKEN, said) for mutant in mutants]

        def one(mutant: Mutant) -> Outcome:
            tree = trees.get()
            try:
                outcome = attempt(tree, mutant)
            finally:
                trees.put(tree)
            print(f"{outcome.status:7} {outcome.name}{': ' + outcome.why if outcome.why else ''}", flush=True)
            return outcome

        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(one, mutants))


def report(outcomes: Iterable[Outcome]) -> dict[str, object]:
    """How many mutants came to what, and those that are not caught."""
    outcomes = list(outcomes)
    counts = Counter(outcome.status for outcome in outcomes)
    open_ = [outcome._asdict() for outcome in outcomes if outcome.status != CAUGHT]
    return {"mutants": len(outcomes), **{s: counts[s] for s in (CAUGHT, LIVES, STALE, BROKEN)}, "open": open_}


def main(arguments: Sequence[str] | None = None, root: Path = ROOT, listed: Sequence[tuple] | None = None) -> int:
    """Try the listed mutants, print and write what came of them; 0 where all are caught."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description="Try plausible one-line mistakes.")
    parser.add_argument("names", nargs="*", help="only the mutants whose names hold one of these")
    parser.add_argument("--out", type=Path, help="write the counts there, as JSON")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time")
    options = parser.parse_args(arguments)
    if listed is None:
        from tests.mutant_list import MUTANTS as listed
    mutants = [Mutant(*entry) for entry in listed]
    if len({mutant.name for mutant in mutants}) != len(mutants):
        parser.error("two mutants have one name")
    if options.names:
        mutants = [mutant for mutant in mutants if any(name in mutant.name for name in options.names)]
    if not mutants:
        parser.error(f"no mutant is called {' or '.join(options.names)}")
    found = report(attempt_all(root, mutants, options.jobs))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(", ".join(f"{found[status]} {status}" for status in (CAUGHT, LIVES, STALE, BROKEN)))
    return int(found[CAUGHT] != len(mutants))


if __name__ == "__main__":
    raise SystemExit(main())
