"""Questions about pictures, and asking them all, in batches, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hooks import InputsError, ResultError
from interp.progress import tqdm


@dataclass(frozen=True)
class Item:
    """A question about a picture.

    Attributes:
        key: what it is known by, unique in its benchmark.
        image: the picture's file.
        question: as it is put to the model.
        label: the right answer, or "" where the benchmark scores answers together.
    """

    key: str
    image: str
    question: str
    label: str = ""


Ask = Callable[[Sequence[Item]], Sequence[str]]
"""From items to the model's answers."""


def answer(
    items: Sequence[Item],
    ask: Ask,
    path: str | os.PathLike[str],
    *,
    batch: int = 8,
    setting: dict[str, Any] | None = None,
    progress: bool | None = None,
) -> dict[str, str]:
    """Ask all questions, and write every answer as it comes.

    Args:
        items: the questions.
        ask: answers some of them.
        path: JSON lines; what is there already is not asked again.
        batch: how many are asked at once.
        setting: what the answers depend on (model, decoder, seed); a file of another setting is refused.
        progress: show a bar; by default where the output is a terminal or a notebook.

    Returns:
        Answers by key.

    Raises:
        ResultError: the file is of other questions or another setting, or damaged before its last line.
        InputsError: two questions with one key, or another number of answers than questions.
    """
    keys = [item.key for item in items]
    if len(set(keys)) != len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise InputsError(f"two questions are known by {twice!r}")
    path, head = Path(path), _head(items, setting or {})
    known = _read(path, head)
    path.parent.mkdir(parents=True, exist_ok=True)
    left = [item for item in items if item.key not in known]
    with path.open("a", encoding="utf-8") as file:
        if not path.stat().st_size:
            print(json.dumps(head), file=file, flush=True)
        bar = tqdm(total=len(left), disable=None if progress is None else not progress, unit="question", leave=False)
        with bar:
            for start in range(0, len(left), batch):
                asked = left[start : start + batch]
                answers = list(ask(asked))
                if len(answers) != len(asked):
                    raise InputsError(f"{len(asked)} questions were asked, and {len(answers)} answers came")
                for item, text in zip(asked, answers, strict=True):
                    known[item.key] = text
                    print(json.dumps({"key": item.key, "answer": text}, ensure_ascii=False), file=file, flush=True)
                bar.update(len(asked))
    return {key: known[key] for key in keys}


def _head(items: Sequence[Item], setting: dict[str, Any]) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps([asdict(item) for item in items], sort_keys=True).encode()).hexdigest()
    return {"questions": digest, "setting": json.loads(json.dumps(setting, default=str))}


def _read(path: Path, head: dict[str, Any]) -> dict[str, str]:
    if not path.exists() or not path.stat().st_size:
        return {}
    lines = path.read_bytes().split(b"\n")
    if lines[-1]:
        # The last line was cut off in the middle: it is asked again.
        path.write_bytes(b"".join(line + b"\n" for line in lines[:-1]))
    found: dict[str, str] = {}
    try:
        entries = [json.loads(line) for line in lines[:-1] if line.strip()]
        if not entries:
            return {}
        if entries[0] != head:
            different = "questions" if entries[0].get("questions") != head["questions"] else "setting"
            raise ResultError(f"{path} holds answers of another run: other {different}; name another file")
        for entry in entries[1:]:
            found[entry["key"]] = entry["answer"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResultError(f"{path} is no file of answers: {error}") from error
    return found


def read_lines(path: str | os.PathLike[str], needed: Sequence[str]) -> list[dict[str, Any]]:
    """Read JSON lines (or one JSON list) of objects with the fields that are needed.

    Raises:
        InputsError: the file is none of these; the message says which line.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        if text.lstrip().startswith("["):
            entries = list(enumerate(json.loads(text), 1))
        else:
            entries = [(n, json.loads(line)) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    except ValueError as error:
        raise InputsError(f"{path} holds no JSON lines: {error}") from error
    for number, entry in entries:
        lacking = [name for name in needed if not isinstance(entry, dict) or name not in entry]
        if lacking:
            raise InputsError(f"{path}, entry {number}, lacks {', '.join(lacking)}")
    if not entries:
        raise InputsError(f"{path} is empty")
    return [entry for _, entry in entries]
