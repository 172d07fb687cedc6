"""Where tests that know of devices run: on the CPU always, on a GPU where there is one, and on a pretended card."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import hooks as hk
from tests import zoo
from tests.pretended import CARD, move, pretended

PRETEND = "INTERP_PRETEND"
"""In an environment that has this, tests run on the pretended card, which no process gets rid of again."""
PRETENDED = bool(os.environ.get(PRETEND))
DEVICES = ["card"] if PRETENDED else ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.15}
"""How far two devices may be apart in a dtype, relative to the largest number.

In models of float64, too, transformers computes rotary angles and some norms in float32, whose functions differ between
devices in the last digit.
"""


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A device that the test runs on."""
    if request.param == "card":
        with pretended():
            yield torch.device(CARD)
    else:
        yield torch.device(request.param, 0) if request.param == "cuda" else torch.device(request.param)


def elsewhere(device: torch.device) -> torch.device:
    """Another device than that one."""
    return torch.device("meta" if device.type == "cpu" else "cpu")


def placed(module: nn.Module, device: torch.device) -> nn.Module:
    """A module on a device."""
    return move(module) if device.type == "card" else module.to(device)


def model_on(device: torch.device, family: str, dtype: torch.dtype = torch.float64) -> hk.Model:
    """A tiny model with random weights, the same on every device."""
    return hk.wrap(placed(zoo.make(family, dtype=dtype), device))


def near(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE[torch.float64]) -> None:
    """Check that numbers of any devices agree, relative to the largest of them; nan is near nothing."""
    a, b = found.detach().cpu().double(), expected.detach().cpu().double()
    assert a.shape == b.shape
    apart = torch.where(a == b, 0, (a - b).abs()).max()
    scale = torch.where(b.isfinite(), b.abs(), 0).max().clamp_min(1.0)
    assert float(apart) <= tolerance * float(scale), f"off by {float(apart):.2g} of {float(scale):.2g}"
