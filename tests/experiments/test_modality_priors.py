"""The planted priors are what they are said to be, and the model that ships has learned them."""

from __future__ import annotations

import pytest
import torch

import interp as ip
from experiments.modality_priors import relatives as published
from experiments.modality_priors import scoring
from experiments.modality_priors.pictures import draw_scenes, log_language_prior, log_prior, paint
from experiments.modality_priors.questions import COLOUR_IDS, IDS
from experiments.modality_priors.splits import asked, claims, counter_prior
from experiments.modality_priors.train import SHIPPED
from experiments.modality_priors.worlds import logits
from interp.attention import relatives


def test_the_likelihood_is_that_of_the_pictures():
    """Calibrated: among pictures, what the posterior says happens as often as it says, and colours follow the prior."""
    scenes = draw_scenes(6000, 0)
    posterior = (paint(scenes, 1)[1] + log_prior(scenes)).softmax(1)
    for low, high in ((0.05, 0.2), (0.4, 0.6), (0.8, 0.95)):
        inside = (posterior > low) & (posterior < high)
        true = torch.nn.functional.one_hot(scenes.colour, 4).bool()
        assert abs(float(true[inside].double().mean()) - float(posterior[inside].mean())) < 0.04
    shares = torch.stack([log_prior(scenes)[scenes.shape == s].exp().mean(0) for s in range(4)])
    drawn = torch.stack([torch.bincount(scenes.colour[scenes.shape == s], minlength=4) for s in range(4)])
    torch.testing.assert_close(drawn / drawn.sum(1, keepdim=True), shares, atol=0.04, rtol=0)
    assert log_language_prior(torch.tensor([2])).exp()[0, 2] > 0.69


def test_counter_prior_questions_and_claims():
    scenes = counter_prior(50, 3)
    assert not bool(((scenes.colour == scenes.shape) | (scenes.colour == (scenes.texture + 1) % 4)).any())
    found = claims(scenes, 4, "adversarial")
    assert (found.answer == IDS["yes"]).tolist() == [n % 2 == 0 for n in range(50)]


def test_the_model_that_ships_has_learned_the_prior_and_loses_it():
    model = ip.load("shapes-vlm")
    split = asked(counter_prior(100, 5), 6, COLOUR_IDS)
    found = logits(model, split.batch, {"no image": relatives.text_alone(split.batch.input_ids == IDS["<image>"])})
    read = scoring.composition(found["no image"][:, COLOUR_IDS], split)
    assert abs(read["language"] - 1) < 0.15 and abs(read["evidence"]) < 0.05 and abs(read["vision"]) < 0.05
    own = scoring.composition(found["own"][:, COLOUR_IDS], split)
    assert own["evidence"] > 0.3 and own["language"] > 0.7
    z = scoring.decoded(found["own"], found["no image"], 1.0, None)
    gained = scoring.greedy(z, split.answer).mean() - scoring.greedy(found["own"], split.answer).mean()
    assert float(gained) > 0.05


def test_intervals_are_of_paired_differences():
    base = [torch.tensor([0.0, 1.0] * 20).double() for _ in range(3)]
    found = scoring.paired([x + 0.1 for x in base], base, draws=50)
    assert abs(found["change"] - 0.1) < 1e-6 and abs(found["low"] - 0.1) < 1e-5 and abs(found["high"] - 0.1) < 1e-5
    worse = scoring.paired([1 - x for x in base], base, draws=200)
    assert worse["low"] < 0 < worse["high"] and len(worse["by model"]) == 3


@pytest.mark.full
def test_published_methods_are_measured_beside_plain_decoding():
    found = published.measured(SHIPPED, 0, 12)["counter"]
    assert torch.equal(found["plain | greedy"], found[f"plain, eps {published.EPS:g} | greedy"])
    for way in (
        "VCD, alpha 1",
        "ICD, alpha 1",
        "AGLA, alpha 1",
        "PAI, gamma 2, alpha 0.5",
        "VTI text, alpha 1",
        "DoLa",
    ):
        values = found[f"{way} | sampled"]
        assert values.shape == (12,) and bool(((values >= 0) & (values <= 1)).all())
        assert float((values - found["plain | sampled"]).abs().max()) > 1e-3, way
    table = published.pooled([{"counter": found}])["counter"]
    assert "beyond the cut-off" in table[f"VCD, alpha 1, eps {published.EPS:g} | sampled"]
