"""A metric by step is the metric of the text up to there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import interp as ip
from tests.hooks.decoding import OPTIONS, prompts
from tests.zoo import wrapped

METRICS = {
    "logit_diff": ip.logit_diff([3, 4], [5, 6]),
    "log_prob": ip.log_prob([3, 4]),
    "prob": ip.prob([7, 8]),
    "rank": ip.rank([3, 4]),
    "own": ip.metric(lambda x: x[:, -1].max(-1).values, ip.site("logits", pos=-1)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", METRICS)
def test_it_is_that_of_the_text(name: str) -> None:
    model, metric = wrapped("llama"), METRICS[name]
    x = prompts(model)
    out = model.generate(x, logits=True, **OPTIONS)
    got = ip.by_step(model, out, metric)
    assert got.shape == (2, 4)
    for step in range(4):
        width = x.width + step
        text = ip.Inputs.of(out.sequences[:, :width], out.mask[:, :width])
        bound = metric.bind(model, text)
        run = model.run(text, capture=list(bound.reads))
        want = bound.fn(slice(0, 2), *(run.tape[read].float() for read in bound.reads))
        torch.testing.assert_close(got[:, step].double(), want.double(), rtol=1e-5, atol=1e-5)
    assert float((got[:, 0] - got[:, 1]).abs().max()) > 0


@torch.no_grad()
def test_a_row_that_ended_has_no_number_and_the_rest_is_refused_by_name() -> None:
    model = wrapped("llama")
    x = prompts(model)
    free = model.generate(x, **OPTIONS)
    end = int(free.tokens[1, 0])
    assert end not in free.tokens[0]
    out = model.generate(x, logits=True, **dict(OPTIONS, eos_token_id=end))
    got = ip.by_step(model, out, ip.prob(end))
    assert got.isnan().tolist() == [[False] * 4, [False, True, True, True]]
    refused: list[tuple[Any, Any, str]] = [
        (free, ip.prob(3), "logits=True"),
        (out.sequences, ip.prob(3), "not Tensor"),
        (out, ip.kl(ip.World(x)), "reference"),
        (out, ip.metric(lambda z: z.sum((1, 2, 3)), ip.site("z", 1)), "its logits alone"),
    ]
    for given, metric, why in refused:
        with pytest.raises(ip.MetricError, match=why):
            ip.by_step(model, given, metric)
