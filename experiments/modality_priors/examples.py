"""Pictures whose colour the model gets wrong and says rightly without its prior; writes results/examples.json.

python -m experiments.modality_priors.examples
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

import interp as ip
from experiments.modality_priors.pictures import COLOURS, SHAPES
from experiments.modality_priors.questions import COLOUR_IDS, IDS, decode
from experiments.modality_priors.splits import asked, counter_prior
from experiments.modality_priors.worlds import cut
from interp.attention import debiased, image_map, relatives, token_map

OUT = Path(__file__).parent / "results" / "examples.json"


def main(rows: int = 120, kept: int = 4) -> None:
    """The command."""
    torch.set_num_threads(1)
    model = ip.load("shapes-vlm")
    split = asked(counter_prior(rows, 9_000_000), 9_000_001, COLOUR_IDS)
    image = split.batch.input_ids == IDS["<image>"]
    options = {"max_new_tokens": 1, "do_sample": False}
    before = model.module.generate(**split.batch.arguments(), **options)[:, -1]
    with debiased(model, relatives.without_image(image)):
        after = model.module.generate(**split.batch.arguments(), **options)[:, -1]
    mended = ((before != split.answer) & (after == split.answer)).nonzero().flatten()
    broken = ((before == split.answer) & (after != split.answer)).sum()
    found = []
    for row in mended[:kept].tolist():
        one = cut(split.batch, slice(row, row + 1))
        metric = ip.logit_diff(int(split.answer[row]), int(before[row]))
        tokens = token_map(model, model.inputs(one.arguments()), metric=metric, exact=True, progress=False)
        found.append(
            {
                "picture": [[[round(float(c), 2) for c in p] for p in line] for line in _shown(one.pixel_values[0])],  # type: ignore[index]
                "question": f"what color is the {SHAPES[int(split.scenes.shape[row])]} ?",
                "true": COLOURS[int(split.scenes.colour[row])],
                "said": decode(before[row : row + 1]),
                "says now": decode(after[row : row + 1]),
                "effect of attention on the picture": [
                    [round(float(x), 4) for x in line] for line in image_map(tokens, image[row : row + 1], (3, 3))[0]
                ],
                "effect of attention on the words": [round(float(x), 4) for x in tokens[0, 10:]],
            }
        )
    report = {"questions": rows, "mended": len(mended), "broken": int(broken), "examples": found}
    OUT.write_text(json.dumps(report, separators=(",", ":")) + "\n")
    print(f"{OUT} written: {len(mended)} of {rows} mended, {int(broken)} broken")


def _shown(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0)


if __name__ == "__main__":
    main()
