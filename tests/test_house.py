"""The house rules that can be read off the repository: layering, imports, the wheel, what is tracked, the README."""

import ast
import hashlib
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("hooks", "interp")

# What each layer may not import, at any depth: imports go one way, hooks <- interp <- experiments, figures.
FORBIDDEN = {
    "hooks": {"interp", "experiments", "figures", "tests"},
    "interp": {"experiments", "figures", "tests"},
    "experiments": {"tests"},
    "figures": {"tests"},
}
# Imported on use only, so that `import interp` stays quick and works without them.
ON_USE = {"transformers", "transformer_lens", "nnsight", "lightning"}

LIMIT = 1_000_000  # bytes of one tracked file


def repository_files() -> list[Path]:
    """Files of the repository, relative to its root: tracked ones and new ones that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0:
        paths = [Path(name) for name in listed.stdout.split("\0") if name]
    else:  # an exported tree, without git
        ignored = {"__pycache__", "build", "dist"}
        paths = [
            path.relative_to(ROOT)
            for path in ROOT.rglob("*")
            if not any(part in ignored or part.startswith(".") for part in path.relative_to(ROOT).parts)
        ]
    return sorted(path for path in paths if (ROOT / path).is_file())


# Layering


def imported(node: ast.AST, path: Path) -> list[str]:
    """Dotted names that a node of the file `path` (relative to the root) imports; `from x import y`: x, x.y."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        parts = node.module.split(".") if node.module else []
        if node.level:  # one dot is the folder of the file
            parts = [*path.parts[: len(path.parts) - node.level], *parts]
        return [".".join(parts), *(".".join([*parts, alias.name]) for alias in node.names)]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)
        if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
            return [node.args[0].value]
    return []


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes of a module that run when it is imported: all but function bodies and `if TYPE_CHECKING:` blocks."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in node.orelse:
                yield other
                yield from at_import(other)
            continue
        yield node
        yield from at_import(node)


def violations(root: Path, path: Path) -> list[str]:
    """What the Python file `path` (relative to `root`) imports and may not, one line each."""
    tree = ast.parse((root / path).read_text(encoding="utf-8"), filename=str(path))
    layer = path.parts[0]
    # A study is a folder of experiments/; what lies beside the folders is shared, and imports no study either.
    folders = root.glob("experiments/*/") if layer == "experiments" else ()
    studies = {folder.name for folder in folders if folder.is_dir()} - {path.parts[1]}
    found = set()
    for node in ast.walk(tree):
        for name in imported(node, path):
            top, *rest = name.split(".")
            line = f"{path}:{node.lineno}"
            if top in FORBIDDEN.get(layer, ()):
                found.add(f"{line}: {layer} imports {top}")
            if top == "experiments" and rest and rest[0] in studies:
                found.add(f"{line}: the study {rest[0]} is imported from outside it")
    if layer in PACKAGES:
        for node in at_import(tree):
            for name in imported(node, path):
                if name.split(".")[0] in ON_USE:
                    found.add(f"{path}:{node.lineno}: {name.split('.')[0]} is imported on import, not on use")
    return sorted(found)


def test_imports_go_one_way():
    sources = [path for path in repository_files() if path.suffix == ".py" and path.parts[0] in FORBIDDEN]
    assert {path.parts[0] for path in sources} >= set(PACKAGES)
    assert [line for path in sources for line in violations(ROOT, path)] == []


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("hooks/a.py", "import interp", "hooks imports interp"),
        ("hooks/a.py", "def f():\n    from interp.metrics import logit_diff", "hooks imports interp"),
        ("hooks/a.py", "import importlib\nimportlib.import_module('figures.gallery')", "hooks imports figures"),
        ("hooks/models/a.py", "from ...interp import sweeps", "hooks imports interp"),
        ("interp/kv/a.py", "import torch, experiments.ioi.run", "interp imports experiments"),
        (
            "interp/a.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import figures",
            "interp imports figures",
        ),
        (
            "interp/a.py",
            "try:\n    import transformers\nexcept ImportError:\n    pass",
            "transformers is imported on import",
        ),
        ("interp/a.py", "class A:\n    from nnsight import LanguageModel", "nnsight is imported on import"),
        ("hooks/a.py", "import transformer_lens.utils as utils", "transformer_lens is imported on import"),
        ("experiments/ioi/run.py", "from experiments.induction.config import Config", "the study induction"),
        ("experiments/ioi/run.py", "from experiments import induction", "the study induction"),
        ("experiments/ioi/run.py", "def f():\n    from ..induction import config", "the study induction"),
        ("figures/a.py", "import tests.helpers", "figures imports tests"),
    ],
)
def test_the_layering_check_flags(tmp_path, path, source, message):
    assert flagged(tmp_path, path, source) == 1
    assert message in violations(tmp_path, Path(path))[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("hooks/models/a.py", "from . import b\nfrom ..sites import Site\nimport torch, hooks.errors"),
        ("hooks/a.py", "def f():\n    import transformers\n    from interpreter import x"),
        (
            "interp/a.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from transformers import PreTrainedModel",
        ),
        ("interp/a.py", "import hooks\nfrom .metrics import logit_diff"),
        (
            "experiments/ioi/run.py",
            "import transformers\nimport interp as ip\nfrom experiments.ioi.config import Config",
        ),
        ("experiments/ioi/run.py", "from experiments.common import save\nfrom . import config"),
    ],
)
def test_the_layering_check_passes(tmp_path, path, source):
    assert flagged(tmp_path, path, source) == 0


def flagged(root: Path, path: str, source: str) -> int:
    """How many violations `source` has as the file `path` of a repository with the studies ioi and induction."""
    for folder in ("ioi", "induction"):
        (root / "experiments" / folder).mkdir(parents=True)
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(source)
    return len(violations(root, Path(path)))


# Cycles, and the order within the engine


def graph_of(root: Path, paths: list[Path]) -> dict[str, set[str]]:
    """Which module imports which, function-level and type-checking imports included."""
    names = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    graph = {}
    for name, path in names.items():
        tree = ast.parse((root / path).read_text(encoding="utf-8"))
        found: set[str] = set()
        for node in ast.walk(tree):
            # The deepest of what an import names: `from a import b` is of a.b, where that is a module.
            got = [one for one in imported(node, path) if one in names]
            if isinstance(node, ast.ImportFrom):
                deeper = {one for one in got[1:] if one.startswith(got[0] + ".")} if got else set()
                plain = len(deeper) < len(node.names) or not deeper
                found |= deeper | ({got[0]} if got and plain else set())
            else:
                found |= set(got)
        graph[name] = found - {name}
    return graph


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import one another."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, todo = set(), list(graph[start])
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo += graph[name]
        reached[start] = seen
    groups = {tuple(sorted(b for b in reached[a] if a in reached[b])) for a in graph if a in reached[a]}
    return sorted(map(list, groups))


def python_files(*packages: str) -> list[Path]:
    return [path for path in repository_files() if path.suffix == ".py" and path.parts[0] in packages]


def test_no_cycles():
    assert cycles(graph_of(ROOT, python_files("hooks", "interp"))) == []


def test_the_cycle_check_can_fail(tmp_path):
    (tmp_path / "hooks").mkdir()
    (tmp_path / "hooks/a.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .b import B")
    (tmp_path / "hooks/b.py").write_text("def f():\n    from hooks import c")
    (tmp_path / "hooks/c.py").write_text("import hooks.a")
    (tmp_path / "hooks/__init__.py").write_text("from . import a")
    files = [path.relative_to(tmp_path) for path in sorted(tmp_path.rglob("*.py"))]
    assert cycles(graph_of(tmp_path, files)) == [["hooks.a", "hooks.b", "hooks.c"]]
    (tmp_path / "hooks/b.py").write_text("")
    assert cycles(graph_of(tmp_path, files)) == []


# Each may import from its own line and those before it.
ORDER = (
    {"errors", "code", "digest", "files", "html", "random", "worldwise"},
    {"plan"},
    {"models"},
    {"layout", "text"},
    {"audit", "asked", "program", "placed", "resolving", "resolved", "lowering", "budget", "meter", "capturing"},
    {"backends"},
    {"fed", "keeping", "decoding", "holding", "joining", "forking", "rereading", "holds", "hold", "certificate"},
    {"record"},
    {"tail"},
    {"running", "discovery", "generated", "generation"},
    {"compiling", "stepping", "compiled", "members"},
    {"reader", "model", "wrapping"},
)


def backwards(graph: dict[str, set[str]]) -> list[str]:
    rank = {name: number for number, names in enumerate(ORDER) for name in names}
    part = lambda module: module.split(".")[1]  # noqa: E731
    return [
        f"{module} imports {other}"
        for module, others in sorted(graph.items())
        for other in sorted(others)
        if module != "hooks" and (other == "hooks" or rank[part(module)] < rank[part(other)])
    ]


def test_the_engine_knows_its_order():
    graph = graph_of(ROOT, python_files("hooks"))
    assert backwards(graph) == []
    assert backwards({"hooks.plan.sites": {"hooks.layout"}}) == ["hooks.plan.sites imports hooks.layout"]


def test_methods_use_what_the_engine_exports():
    """What is above the engine takes everything from `hooks` itself, so that what it exports is all that they share."""
    sources = python_files("interp", "experiments", "figures")
    inner = [f"{path}: {name}" for path in sources for name in deep_imports(ROOT / path, path)]
    assert inner == []


def deep_imports(file: Path, path: Path) -> list[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return [
        node.module if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names[:1]
        if (node.module if isinstance(node, ast.ImportFrom) else alias.name or "").startswith("hooks.")
    ]


# Import


def heavy(statement: str) -> list[str]:
    """Modules too heavy for `import interp` that a fresh interpreter holds after `statement`."""
    program = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    unwanted = re.compile(r"(transformers|transformer_lens|nnsight|lightning|pandas|matplotlib\.pyplot)(\.|$)")
    return [name for name in json.loads(ran.stdout) if unwanted.match(name)]


def test_import_is_light():
    assert heavy("import interp") == []


def test_the_import_check_can_fail():
    assert "matplotlib.pyplot" in heavy("import matplotlib.pyplot")


# Files


def test_public_modules_have_docstrings():
    bare = []
    for path in repository_files():
        private = any(part.startswith("_") and part != "__init__.py" for part in path.parts)
        if path.suffix != ".py" or path.parts[0] not in PACKAGES or private:
            continue
        if not ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            bare.append(str(path))
    assert bare == []


def test_files_are_small():
    large = {str(path): size for path in repository_files() if (size := (ROOT / path).stat().st_size) > LIMIT}
    shipped = {name for name in large if re.fullmatch(r"interp/models/.*\.safetensors", name)}
    assert large.keys() - shipped == set(), large


def test_no_file_is_named_after_borrowed_weights():
    assert [str(path) for path in repository_files() if "stories260k" in str(path)] == []


def test_borrowed_weights_are_not_tracked(stories):
    """The weights of the stories model belong beside the checkout, and under no other name in it."""
    borrowed = hashlib.sha256((stories / "model.safetensors").read_bytes()).hexdigest()
    weights = [path for path in repository_files() if path.suffix == ".safetensors"]
    assert [str(path) for path in weights if hashlib.sha256((ROOT / path).read_bytes()).hexdigest() == borrowed] == []


# The wheel


def test_wheel_ships_the_packages_and_nothing_else(tmp_path):
    """Built offline from a copy, so that no build product is left in the tree."""
    pytest.importorskip("hatchling")
    files = repository_files()
    for path in files:
        (tmp_path / "source" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / path).write_bytes((ROOT / path).read_bytes())
    data = {"interp/models/probe/model.safetensors", "interp/models/probe/config.json"}
    for name in data:
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_bytes(b"")
    stray = tmp_path / "source" / "experiments" / "stray.py"
    stray.parent.mkdir(exist_ok=True)
    stray.write_text("")

    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        tmp_path,
    ]
    built = subprocess.run(build, cwd=tmp_path / "source", capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("interp-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())

    assert {name.split("/")[0] for name in names} - {*PACKAGES} == {
        wheel.name.replace("-py3-none-any.whl", ".dist-info")
    }
    shipped = {path.as_posix() for path in files if path.parts[0] in PACKAGES}
    assert {name for name in names if name.split("/")[0] in PACKAGES} == shipped | data


# The README


def python_blocks(text: str) -> list[tuple[int, str]]:
    """The ```python blocks of a Markdown text that are meant to run: line number of the first line, and the code.

    A block is left out where the last line before it that is not blank is `<!-- no-run: reason -->`.
    """
    blocks, code, start, before, fence = [], [], 0, "", None
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        if fence is None and stripped.startswith("```"):
            fence, code, start = stripped.removeprefix("```").strip(), [], number + 1
        elif fence is not None and stripped == "```":
            if fence == "python" and not re.fullmatch(r"<!--\s*no-run:\s*\S.*-->", before):
                blocks.append((start, "\n".join(code)))
            fence, before = None, stripped
        elif fence is not None:
            code.append(line)
        elif stripped:
            before = stripped
    return blocks


def test_python_blocks():
    text = """Text
```python
a = 1
```
<!-- no-run: needs the hub -->

```python
b = 2
```
```text
c = 3
```
<!-- no-run -->
```python
d = 4

e = 5
```"""
    assert python_blocks(text) == [(3, "a = 1"), (15, "d = 4\n\ne = 5")]


def test_readme_runs(tmp_path, monkeypatch):
    """Top to bottom in one namespace, as a reader would type it, in a folder of its own."""
    readme = ROOT / "README.md"
    blocks = python_blocks(readme.read_text(encoding="utf-8")) if readme.exists() else []
    if not blocks:
        pytest.skip("README.md has no Python to run")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    for start, code in blocks:
        # Blank lines put each statement on its line of the README, so that a traceback shows the right text.
        exec(compile("\n" * (start - 1) + code, str(readme), "exec"), namespace)
