"""The same weights in a `TransformerBridge` and in nnsight as in a model of transformers, which we run ourselves."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor

import interp as ip
from hooks import Model, Site, wrap
from tests import zoo

ATOL = 1e-5


def boot(module: Any) -> Any:
    """A bridge of a model, which it changes."""
    from tokenizers import Tokenizer, models
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(zoo.VOCAB)}
    special = {"unk_token": "w0", "pad_token": "w0", "bos_token": "w1", "eos_token": "w2"}
    with TemporaryDirectory() as name:  # a bridge reads its config from a folder or from the hub
        folder = str(Path(name))
        config = copy.deepcopy(module.config)
        config.architectures = [type(module).__name__]
        config.save_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), **special
        )
        tokenizer.save_pretrained(folder)
        return TransformerBridge.boot_transformers(
            folder,
            hf_model=module,
            tokenizer=AutoTokenizer.from_pretrained(folder),
            dtype=next(module.parameters()).dtype,
            device="cpu",
        )


def make(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A small model, whose numbers are small enough that float32 tells rounding from error."""
    module = zoo.make(family, dtype=dtype, widen=False)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.5)
    return module


@cache
def native(family: str) -> Model:
    """The model as we run it."""
    return wrap(make(family))


@cache
def bridge(family: str) -> Model:
    """The same in a bridge."""
    return ip.wrap(boot(make(family)))


def sites(model: Model) -> list[Site]:
    """Every site of a model, of the first block and the last."""
    found = []
    for info in model.sites():
        layers = [None] if not info.layers else sorted({0, model.n_layers - 1})
        found += [Site(info.name, layer) for layer in layers]
    return [place for place in found if place.key in model.sizes]


def close(one: Tensor, two: Tensor, real: Tensor | None = None, atol: float = ATOL) -> None:
    """The same numbers, infinities included; NaN fails."""
    assert one.shape == two.shape
    if real is not None:
        one, two = one[real], two[real]
    same = (one == two) | ((one - two).abs() <= atol)
    assert bool(same.all()), float((one - two).abs().max())


@cache
def traced(family: str) -> Model:
    """The same in nnsight."""
    from nnsight import NNsight

    return ip.wrap(NNsight(make(family)))


def tokenizer() -> Any:
    """One that knows as many words as the small models do."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(zoo.VOCAB)}
    special = {"unk_token": "w0", "pad_token": "w0", "bos_token": "w1", "eos_token": "w2"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), **special)


def language_model(family: str) -> Any:
    """A `TransformersModel` of nnsight's, which may be run elsewhere."""
    from nnsight.modeling.transformers import TransformersModel

    return TransformersModel(make(family), task="text-generation", tokenizer=tokenizer())


TOOLS = {"transformer_lens": bridge, "nnsight": traced}
each_tool = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.parametrize(
        "tool",
        [
            pytest.param(name, marks=pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed"))
            for name in TOOLS
        ],
    ),
]


def torch_backward() -> Iterator[None]:
    """nnsight puts a backward of its own in the place of torch's, which other tests are not to meet."""
    own = torch.Tensor.backward
    yield
    torch.Tensor.backward = own
