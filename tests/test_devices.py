"""The tests that know of devices, on a pretended card: mistakes of devices are found where there is no GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.devices import PRETEND

ROOT = Path(__file__).resolve().parent.parent
FILES = ("tests/hooks/test_gpu.py", "tests/interp/test_gpu.py")
SOME = "(waits and llama) or draws or kept or refused or statuses or saved or moves or spread or flow or estimates"

PROBE = """
import pytest, torch
from tests.pretended import pretended

with pretended() as card:
    x, here = torch.ones(3, device="card:0"), torch.arange(3)
    assert x.device == torch.device("card:0") and (x + 1).device == x.device and x.cpu().device.type == "cpu"
    mixed = (lambda: x + here, lambda: x.index_select(0, here), lambda: torch.where(x > 0, here, x))
    for wrong in (*mixed, lambda: x.numpy()):
        with pytest.raises((RuntimeError, TypeError)):
            wrong()
    assert len(card.waits) == 1  # the copy
    float(x.sum()), bool((x > 0).all()), x[here], here.to(x.device), torch.tensor(1.0, device=x.device)
    assert len(card.waits) == 6, card.waits
"""


def test_the_card_refuses_what_a_gpu_refuses():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_on_a_pretended_card():
    """Some of those tests; all of them take minutes: ``INTERP_PRETEND=1 python -m pytest tests/hooks/test_gpu.py``."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-k", SOME, *FILES]
    found = subprocess.run(
        command, cwd=ROOT, env={**os.environ, PRETEND: "1"}, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout[-6000:]
    assert int(re.findall(r"(\d+) passed", found.stdout)[-1]) >= 9
