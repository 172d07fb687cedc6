"""Retaining heads: a score of each cached key from its own query, key and value, so that it never changes later.

Huang et al. 2024, "Locret" (arXiv 2410.01805).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hooks import Model, ResultError, ShapeError, pair, read_record, read_tensors, sha256, write_all
from interp.kv.policies import Policy
from interp.kv.view import View

SCHEMA, VERSION = "interp.retaining_heads", 1


class RetainingHeads(nn.Module):
    """One head for each layer: score = W2 act(W1 [q; k; v]), without biases, one score for each key/value head.

    Args:
        layers: how many L; sizes: the width of [q; k; v] of one token, before rotation, all heads flattened.
        heads: key/value heads K; hidden: width between W1 and W2 (1024 for Llama-3.1-8B).
        activation: name of the backbone's own, as transformers knows it.
    """

    def __init__(self, layers: int, sizes: int, heads: int, hidden: int, activation: str = "silu") -> None:
        super().__init__()
        from transformers.activations import ACT2FN

        self.settings = {
            "layers": layers, "sizes": sizes, "heads": heads, "hidden": hidden, "activation": activation
        }  # fmt: skip
        self.first = nn.ModuleList(nn.Linear(sizes, hidden, bias=False) for _ in range(layers))
        self.last = nn.ModuleList(nn.Linear(hidden, heads, bias=False) for _ in range(layers))
        self.act = ACT2FN[activation]

    @classmethod
    def for_model(cls, model: Model, hidden: int | None = None, seed: int = 0) -> RetainingHeads:
        """Fresh heads for a model, `hidden` wide (default: a quarter of the model's width, as 1024 is of 4096)."""
        blocks = model.architecture.blocks
        attention = blocks[0].attention
        sizes = (attention.q.heads + 2 * attention.k.heads) * attention.q.width
        config: Any = getattr(model.module, "config", None)
        act = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None) or "silu"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            width = hidden or max(16, model.architecture.width // 4)
            made = cls(len(blocks), sizes, attention.k.heads, width, act)
        return made.to(model.device, torch.promote_types(model.dtype, torch.float32))

    def forward(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Scores [B, K, T] of queries [B, H, T, D] and keys and values [B, K, T, D], before rotation.

        Raises:
            ShapeError: they are of another model.
        """
        read = torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], -1)
        if read.shape[-1] != self.settings["sizes"]:
            raise ShapeError(
                f"these retaining heads read {self.settings['sizes']} numbers a token, and this model's queries, keys "
                f"and values are {read.shape[-1]}: they were made for another model"
            )
        first: Any = self.first[layer]
        return self.last[layer](self.act(first(read.to(first.weight.dtype)))).transpose(1, 2)

    def policy(self, name: str = "Locret") -> Policy:
        """What these heads score, as a policy: each key once, when it is written."""

        def score(view: View) -> Tensor:
            layers = view.owner.model.n_layers
            if layers != self.settings["layers"]:
                raise ShapeError(
                    f"these retaining heads are for {self.settings['layers']} layers, and this model has "
                    f"{layers}: they "
                    "were made for another model"
                )
            with torch.no_grad():
                return self(view.layer, view.raw_queries, view.raw_new_keys, view.new_values)

        return Policy(name, score)

    @property
    def parameters_count(self) -> int:
        """How many numbers the heads have."""
        return sum(p.numel() for p in self.parameters())

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `path`.json and `path`.safetensors, and return the path of the first."""
        from safetensors.torch import save

        tensors = save({name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()})
        record = {"schema": SCHEMA, "version": VERSION, "settings": self.settings, "arrays_sha256": sha256(tensors)}
        json_path, arrays_path = pair(path)
        json_path.parent.mkdir(parents=True, exist_ok=True)
        write_all({arrays_path: tensors, json_path: json.dumps(record, indent=1).encode()})
        return json_path

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Model | None = None) -> RetainingHeads:
        """Return what `save(path)` wrote, on a model's device.

        Raises:
            FileNotFoundError: either file is missing.
            ResultError: the files are not saved heads, or do not belong together.
            ShapeError: the heads are of a model of other sizes.
        """
        from safetensors.torch import load

        json_path, arrays_path = pair(path)
        record = read_record(
            json_path, "retaining heads", ("schema", SCHEMA), VERSION, ("arrays_sha256", "settings"), ResultError
        )
        tensors = read_tensors(arrays_path, record["arrays_sha256"], json_path, ResultError)
        try:
            made = cls(**record["settings"])
            arrays = load(tensors)
            made.load_state_dict(arrays)
            made = made.to(next(iter(arrays.values())).dtype)
        except (TypeError, KeyError, RuntimeError) as error:
            raise ResultError(f"{json_path} is not saved retaining heads: {error}") from None
        if model is not None:
            expected = cls.for_model(model, record["settings"]["hidden"]).settings
            if made.settings != expected:
                raise ShapeError(f"these heads are for a model with {made.settings}, this one has {expected}")
            made = made.to(model.device)
        return made
