"""The runner of `make mutants`, on a made-up tree of a few lines: the list itself takes minutes."""

from __future__ import annotations

import json

import pytest

from tests import mutants
from tests.mutant_list import MUTANTS

AREA = "def area(a, b):\n    return a * b\n\n\ndef double(a):\n    return 2 * a\n"
TESTS = """
from interp.shapes import area, double

def test_area():
    assert area(2, 3) == 6

def test_double():
    assert double(2) == 4
"""
TEST = "tests/test_shapes.py"
CAUGHT = ("a sum", "return a * b", "return a + b", TEST)
LIVES = ("a square", "return 2 * a", "return a * a", TEST)
STALE = ("what is gone", "return a - b", "return a", TEST)
TWICE = ("what stands twice", "    return", "    pass", TEST)
BROKEN = ("no Python", "def area(a, b):", "def area(a, b:", TEST)


@pytest.fixture
def tree(tmp_path):
    """A checkout in small."""
    root = tmp_path / "root"
    for folder in ("hooks", "interp", "tests"):
        (root / folder).mkdir(parents=True)
        (root / folder / "__init__.py").touch()  # or the packages that are installed would be found before them
    (root / "interp" / "shapes.py").write_text(AREA)
    (root / TEST).write_text(TESTS)
    return root


def test_what_comes_of_mutants(tree, tmp_path, capsys):
    out = tmp_path / "kept" / "mutants.json"
    listed = [CAUGHT, LIVES, STALE, TWICE, BROKEN]
    assert mutants.main(["--out", str(out)], tree, listed) == 1
    found = json.loads(out.read_text())
    assert {name: found[name] for name in ("mutants", "caught", "lives", "stale", "broken")} == {
        "mutants": 5, "caught": 1, "lives": 1, "stale": 2, "broken": 1,
    }  # fmt: skip
    assert [(one["name"], one["status"]) for one in found["open"]] == [
        ("a square", "lives"),
        ("what is gone", "stale"),
        ("what stands twice", "stale"),
        ("no Python", "broken"),
    ]
    said = capsys.readouterr().out
    assert "caught  a sum" in said and "1 caught, 1 lives, 2 stale, 1 broken" in said
    assert "2 times, in interp/shapes.py" in said and "0 times" in said
    # The checkout itself is never touched.
    assert (tree / "interp" / "shapes.py").read_text() == AREA


def test_all_caught_is_success_also_in_another_file(tree, capsys):
    (tree / "interp" / "shapes.py").rename(tree / "hooks" / "shapes.py")
    (tree / TEST).write_text(TESTS.replace("interp.shapes", "hooks.shapes"))
    assert mutants.main(["sum"], tree, [CAUGHT, LIVES]) == 0
    assert "1 caught, 0 lives" in capsys.readouterr().out


def test_tests_that_fail_anyway_catch_nothing(tree, capsys):
    (tree / TEST).write_text(TESTS.replace("== 4", "== 5"))
    assert mutants.main([], tree, [CAUGHT]) == 1
    assert "do not pass without a mistake" in capsys.readouterr().out


def test_names(tree):
    for arguments, listed in ((["nobody"], [CAUGHT]), ([], [CAUGHT, CAUGHT])):
        with pytest.raises(SystemExit):
            mutants.main(arguments, tree, listed)


def test_the_list_is_of_mistakes():
    """Every entry changes something, has tests that are there, and a name of its own."""
    assert len({name for name, *_ in MUTANTS}) == len(MUTANTS) > 50
    for name, find, put, tests in MUTANTS:
        assert find != put and name, name
        for test in tests.split():
            path, _, function = test.partition("::")
            assert (mutants.ROOT / path).is_file(), test
            assert f"def {function.partition('[')[0]}" in (mutants.ROOT / path).read_text() or not function, test
