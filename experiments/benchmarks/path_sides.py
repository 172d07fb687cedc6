"""Edges done by hand on a Hugging Face GPT-2: one forward pass an edge, and EAP with a hook on every head.

What somebody writes who has no tool: the careful version, with the logits of the last position only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.benchmarks.setting import ANSWER, FOIL
from interp.paths import Edge, Graph

Run = Callable[[], np.ndarray]


class Stored:
    """What each writer adds to the residual stream of one run, [writers, 1, T, M], and the metric."""

    def __init__(self, model: Any, ids: Tensor, graph: Graph) -> None:
        blocks, kept = model.transformer.h, {}
        with torch.no_grad(), ExitStack() as stack:

            def keep(name: Any) -> Callable[..., None]:
                def hook(module: Any, args: Any, output: Any = None) -> None:
                    kept[name] = (args[0] if output is None else output).detach().clone()

                return hook

            stack.callback(blocks[0].register_forward_pre_hook(keep("input")).remove)
            for layer, block in enumerate(blocks):
                stack.callback(block.attn.c_proj.register_forward_pre_hook(keep(("z", layer))).remove)
                stack.callback(block.mlp.register_forward_hook(keep(("mlp", layer))).remove)
            self.metric = difference(model, ids)
        self.writers = torch.stack([self._writer(w, kept, model) for w in graph.writers])

    @staticmethod
    def _writer(writer: Any, kept: dict[Any, Tensor], model: Any) -> Tensor:
        if writer.kind == "input":
            return kept["input"]
        if writer.kind == "mlp":
            return kept["mlp", writer.layer]
        width = model.config.n_embd // model.config.n_head
        columns = slice(writer.head * width, (writer.head + 1) * width)
        weight = model.transformer.h[writer.layer].attn.c_proj.weight
        return kept["z", writer.layer][..., columns] @ weight[columns]


def difference(model: Any, ids: Tensor) -> Tensor:
    """The metric of a plain forward pass."""
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1]
    return logits[ANSWER] - logits[FOIL]


def edge_loop(model: Any, clean: Tensor, corrupt: Tensor, graph: Graph, edges: Sequence[Edge]) -> Run:
    """One forward pass for each edge, under hooks on the reader; what writers add is stored beforehand."""
    clean, corrupt = clean.to(model.device), corrupt.to(model.device)
    base = Stored(model, corrupt, graph)
    change = Stored(model, clean, graph).writers - base.writers
    width = model.config.n_embd // model.config.n_head
    place = {writer: i for i, writer in enumerate(graph.writers)}

    def install(edge: Edge, stack: ExitStack) -> None:
        reader, more = edge.reader, change[place[edge.writer]]

        def add(module: Any, args: tuple) -> tuple:
            return (args[0] + more, *args[1:])

        if reader.kind == "logits":
            stack.callback(model.transformer.ln_f.register_forward_pre_hook(add).remove)
            return
        block = model.transformer.h[reader.layer]
        if reader.kind == "mlp":
            stack.callback(block.ln_2.register_forward_pre_hook(add).remove)
            return
        start = "qkv".index(reader.kind) * model.config.n_embd + (reader.head or 0) * width
        columns, held = slice(start, start + width), {}

        def read(module: Any, args: tuple) -> None:
            held["resid"] = args[0]

        def project(module: Any, args: tuple, output: Tensor) -> Tensor:
            normed = block.ln_1.forward(held["resid"] + more)
            new = output.clone()
            new[..., columns] = normed @ module.weight[:, columns] + module.bias[columns]
            return new

        stack.callback(block.ln_1.register_forward_pre_hook(read).remove)
        stack.callback(block.attn.c_attn.register_forward_hook(project).remove)

    def run() -> np.ndarray:
        found = []
        with torch.no_grad():
            for edge in edges:
                with ExitStack() as stack:
                    install(edge, stack)
                    found.append(difference(model, corrupt))
        return (torch.stack(found).double() - base.metric.double()).cpu().numpy()

    return run


def eap_by_hooks(model: Any, clean: Tensor, corrupt: Tensor, graph: Graph, steps: int | None = None) -> Run:
    """EAP with a copy of the residual stream for every head's q, k and v, and a hook on each; EAP-IG with `steps`.

    All writers' changes are held as one tensor [writers, T, M], and every reader's gradient meets all of them.
    """
    clean, corrupt = clean.to(model.device), corrupt.to(model.device)
    blocks, heads = model.transformer.h, model.config.n_head
    width = model.config.n_embd // heads

    def gradients(embedded: Tensor) -> dict[str, Tensor]:
        copies: dict[str, Tensor] = {}
        with ExitStack() as stack:

            def start(module: Any, args: tuple) -> tuple:
                return (embedded, *args[1:])

            stack.callback(blocks[0].register_forward_pre_hook(start).remove)
            for layer, block in enumerate(blocks):
                held: dict[str, Tensor] = {}

                def read(module: Any, args: tuple, held: dict[str, Tensor] = held) -> None:
                    held["resid"] = args[0]

                def project(
                    module: Any, args: tuple, output: Tensor, layer: int = layer, block: Any = block,
                    held: dict[str, Tensor] = held,
                ) -> Tensor:  # fmt: skip
                    parts = []
                    for k, kind in enumerate("qkv"):
                        for head in range(heads):
                            mine = held["resid"].clone()
                            mine.retain_grad()
                            copies[f"a{layer}.h{head}<{kind}>"] = mine
                            at = slice(
                                k * model.config.n_embd + head * width, k * model.config.n_embd + (head + 1) * width
                            )
                            parts.append(block.ln_1.forward(mine) @ module.weight[:, at] + module.bias[at])
                    return torch.cat(parts, -1)

                def mlp_in(module: Any, args: tuple, layer: int = layer) -> tuple:
                    mine = args[0].clone()
                    mine.retain_grad()
                    copies[f"m{layer}"] = mine
                    return (mine,)

                stack.callback(block.ln_1.register_forward_pre_hook(read).remove)
                stack.callback(block.attn.c_attn.register_forward_hook(project).remove)
                stack.callback(block.ln_2.register_forward_pre_hook(mlp_in).remove)

            def final(module: Any, args: tuple) -> tuple:
                mine = args[0].clone()
                mine.retain_grad()
                copies["logits"] = mine
                return (mine,)

            stack.callback(model.transformer.ln_f.register_forward_pre_hook(final).remove)
            difference(model, corrupt).backward()
        return {name: copy.grad for name, copy in copies.items()}  # type: ignore[misc]

    def run() -> np.ndarray:
        base = Stored(model, corrupt, graph).writers
        change = Stored(model, clean, graph).writers - base
        points = [0.0] if steps is None else [k / steps for k in range(1, steps + 1)]
        total = np.zeros(len(graph))
        for point in points:
            embedded = (base[0] + point * change[0]).detach().requires_grad_()
            found = gradients(embedded)
            with torch.no_grad():
                scores = {name: torch.einsum("ubtm,btm->u", change, g).cpu().numpy() for name, g in found.items()}
            place = {writer: i for i, writer in enumerate(graph.writers)}
            total += [scores[edge.reader.name][place[edge.writer]] for edge in graph.listed]
        model.zero_grad(set_to_none=True)
        return total / len(points)

    return run
