"""The runner of published benchmarks, end to end: a tiny model with random weights, small files, pictures."""

from __future__ import annotations

import json

import pytest

from experiments.modality_priors import benchmarks
from experiments.modality_priors.train import make, save
from hooks import ResultError
from tests.attention.test_evaluation import mme_folder, pope_file, vlind_file


def picture(path, shade):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 24), (shade, 255 - shade, 40)).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("model")
    save(make(0), home, {"seed": 0})
    return home


def pope(folder, tmp_path, given):
    few = ["--model", folder, "--out", tmp_path / "out", "--batch", 3, "--new", 3]
    return benchmarks.main(["pope", *map(str, (*few, *given))])


def test_pope_in_every_way_of_decoding_and_going_on(folder, tmp_path, capsys):
    path = pope_file(tmp_path)
    picture(tmp_path / "val" / "COCO_val2014_1.jpg", 200)
    ways = ["plain", "cut-off", "causalmm", "vcd", "no-image", "m3id", "pai", "dola"]
    given = ("--files", path, "--images", tmp_path / "val", "--methods", *ways)
    rows = pope(folder, tmp_path, given)
    assert [row["method"] for row in rows] == ways and all(row["scores"]["questions"] == 4 for row in rows)
    written = {way: (tmp_path / "out" / f"pope-coco_pope_random-{way}.jsonl").read_text() for way in ways}
    said = {way: [json.loads(line)["answer"] for line in text.splitlines()[1:]] for way, text in written.items()}
    assert all(len(each) == 4 and all(each) for each in said.values())
    assert said["plain"] == said["cut-off"] and len({str(each) for each in said.values()}) > 1
    assert "| coco_pope_random.json | plain | 0." in (tmp_path / "out" / "pope.md").read_text()
    assert "accuracy" in capsys.readouterr().out
    # Interrupted after a question: what is there is not asked again, and what comes is what would have come.
    half = tmp_path / "out" / "pope-coco_pope_random-causalmm.jsonl"
    half.write_text("".join(line + "\n" for line in written["causalmm"].splitlines()[:4]))
    again = pope(folder, tmp_path, given)
    assert half.read_text() == written["causalmm"] and again == rows
    with pytest.raises(ResultError, match="other setting"):
        pope(folder, tmp_path, (*given, "--sample"))


def test_mme_and_vlind(folder, tmp_path):
    release = mme_folder(tmp_path / "release")
    for number, path in enumerate(sorted(release.glob("**/*.jpg"))):
        picture(path, 30 * number)
    common = ["--model", str(folder), "--out", str(tmp_path / "out"), "--new", "2", "--methods", "plain", "causalmm"]
    rows = benchmarks.main(["mme", "--files", str(release), *common])
    assert {"perception", "cognition", "OCR"} <= set(rows[0]["scores"]) and len(rows) == 2
    path = vlind_file(tmp_path)
    for number in (0, 5):
        picture(tmp_path / "cf" / "color" / "3_bananas are red" / f"{number}.jpg", 10 * number)
    picture(tmp_path / "real" / "color" / "3_bananas are yellow" / "0.jpg", 90)
    where = ["--images", str(tmp_path / "cf"), "--factual", str(tmp_path / "real")]
    rows = benchmarks.main(["vlind", "--files", str(path), *where, *common])
    assert {"bias", "prior"} <= set(rows[0]["scores"]) and rows[0]["questions"] == 10


def test_what_is_not_given(folder, tmp_path, capsys):
    for arguments in (["pope", "--files", "a"], ["mme", "--files", "a", "--limit", "3"], ["vlind", "--files", "a"]):
        with pytest.raises(SystemExit):
            benchmarks.main([*arguments, "--model", str(folder), "--out", str(tmp_path)])
    assert "pope needs --images" in capsys.readouterr().err
