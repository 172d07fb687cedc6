"""Benchmarks in the formats that they publish: small files made here, and scores worked out by hand."""

from __future__ import annotations

import json

import pytest

from hooks import InputsError, ResultError
from interp.attention.evaluation import (
    Item,
    answer,
    read_mme,
    read_pope,
    read_vlind,
    score_mme,
    score_pope,
    score_vlind,
    write_mme,
)
from interp.attention.evaluation.mme import read_answer
from interp.attention.evaluation.pope import says_yes
from interp.attention.evaluation.vlind import read_truth


def pope_file(tmp_path, labels="yynn"):
    lines = [
        {"question_id": n, "image": "COCO_val2014_1.jpg", "image_id": 1, "text": f"Is there a cup {n}?",
         "label": {"y": "yes", "n": "no"}[label]}
        for n, label in enumerate(labels)
    ]  # fmt: skip
    path = tmp_path / "coco_pope_random.json"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def test_pope(tmp_path):
    items = read_pope(pope_file(tmp_path), "val2014", suffix=" Briefly.")
    assert items[2] == Item("2", "val2014/COCO_val2014_1.jpg", "Is there a cup 2? Briefly.", "no")
    said = {"0": "Yes, there is. No doubt.", "1": "No", "2": "There is not, but", "3": "I know."}
    score = score_pope(items, said)
    assert (score.accuracy, score.precision, score.recall, score.f1, score.yes_ratio) == (0.5, 0.5, 0.5, 0.5, 0.5)
    assert [says_yes(text) for text in ("not.", "Nothing", "yes. no", "no,", "")] == [False, True, True, False, True]
    nothing = score_pope(items, dict.fromkeys("0123", "no"))
    assert (nothing.precision, nothing.f1, nothing.yes_ratio) == (0.0, 0.0, 0.0)
    with pytest.raises(InputsError, match="question 3 has no answer"):
        score_pope(items, {k: said[k] for k in "012"})
    with pytest.raises(InputsError, match="no questions"):
        score_pope([], {})


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "is empty"), ("{broken", "no JSON lines"), ('{"image": "a.jpg", "text": "b"}', "lacks label"),
     ('{"image": "a.jpg", "text": "b", "label": "maybe"}', "'maybe'")],
)  # fmt: skip
def test_no_pope(tmp_path, text, words):
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(InputsError, match=words):
        read_pope(path, ".")


def mme_folder(tmp_path):
    for task, split in (("existence", False), ("OCR", True), ("code_reasoning", False)):
        home = tmp_path / task
        texts, pictures = (home / "questions_answers_YN", home / "images") if split else (home, home)
        for folder in {texts, pictures}:
            folder.mkdir(parents=True, exist_ok=True)
        for name in ("01", "02"):
            (texts / f"{name}.txt").write_text(f"Is there {name}?\tYes\nIs there a\ttab?\tNo\n")
            (pictures / f"{name}.jpg").write_bytes(b"")
    return tmp_path


def test_mme(tmp_path):
    items = read_mme(mme_folder(tmp_path / "release"))
    assert len(items) == 12 and items[1].question == "Is there a\ttab?" and items[1].label == "no"
    assert items[4].image.endswith("OCR/images/01.jpg") and items[4].key == "OCR/01.jpg/0"
    said = {item.key: item.label.capitalize() for item in items}
    said["existence/01.jpg/0"] = "No."
    said["OCR/02.jpg/1"] = "Perhaps no"
    score = score_mme(items, said)
    assert score.tasks["existence"].score == pytest.approx(75 + 50) and score.tasks["existence"].other == 0
    assert score.tasks["OCR"].score == pytest.approx(75 + 50) and score.tasks["OCR"].other == 1
    assert score.perception == pytest.approx(250) and score.cognition == pytest.approx(200)
    assert [read_answer(t) for t in ("YES", " no,", "yes it is", "not so", "I see no")] == [
        "yes",
        "no",
        "yes",
        "no",
        "other",
    ]
    write_mme(items, said, tmp_path / "out")
    line = (tmp_path / "out" / "existence.txt").read_text().splitlines()[0]
    assert line == "01.jpg\tIs there 01?\tYes\tNo."
    with pytest.raises(InputsError, match="1 questions"):
        score_mme(items[:1], said)


def test_no_mme(tmp_path):
    with pytest.raises(InputsError, match="none of MME's tasks"):
        read_mme(tmp_path)
    root = mme_folder(tmp_path / "release")
    with pytest.raises(InputsError, match="no task 'count'"):
        read_mme(root, ["count"])
    (root / "existence" / "02.jpg").unlink()
    with pytest.raises(InputsError, match="does not hold"):
        read_mme(root, ["existence"])
    (root / "OCR" / "questions_answers_YN" / "01.txt").write_text("Is it?\tYes\n")
    with pytest.raises(InputsError, match="something else than two lines"):
        read_mme(root, ["OCR"])


def vlind_file(tmp_path, good=None):
    entry = {
        "concept": "color", "context_id": 3, "context": "bananas are red", "factual_context": "bananas are yellow",
        "true_statement": "Bananas are red.", "false_statement": "Bananas are yellow.", "existent_noun": "a banana",
        "non-existent_noun": "a car", "best_img_id": "5",
        "aggregated_human_label_good_images": {"0": 3, "5": 2, "9": 1} if good is None else good,
    }  # fmt: skip
    path = tmp_path / "data.json"
    path.write_text(json.dumps([entry]))
    return path


def test_vlind(tmp_path):
    instances, items = read_vlind(vlind_file(tmp_path), "cf", "real")
    assert instances[0].good == ("0", "5") and len(items) == 6 + 4
    by = {item.key: item for item in items}
    assert by["0/knowledge/true"].image == "real/color/3_bananas are yellow/0.jpg"
    assert "Statement: Bananas are yellow.\nBased on common sense" in by["0/knowledge/true"].question
    assert by["0/perception/false"].image == "cf/color/3_bananas are red/5.jpg"
    assert "There is a car in the given image." in by["0/perception/false"].question
    assert by["0/context/true"].question.startswith(
        "Only respond in True or False.\nContext: bananas are red\nStatement:"
    )
    assert by["0/prior/0/true"].image == "cf/color/3_bananas are red/0.jpg"
    said = {item.key: item.label for item in items}
    said["0/prior/5/false"] = "It is true."
    score = score_vlind(instances, items, said)
    assert (score.knowledge, score.perception, score.bias, score.prior, score.prior_accuracy) == (1, 1, 1, 0.5, 0.5)
    said["0/context/true"] = "Who knows"
    score = score_vlind(instances, items, said)
    assert (score.bias, score.prior, score.context_accuracy, score.prior_accuracy) == (0, 0, 0, 0.5)
    assert [read_truth(t) for t in ("False, true", "the answer is\ntrue.", "truely")] == ["False", "True", "NA"]


def test_no_vlind(tmp_path):
    with pytest.raises(InputsError, match="style is one of"):
        read_vlind(vlind_file(tmp_path), "", "", style="oil")
    assert read_vlind(vlind_file(tmp_path), "", "", style="photorealistic")[0][0].good == ("0",)
    with pytest.raises(InputsError, match="2 people found good"):
        read_vlind(vlind_file(tmp_path, {"0": 1}), "", "")
    path = tmp_path / "data.json"
    path.write_text('[{"concept": "x"}]')
    with pytest.raises(InputsError, match="instance 0, lacks context_id"):
        read_vlind(path, "", "")
    path.write_text("{}")
    with pytest.raises(InputsError, match="not a list"):
        read_vlind(path, "", "")


def test_answers_are_kept_and_gone_on_with(tmp_path):
    items = [Item(str(n), "a.jpg", f"question {n}") for n in range(5)]
    path, asked = tmp_path / "runs" / "answers.jsonl", []

    def ask(some):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append([item.key for item in some])
        return [f"answer {item.key}" for item in some]

    with pytest.raises(KeyboardInterrupt):
        answer(items, ask, path, batch=2, setting={"model": "m"})
    with path.open("ab") as file:
        file.write(b'{"key": "4", "ans')  # cut off in the middle
    asked.clear()
    found = answer(items, ask, path, batch=2, setting={"model": "m"})
    assert asked == [["4"]] and found == {str(n): f"answer {n}" for n in range(5)}
    asked.clear()
    assert answer(items, ask, path, setting={"model": "m"}) == found and asked == []
    with pytest.raises(ResultError, match="other setting"):
        answer(items, ask, path, setting={"model": "other"})
    with pytest.raises(ResultError, match="other questions"):
        answer(items[:3], ask, path, setting={"model": "m"})
    with pytest.raises(InputsError, match="2 questions were asked, and 1 answers"):
        answer(items[:2], lambda some: ["one"], tmp_path / "short.jsonl")
    with pytest.raises(InputsError, match="two questions"):
        answer([items[0], items[0]], ask, tmp_path / "twice.jsonl")
    broken = tmp_path / "broken.jsonl"
    broken.write_text("[]\nnonsense\n")
    with pytest.raises(ResultError, match="no file of answers"):
        answer(items, ask, broken)
