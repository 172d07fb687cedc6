"""A sweep's effects on disk while it runs, so that an interrupted sweep goes on where it stopped."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from hooks import Model, ResultError, pair
from interp.results import Result

VERSION = 1


def finished(path: str | os.PathLike[str], identity: dict[str, str]) -> Result | None:
    """The finished result of the same sweep, where there is one; None where none is there.

    Raises:
        ResultError: what is there is anything else, which is left as it is.
    """
    words, arrays = pair(path)
    hint = "Delete it, or give another path."
    if not words.exists():
        # Arrays alone are what a sweep leaves that was killed between two files; its stream is there, too.
        if arrays.exists() and not (_folder(path) / "header.json").exists():
            raise ResultError(f"{arrays} is there already, and no sweep's result. {hint}")
        return None
    try:
        result = Result.load(words)
    except (ResultError, OSError) as error:
        raise ResultError(f"{words} is no result that can be read ({error}). {hint}") from None
    found = result.config.get("identity")
    if found == identity:
        _remove(_folder(path), identity)  # a sweep that was killed before it could
        return result
    known = found if isinstance(found, dict) else {}
    different = [k for k in {**identity, **known} if known.get(k) != identity.get(k)]
    raise ResultError(f"{words} is the result of another sweep: it differs in {', '.join(different)}. {hint}")


def _folder(path: str | os.PathLike[str]) -> Path:
    """Where the sweep to a path is streamed to."""
    return pair(path)[0].with_suffix(".partial")


def _remove(folder: Path, identity: dict[str, str]) -> None:
    """Remove a stream that is the sweep's."""
    try:
        mine = json.loads((folder / "header.json").read_text())["identity"] == identity
    except (ValueError, KeyError, TypeError, OSError):
        return
    if not mine:
        return
    for name in ("header.json", "values.npy", "status.npy", "done.npy"):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # somebody else's file is in it
        folder.rmdir()


class Stream:
    """Values of a metric by cell and row, kept in memory and, where a path is given, in a file beside it.

    Attributes:
        values: float64 [metric, cell, row], nan where not yet known.
        status: int8 [cell, row].
        done: bool [cell, row].
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, shape: tuple[int, int, int], identity: dict[str, str]
    ) -> None:
        """Open a stream, going on from the file at `path` if there is one.

        Args:
            path: where the finished result will be; the stream is a folder ``path.partial`` beside it.
            shape: numbers of metrics, cells and rows.
            identity: digests of what the numbers depend on (weights, inputs, plans, metrics), by name.

        Raises:
            ResultError: the file belongs to another sweep; the message says in what.
        """
        metrics, cells, rows = shape
        self.folder, self.identity = None, identity
        if path is None:
            self.values = np.full(shape, np.nan)
            self.status, self.done = np.zeros(shape[1:], np.int8), np.zeros(shape[1:], bool)
            return
        self.folder = _folder(path)
        header = {"version": VERSION, "shape": [metrics, cells, rows], "identity": identity}
        mode = "r+" if self._continues(header) else "w+"
        self.folder.mkdir(parents=True, exist_ok=True)
        open_ = np.lib.format.open_memmap
        self.values = open_(self.folder / "values.npy", mode, np.float64, shape)
        self.status = open_(self.folder / "status.npy", mode, np.int8, shape[1:])
        self.done = open_(self.folder / "done.npy", mode, np.bool_, shape[1:])
        if mode == "w+":
            self.values[:], self.status[:], self.done[:] = np.nan, 0, False
            # The header comes last: a folder without one was interrupted while it was made, and is made again.
            (self.folder / "header.json").write_text(json.dumps(header, indent=1))

    def _continues(self, header: dict) -> bool:
        assert self.folder is not None
        known = self.folder / "header.json"
        if not known.exists():
            return False
        try:
            found = json.loads(known.read_text())
            identity = dict(found["identity"])
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ResultError(f"{known} cannot be read ({error}): delete {self.folder}, or give another path") from None
        if found == header:
            return self._whole(header["shape"])
        mine = header["identity"]
        different = [k for k in {**mine, **identity} if identity.get(k) != mine.get(k)]
        what = ", ".join(different) or "shape"
        raise ResultError(
            f"{self.folder} belongs to another sweep: it differs in {what}. Delete it, or give another path."
        )

    def _whole(self, shape: list[int]) -> bool:
        """Check that the arrays are there, in the shapes that the header says."""
        assert self.folder is not None
        for name, expected in (("values", shape), ("status", shape[1:]), ("done", shape[1:])):
            try:
                found = np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            except (ValueError, OSError, EOFError) as error:
                raise ResultError(f"{self.folder} is damaged ({error}): delete it, or give another path") from None
            if list(found.shape) != list(expected):
                raise ResultError(f"{self.folder} is damaged ({name} has another shape): delete it")
        return True

    def write(self, metric_values: np.ndarray, cells: Sequence[int], rows: slice, status: Sequence[int]) -> None:
        """Note the metrics [metric, W, b] of W cells on some rows, and the status of each."""
        at = np.asarray(cells)
        self.values[:, at, rows] = metric_values
        self.status[at, rows] = np.asarray(status, np.int8)[:, None]
        # Last, so that a sweep killed in between computes the cells again. The pages outlive the process without a
        # flush.
        self.done[at, rows] = True

    def remaining(self) -> list[int]:
        """The cells of which some row is missing."""
        return np.flatnonzero(~self.done.all(1)).tolist()

    def complete(self) -> int:
        """How many cells are known in all rows, but for the two that a sweep begins with."""
        return int(self.done[2:].all(1).sum())

    def close(self) -> None:
        """Remove the folder, once the result itself is saved."""
        if self.folder is None:
            return
        self.values, self.status, self.done = np.array(self.values), np.array(self.status), np.array(self.done)
        _remove(self.folder, self.identity)


def weights_digest(model: Model) -> str:
    """A digest of every parameter and buffer of a model, by name."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in _named(model):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _named(model: Model) -> Iterable[tuple[str, torch.Tensor]]:
    yield from model.module.named_parameters()
    yield from model.module.named_buffers()
