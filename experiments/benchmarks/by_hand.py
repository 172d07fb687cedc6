"""The same visits as users of other tools write them: hooks of torch, TransformerLens's, and traces of nnsight."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from experiments.benchmarks.setting import Setting

Entered = Callable[[], AbstractContextManager[Callable[[], Any]]]
Kinds = dict[str, Entered]


def plain(run: Callable[[], Any]) -> Entered:
    """Something that is timed as it is."""
    return lambda: nullcontext(run)


class ByHand:
    """One model in each tool, whose residual stream after every layer is read, or moved along a vector.

    Args:
        bare: a GPT-2.
        ids: int64 [1, T], the prompt.
        vector: [M].
        greedy: options of `generate`.
    """

    def __init__(self, setting: Setting, bare: nn.Module, ids: Tensor, vector: Tensor, greedy: dict[str, Any]) -> None:
        from nnsight.modeling.transformers import TransformersModel

        self.ids, self.vector, self.greedy, self.layers = ids, vector, greedy, setting.layers
        self.hooked: Any = copy.deepcopy(bare)
        self.bridge = setting.bridge(bare)
        self.traced: Any = TransformersModel(copy.deepcopy(bare), task="text-generation", tokenizer=setting.tokenizer())
        self.names = [f"blocks.{layer}.hook_resid_post" for layer in range(setting.layers)]

    def prefill(self) -> dict[str, Kinds]:
        """Forward passes of the prompt, in each tool without a visit, with one that reads, and with one that edits."""

        def call() -> Any:
            with torch.no_grad():
                return self.hooked(input_ids=self.ids, use_cache=False).logits

        def bridged(run: Callable[[], Any]) -> Entered:
            return plain(torch.no_grad()(run))

        b, names = self.bridge, self.names
        return {
            "torch hooks, by hand": self._hooks(call),
            "TransformerLens, by hand": {
                "none": bridged(lambda: b(self.ids)),
                "read": bridged(lambda: b.run_with_cache(self.ids, names_filter=lambda name: name in names)),
                "edit": bridged(lambda: b.run_with_hooks(self.ids, fwd_hooks=[(n, self._moved) for n in names])),
            },
            "nnsight, by hand": {"none": plain(self._trace), "read": plain(self._reads), "edit": plain(self._edits)},
        }

    def decoding(self) -> dict[str, Kinds]:
        """Generation with a cache, likewise."""
        hooked = self._hooks(lambda: self.hooked.generate(self.ids, **self.greedy))
        inner = self.bridge.original_model

        @contextmanager
        def held() -> Iterator[Callable[[], Any]]:
            with self.bridge.hooks(fwd_hooks=[(name, self._moved) for name in self.names]):
                yield generating

        def generating() -> Any:
            return inner.generate(self.ids, **self.greedy)

        return {
            "torch hooks, by hand": hooked,
            "TransformerLens, by hand": {"none": plain(generating), "edit": held},
            "nnsight, by hand": {
                "none": plain(self._generate),
                "read": plain(self._generate_reads),
                "edit": plain(self._generate_edits),
            },
        }

    def _moved(self, value: Tensor, hook: Any) -> Tensor:
        return value + self.vector

    def _hooks(self, call: Callable[[], Any]) -> dict[str, Entered]:
        kept: list[Tensor] = []

        def read(_module: nn.Module, _args: Any, output: Any) -> None:
            kept.append(output.clone())

        def edit(_module: nn.Module, _args: Any, output: Any) -> Any:
            return output + self.vector

        def under(function: Callable[..., Any]) -> Entered:
            @contextmanager
            def enter() -> Iterator[Callable[[], Any]]:
                handles = [block.register_forward_hook(function) for block in self.hooked.transformer.h]
                try:
                    yield call
                finally:
                    kept.clear()
                    for handle in handles:
                        handle.remove()

            return enter

        return {"none": plain(call), "read": under(read), "edit": under(edit)}

    @torch.no_grad()
    def _trace(self) -> Any:
        lm = self.traced
        with lm.trace(self.ids, use_cache=False):
            logits = lm.output.logits.save()
        return logits

    @torch.no_grad()
    def _reads(self) -> Any:
        lm = self.traced
        with lm.trace(self.ids, use_cache=False):
            kept = [].save()  # type: ignore[attr-defined]
            for block in lm.transformer.h:
                kept.append(block.output)
            logits = lm.output.logits.save()
        return kept, logits

    @torch.no_grad()
    def _edits(self) -> Any:
        lm = self.traced
        with lm.trace(self.ids, use_cache=False):
            for block in lm.transformer.h:
                block.output = block.output + self.vector
            logits = lm.output.logits.save()
        return logits

    def _generate(self) -> Any:
        lm = self.traced
        with lm.generate(self.ids, **self.greedy) as tracer:
            ids = tracer.result.save()
        return ids

    def _generate_reads(self) -> Any:
        lm, steps = self.traced, self.greedy["max_new_tokens"]
        with lm.generate(self.ids, **self.greedy) as tracer:
            kept = [].save()  # type: ignore[attr-defined]
            for _step in tracer.iter[:steps]:
                for block in lm.transformer.h:
                    kept.append(block.output)
        return kept

    def _generate_edits(self) -> Any:
        lm, steps = self.traced, self.greedy["max_new_tokens"]
        with lm.generate(self.ids, **self.greedy) as tracer:
            for _step in tracer.iter[:steps]:
                for block in lm.transformer.h:
                    block.output = block.output + self.vector
            ids = tracer.result.save()
        return ids
