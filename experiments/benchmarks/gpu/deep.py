"""Every edge of a deep model with grouped-query attention: many layers, many edges, short prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

import interp as ip
from experiments.benchmarks import paths
from experiments.benchmarks.gpu.runner import Bench, Row, TooLong
from experiments.timing import timed
from hooks import Meter

TOKENS, DIFFERS = 14, 9
"""Tokens of a prompt, and the one in which a pair differs, counted from 0."""
SIZES = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
TINY = {"vocab_size": 128, "hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 2}


def deep(bench: Bench) -> Iterator[Row]:
    """Every edge of a Llama of 30 layers, from the top layer down, as far as the time goes."""
    model = _llama(bench)
    clean = bench.setting.ids(1, TOKENS) % model.architecture.vocabulary
    corrupt = clean.clone()
    corrupt[:, DIFFERS] = (clean[:, DIFFERS] + 1) % model.architecture.vocabulary
    pair, graph = ip.paths.Pair.of(model, model.inputs(clean), model.inputs(corrupt)), ip.paths.Graph.of(model)
    swept = partial(ip.paths.edge_sweep, metric=paths.metric(), graph=graph, progress=False)
    swept(pair, readers=graph.readers[-1].name)
    by_layer: dict[int, list[str]] = {}
    for reader in reversed(graph.readers):
        by_layer.setdefault(reader.layer, []).append(reader.name)
    took, work, effects = [0.0], 0.0, []
    try:
        for names in by_layer.values():
            # Each layer costs a little more than the one above it.
            if bench.left < 1.5 * took[-1] + 2:
                break
            seconds, found = timed(partial(swept, pair, readers=names), bench.device)
            took.append(seconds)
            effects.append(found.effect.flatten())
            work += found.config["forward_equivalents"]
    except TooLong:
        if not effects:
            raise
    every, seconds = np.concatenate(effects), sum(took)
    reader, writers = graph.readers[len(graph.readers) // 2].name, [writer.name for writer in graph.writers[:3]]
    one, two = (swept(p, readers=reader, writers=writers).effect for p in (pair, replace(pair, executor="sequential")))
    yield {
        "what": f"{len(every)} of {len(graph)} edges of a Llama, {len(effects)} of {len(by_layer)} layers",
        "dtype": "float32",
        "seconds": seconds,
        "forwards": work,
        "operations": work * 2 * Meter(model.architecture).row(TOKENS),
        "difference": float(np.abs(one - two).max()),
        "of": float(np.abs(every).max()),
        "edges_a_second": len(every) / seconds,
        "seconds_by_layer": took[1:],
    }


def _llama(bench: Bench) -> ip.Model:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = SIZES | (TINY if bench.quick else {})
    config = LlamaConfig(**sizes, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None)
    model: Any = LlamaForCausalLM(config).eval()
    return ip.wrap(model.to(bench.device))
