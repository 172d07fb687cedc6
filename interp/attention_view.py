"""An interactive view of all heads of a layer: one page of HTML that needs nothing from elsewhere."""

from __future__ import annotations

import html
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hooks import Inputs, InputsError, Model, Plan, Site, SiteError, as_plan
from interp.typesetting import visible


@dataclass(frozen=True, eq=False)
class AttentionView:
    """Attention patterns of a layer on one prompt, as a notebook shows them: click a head, hover a token.

    Attributes:
        patterns: float [H, T, S], what each query gives to each key.
        tokens: text of the T tokens.
        title: what stands above.
    """

    patterns: np.ndarray
    tokens: tuple[str, ...]
    title: str = ""

    def page(self) -> str:
        """The view as a page of HTML by itself."""
        # Four digits are what a shade can show. What stands in a script must not end it.
        data = {
            "tokens": [visible(token) for token in self.tokens],
            "patterns": np.round(np.nan_to_num(self.patterns.astype(np.float64)), 4).tolist(),
        }
        text = json.dumps(data).replace("<", "\\u003c")
        return PAGE.replace("__TITLE__", html.escape(self.title)).replace("__DATA__", text)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to a file, and return its path."""
        path = Path(path)
        path.write_text(self.page(), encoding="utf-8")
        return path

    def _repr_html_(self) -> str:
        """Return the page in a frame of its own, so that nothing of it touches the notebook."""
        height = 190 + 16 * len(self.tokens)
        return (
            f"<iframe sandbox='allow-scripts' style='border:0;width:100%;height:{height}px' "
            f"srcdoc='{html.escape(self.page(), quote=True)}'></iframe>"
        )

    def __repr__(self) -> str:
        return f"AttentionView({self.title}: {len(self.patterns)} heads, {len(self.tokens)} tokens)"


def attention_view(
    model: Model, inputs: Inputs, layer: int, *, row: int = 0, plan: Plan | None = None
) -> AttentionView:
    """View what every head of a layer attends to, on one prompt.

    Args:
        model: a wrapped model.
        inputs: the prompts.
        layer: which.
        row: which prompt.
        plan: what is done to the run.

    Returns:
        What a notebook shows, and `save` writes.

    Raises:
        SiteError: the model has no such layer, or no patterns.
        InputsError: there is no such row.
    """
    if not isinstance(inputs, Inputs) or not 0 <= row < len(inputs):
        raise InputsError(f"row {row} is not in {inputs!r}")
    if not isinstance(layer, int) or not -model.n_layers <= layer < model.n_layers:
        raise SiteError(f"the model has layers 0 to {model.n_layers - 1}, not {layer!r}")
    place = Site("pattern", layer % model.n_layers)
    one = inputs.rows(slice(row, row + 1))
    pattern = model.run(one, as_plan(plan), capture=place).tape[place][0].detach().float().cpu().numpy()
    columns = one.order[0, : int(one.lengths[0])].numpy()
    title = f"attention of layer {place.layer}, row {row}" + (", under a plan" if plan is not None else "")
    return AttentionView(pattern[:, columns][:, :, columns], tuple(one.labels(0)), title)


PAGE = """<!doctype html><meta charset="utf-8"><style>
body{font:12px sans-serif;margin:4px;background:#fff;color:#111}
#heads{display:flex;flex-wrap:wrap;gap:6px;margin:6px 0}
.head{cursor:pointer;text-align:center;font-size:10px;border:1px solid #ccc;padding:2px}
.head.on{border-color:#08519c;background:#deebf7}
#main{display:flex;gap:18px;align-items:flex-start}
#text span{display:inline-block;padding:1px 2px;margin:1px;border-radius:2px;cursor:default}
#text span.from{outline:1.5px solid #cb181d}
#scale{font-size:10px;margin-top:4px}
</style><div>__TITLE__</div><div id="heads"></div>
<div id="main"><div><canvas id="map"></canvas>
<div id="scale">queries down, keys to the right; white 0, blue 1</div></div>
<div style="max-width:420px"><div id="said">hover a token, or a square: how much it attends to each</div>
<div id="text"></div></div></div>
<script>
const {tokens, patterns} = __DATA__, n = tokens.length, heads = patterns.length;
let head = 0, query = n - 1;
const shade = a => `rgba(8,81,156,${a})`, by = id => document.getElementById(id);
function paint(canvas, pattern, cell) {
  canvas.width = canvas.height = n * cell;
  const c = canvas.getContext("2d");
  pattern.forEach((line, q) => line.forEach((a, k) => {
    c.fillStyle = shade(a); c.fillRect(k * cell, q * cell, cell, cell);
  }));
}
function show() {
  [...by("heads").children].forEach((e, h) => e.classList.toggle("on", h === head));
  const cell = Math.max(3, Math.min(16, Math.floor(400 / n))), map = by("map");
  paint(map, patterns[head], cell);
  const c = map.getContext("2d");
  c.strokeStyle = "#cb181d"; c.strokeRect(0.5, query * cell + 0.5, n * cell - 1, cell - 1);
  map.onmousemove = e => {
    const at = Math.min(n - 1, Math.floor(e.offsetY / cell)), k = Math.min(n - 1, Math.floor(e.offsetX / cell));
    if (at !== query) { query = at; show(); }
    const a = patterns[head][query][k];
    by("said").textContent = `head ${head}: ${tokens[query]} (${query}) to ${tokens[k]} (${k}): ${a}`;
  };
  [...by("text").children].forEach((e, k) => {
    const a = patterns[head][query][k];
    e.style.background = shade(a); e.style.color = a > 0.55 ? "#fff" : "#111"; e.title = a;
    e.classList.toggle("from", k === query);
  });
  by("said").textContent = `head ${head}: what ${tokens[query]} (position ${query}) attends to`;
}
for (let h = 0; h < heads; h++) {
  const box = document.createElement("div"), small = document.createElement("canvas");
  box.className = "head"; paint(small, patterns[h], Math.max(1, Math.floor(64 / n)));
  box.append(small, document.createElement("br"), `head ${h}`);
  box.onclick = () => { head = h; show(); };
  by("heads").append(box);
}
tokens.forEach((t, k) => {
  const e = document.createElement("span");
  e.textContent = t; e.onmouseenter = () => { query = k; show(); };
  by("text").append(e);
});
show();
</script>"""
