"""Exemplars made of drawings: the network learns characters that it can tell apart in drawings it has not seen."""

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from experiments.induction_formation import encode, run
from experiments.induction_formation.task import mean_cosine
from hooks.errors import InputsError, ResultError

CHARACTERS, EACH = 6, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Characters of three strokes, drawn with a shaking hand."""
    root = tmp_path_factory.mktemp("alphabet")
    generator = torch.Generator().manual_seed(0)
    for character in range(CHARACTERS):
        place = root / "alphabet" / f"character{character:02}"
        place.mkdir(parents=True)
        strokes = torch.randint(10, 95, (3, 4), generator=generator)
        for drawing in range(EACH):
            image = Image.new("L", (105, 105), 255)
            for stroke in (strokes + torch.randint(-4, 5, (3, 4), generator=generator)).tolist():
                ImageDraw.Draw(image).line(stroke, fill=0, width=5)
            image.save(place / f"{drawing}.png")
    return root


def test_it_tells_unseen_drawings_apart(folder):
    images = encode.drawings(folder)
    assert images.shape == (CHARACTERS, EACH, 1, encode.SIDE, encode.SIDE)
    assert 0 <= float(images.min()) < 0.1 and 0.5 < float(images.max()) <= 1 and float(images.mean()) < 0.4
    state = torch.get_rng_state()
    model = encode.train(images[:, :-1], 40, seed=0, batch=32, checkpoint=None, device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        found = model(images[:, -1]).argmax(-1)
    assert int((found == torch.arange(CHARACTERS)).sum()) >= CHARACTERS - 1
    seen, raw = encode.features(model, images[:, 0]), model[:-1](images[:, 0]).detach()
    assert float(seen.min()) == 0  # rectified, and not centred: one number divides all
    assert float(seen.square().mean()) == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(seen / seen.max(), raw / raw.max(), rtol=0, atol=1e-6)
    assert 0.1 < mean_cosine(seen) < 1
    assert int((seen.std(0) > 0.1).sum()) > encode.WIDTH // 4


def test_interrupted_it_continues(folder, tmp_path):
    def options(name, steps):
        out = tmp_path / name / "features.safetensors"
        return out, [
            "--images",
            str(folder),
            "--out",
            str(out),
            "--classes",
            "4",
            "--batch",
            "2",
            "--steps",
            str(steps),
        ]

    whole, arguments = options("whole", 101)
    encode.main(arguments)
    parts, first = options("parts", 100)
    encode.main(first)
    before = load_file(parts)["exemplars"]
    encode.main(options("parts", 101)[1])
    assert load_file(whole)["exemplars"].shape == (4, encode.WIDTH)
    torch.testing.assert_close(load_file(parts)["exemplars"], load_file(whole)["exemplars"], rtol=0, atol=0)
    assert not torch.equal(before, load_file(parts)["exemplars"])
    with pytest.raises(InputsError, match="other images or batches"):
        encode.main([*first, "--batch", "9"])
    with pytest.raises(ResultError, match="another ensemble"):
        encode.main([*first, "--seed", "1"])


def test_what_is_refused(folder, tmp_path, capsys):
    with pytest.raises(InputsError, match="two or more"):
        encode.drawings(tmp_path)
    with pytest.raises(InputsError, match="holds 6 characters; the study needs 300"):
        encode.main(["--images", str(folder), "--out", str(tmp_path / "x.safetensors")])
    for wrong in ("--steps", "--batch"):
        with pytest.raises(InputsError, match="at least one"):
            encode.main(
                ["--images", str(folder), "--out", str(tmp_path / "x.safetensors"), "--classes", "4", wrong, "0"]
            )
    with pytest.raises(SystemExit):
        run.main(["free", "--quick", "--features", str(tmp_path / "x.safetensors")])
    assert "give --name" in capsys.readouterr().err
