"""What every test runs under: no network, no display, one thread a worker, fixed seeds."""

import os

# Before anything that reads them is imported: torch its threads, matplotlib its backend, the hub its mode.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gc
import random
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# One thread for each pytest-xdist worker: two workers on two cores are faster than either sharing both.
torch.set_num_threads(1)

if find_spec("hypothesis") is not None:
    import hypothesis

    # Forward passes take as long as they take, so there is no deadline; in CI a failure must be the same on every run.
    hypothesis.settings.register_profile(
        "interp",
        deadline=None,
        derandomize=bool(os.environ.get("CI")),
        max_examples=16,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    hypothesis.settings.load_profile("interp")


NEAR = ("qwen2", "mistral", "neox_sequential", "small_qk_norm", "small_rms_rotary_gqa")
"""Families of `zoo.FAMILIES` that differ from others of them in one detail, which others (or tests of it) have too."""
MANY, VERY_MANY = 6, 20
"""Cases of one function, of families and of something else, of which every second is left to `make test-all`; and those
of which two in three are."""


@pytest.hookimpl(tryfirst=True)  # before marks are selected by
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device, and leave the last families of those that try all to
    `make test-all`.
    """
    tried: dict[str, set[str]] = {}
    for item in items:
        tried.setdefault(_function(item), set()).add(_family(item))
    cases: dict[str, dict[str, int]] = {}
    for item in items:
        if _family(item):
            found = cases.setdefault(_function(item), {})
            found[_family(item)] = found.get(_family(item), 0) + 1
    seen: dict[tuple[str, str], int] = {}
    for item in items:
        function, family = _function(item), _family(item)
        if family in NEAR and len(tried[function]) >= 5:
            item.add_marker("full")
        elif family and sum(cases[function].values()) >= MANY:
            # Of each family a part, and of two families that follow one another not the same.
            turn = seen[function, family] = seen.get((function, family), -1) + 1
            if (turn + list(cases[function]).index(family)) % (3 if sum(cases[function].values()) >= VERY_MANY else 2):
                item.add_marker("full")
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """What is loaded by now stays: the collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


def _function(item: pytest.Item) -> str:
    return item.nodeid.split("[")[0]


def _family(item: pytest.Item) -> str:
    callspec = getattr(item, "callspec", None)
    return str(callspec.params.get("family", "")) if callspec is not None else ""


@pytest.fixture(autouse=True)
def seeds() -> None:
    """The same random numbers for a test, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def stories() -> Path:
    """The folder of a small trained Llama, kept beside the checkout or where INTERP_STORIES says; skips without it."""
    named = os.environ.get("INTERP_STORIES")
    folder = Path(named) if named else ROOT.parent / "shared" / "models" / "stories260k"
    if (folder / "config.json").is_file():
        return folder
    if named:
        pytest.fail(f"INTERP_STORIES={named} holds no model: it has no config.json")
    pytest.skip(f"no model at {folder}: set INTERP_STORIES to the folder of one")


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct, dequantised from 4 bits; skips where its package is not installed."""
    from interp import load, pretrained

    if pretrained.missing():
        pytest.skip(pretrained.missing())
    return load(pretrained.NAME)
