"""What is measured: a model of GPT-2 small's size with random weights, and sweeps over pairs of random prompts."""

from __future__ import annotations

import copy
import random
import tempfile
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

SIZES: dict[str, dict[str, int]] = {
    "ioi-mini": {"layers": 3, "width": 64, "heads": 4, "vocabulary": 178},
    "GPT-2 small": {},
}
"""The models whose edges are measured, as they differ from a default `Setting`."""
EDGE_TOKENS = 16
"""Tokens of the prompts on which edges are measured."""
Cell = tuple[int, int]
ANSWER, FOIL = 5, 9
"""The tokens whose logits the metric compares, at the last position."""


@dataclass(frozen=True)
class Setting:
    """Sizes of everything; by default GPT-2 small.

    Attributes:
        lengths: tokens in a prompt, one entry a length that is measured.
        shared: how many first tokens the prompts of a pair have in common, one entry a pair.
        whole: the longest prompts at which the other sides run every cell; at longer ones they run `sample` cells,
            drawn at random, and their time is extrapolated by the number of cells.
        repetitions: of each sweep.
        forwards: batch size, tokens and repetitions of each measurement of a forward pass.
        quick: whether the model is a tiny one, whose times mean nothing.
    """

    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 50257
    lengths: tuple[int, ...] = (16, 64)
    shared: tuple[int, ...] = (0, 3)
    whole: int = 16
    sample: int = 16
    repetitions: int = 3
    forwards: tuple[tuple[int, int, int], ...] = ((8, 64, 15), (1, 16, 100))
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 2
    quick: bool = False

    def tiny(self) -> Setting:
        """The same measurements on a model that says nothing about speed, to see that they run."""
        small = replace(self, layers=2, width=64, heads=4, vocabulary=512, sample=4, repetitions=2, quick=True)
        return replace(small, forwards=tuple((batch, tokens, 5) for batch, tokens, _ in self.forwards))

    def model(self) -> Any:
        """A `GPT2LMHeadModel` in evaluation mode, the same for the same seed."""
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(self.seed)
        config = GPT2Config(
            vocab_size=self.vocabulary,
            n_embd=self.width,
            n_layer=self.layers,
            n_head=self.heads,
            bos_token_id=0,
            eos_token_id=0,
        )
        model: Any = GPT2LMHeadModel(config).eval()
        return model.to(self.device, getattr(torch, self.dtype))

    def tokenizer(self) -> Any:
        """One whose tokens are w0, w1, ..., for tools that want one."""
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from transformers import PreTrainedTokenizerFast

        words = Tokenizer(WordLevel({f"w{i}": i for i in range(self.vocabulary)}, unk_token="w0"))
        return PreTrainedTokenizerFast(
            tokenizer_object=words, unk_token="w0", bos_token="w0", eos_token="w0", pad_token="w0"
        )

    def bridge(self, model: Any) -> Any:
        """A `TransformerBridge` on a copy of the model, because a bridge changes the model that it wraps."""
        from transformer_lens.model_bridge import TransformerBridge

        tokenizer = self.tokenizer()
        with tempfile.TemporaryDirectory() as folder:  # a bridge reads its config from a folder or from the hub
            config = copy.deepcopy(model.config)
            config.architectures = ["GPT2LMHeadModel"]
            config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            return TransformerBridge.boot_transformers(folder, hf_model=copy.deepcopy(model), device=self.device)

    def ids(self, batch: int, tokens: int) -> Tensor:
        """Random token ids [batch, tokens]."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(self.vocabulary, (batch, tokens), generator=generator)

    def task(self, site: str, tokens: int, shared: int) -> Task:
        """A sweep over a pair of prompts that differ at every token but the first `shared`."""
        clean = self.ids(1, tokens)
        generator = torch.Generator().manual_seed(self.seed + 1)
        corrupt = (clean + torch.randint(1, self.vocabulary, clean.shape, generator=generator)) % self.vocabulary
        corrupt[:, :shared] = clean[:, :shared]
        count = tokens if site == "resid_pre" else self.heads
        cells = tuple((layer, index) for layer in range(self.layers) for index in range(count))
        sampled = cells
        if tokens > self.whole:
            sampled = tuple(sorted(random.Random(self.seed).sample(cells, min(self.sample, len(cells)))))
        return Task(site, clean, corrupt, shared, cells, sampled)


@dataclass(frozen=True, eq=False)
class Task:
    """One sweep, patching clean values into the corrupt run.

    Attributes:
        site: ``"resid_pre"`` (a cell is a layer and a position) or ``"z"`` (a layer and a head, at all positions).
        clean, corrupt: token ids [1, T].
        shared: how many first tokens they have in common.
        cells: every cell of the grid; `sampled`: those that the other sides run.
    """

    site: str
    clean: Tensor
    corrupt: Tensor
    shared: int
    cells: tuple[Cell, ...]
    sampled: tuple[Cell, ...]

    @property
    def tokens(self) -> int:
        """T."""
        return self.clean.shape[1]

    @property
    def axis(self) -> str:
        """What a cell is besides a layer."""
        return "pos" if self.site == "resid_pre" else "head"

    @property
    def scale(self) -> float:
        """From the time of the sampled cells to the time of all."""
        return len(self.cells) / len(self.sampled)
