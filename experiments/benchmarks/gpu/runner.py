"""Parts of a run, one after another: each within a limit of time, none able to stop the others, written as they go."""

from __future__ import annotations

import gc
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from experiments.benchmarks.gpu import report
from experiments.benchmarks.setting import Setting

Row = dict[str, Any]


class Skipped(Exception):
    """A part that cannot be run here; the message says what is missing."""


class TooLong(BaseException):
    """A part's time is over. Not an `Exception`, so that nothing on the way takes it for an error of its own."""


@dataclass(frozen=True)
class Bench:
    """What parts are given.

    Attributes:
        device, quick: where, and whether on tiny models, whose times mean nothing.
        setting: sizes of the model of GPT-2's family.
        peaks: TFLOP/s and TB/s that were measured, filled by the first part.
        until: when the part that is running has to be done, by `time.monotonic`.
    """

    device: str
    quick: bool
    setting: Setting
    peaks: dict[str, float] = field(default_factory=dict)
    until: list[float] = field(default_factory=lambda: [float("inf")])

    @property
    def left(self) -> float:
        """Seconds that the part has left."""
        return self.until[0] - time.monotonic()


@dataclass(frozen=True)
class Part:
    """Something that is measured: its rows, one at a time, and the seconds that it may take."""

    name: str
    rows: Callable[[Bench], Iterator[Row]]
    limit: float


def run_parts(
    parts: Sequence[Part], bench: Bench, record: dict[str, Any], save: Callable[[], None], until: float
) -> list[str]:
    """Run parts into a record, and save it after each row.

    Returns:
        the names of the parts that were not begun because the device no longer answers: for another process.
    """
    for number, part in enumerate(parts):
        _run(part, bench, record, save, until)
        if not _usable(bench.device):
            return [later.name for later in parts[number + 1 :]]
    return []


def _run(part: Part, bench: Bench, record: dict[str, Any], save: Callable[[], None], until: float) -> None:
    start = time.monotonic()
    limit = min(part.limit, until - start)
    found: dict[str, Any] = {"status": "cut", "rows": []}
    record["parts"][part.name] = found
    bench.until[0] = start + limit
    try:
        if limit < 1:
            raise TooLong
        with _within(limit):
            for row in part.rows(bench):
                found["rows"].append(_judged(row, bench.peaks))
                print("   " + report.line(found["rows"][-1]), flush=True)
                save()
        found["status"] = "done"
    except TooLong:
        found["error"] = f"its {max(limit, 0):.0f} s were over"
    except Skipped as error:
        found |= {"status": "skipped", "error": str(error)}
    except Exception as error:  # whatever it is, the other parts go on
        found |= {"status": "failed", "error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    found["seconds"] = time.monotonic() - start
    record["took_seconds"] = record.get("took_seconds", 0.0) + found["seconds"]
    print(report.part_line(part.name, found), flush=True)
    save()
    gc.collect()
    if bench.device.startswith("cuda") and _usable(bench.device):
        torch.cuda.empty_cache()


def _judged(row: Row, peaks: dict[str, float]) -> Row:
    """A row with its percent of the peak that was measured in its dtype."""
    if row.get("operations") and row.get("seconds") and peaks.get(row.get("dtype", "")):
        rate = row["operations"] / row["seconds"] / 1e12
        row |= {"tflops": rate, "percent_of_peak": 100 * rate / peaks[row["dtype"]]}
    return row


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raise `TooLong` after some seconds; only a main thread can be interrupted so, others run on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(number: int, frame: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _usable(device: str) -> bool:
    """Whether the device still answers: after some errors on a GPU, nothing in this process does."""
    if not device.startswith("cuda"):
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
