"""The pages for users of other tools run as they are written."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import zoo
from tests.hooks import bridged

PAGES = Path(__file__).parents[2] / "experiments" / "coming_from"


backward = pytest.fixture(autouse=True, scope="module")(bridged.torch_backward)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("page", "tool"), [("transformer_lens", "transformer_lens"), ("nnsight", "nnsight")])
def test_page(page: str, tool: str, tmp_path: Path) -> None:
    if find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed")
    text = (PAGES / f"{page}.md").read_text()
    blocks = re.findall(r"(<!-- no-run.*?-->\s*)?```python\n(.*?)```", text, re.S)
    tokens, _ = zoo.random_inputs(zoo.VOCAB, [6, 6])
    corrupted, _ = zoo.random_inputs(zoo.VOCAB, [6, 6], seed=1)
    space = {"tokens": tokens, "corrupted": corrupted}
    if page == "nnsight":
        space["lm"] = bridged.language_model("llama")
    else:
        space["bridge"] = bridged.boot(bridged.make("llama"))
    run = [code for skipped, code in blocks if not skipped]
    assert run
    for number, code in enumerate(run):
        exec(compile(code, str(tmp_path / f"{page}{number}.py"), "exec"), space)
    assert abs(space["heads"].effect).max() > 1e-3
    assert float((space["patched"].logits - space["run"].logits).abs().max()) > 1e-3
